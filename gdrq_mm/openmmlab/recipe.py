"""What a checkpoint says of the training that wrote it, for run records: the recipe and the `quantization` dict."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from ..core.config import Quantization
from ..core.typed import FLOAT_BITS
from ..report.provenance import git_revision, versions
from ..report.recipe import NOT_SET, flat
from ..report.record import plain
from .models import quantization_of

TRAINED = ('train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'custom_hooks', 'sync_bn')
"""Settings of a config that decide how a model is trained."""
ALWAYS = ('data_preprocessor', 'train_dataloader')
"""Settings that decide what a model is calibrated with, too."""


def trained_as(cfg: Config, trained: bool, processes: int) -> dict[str, Any]:
    """What a checkpoint holds of its training, as plain data: `recipe` and `quantization`.

    Args:
        trained: whether there was a training; else thresholds were found only.
        processes: how many trained together.
    """
    found = {key: cfg.get(key) for key in (*(TRAINED if trained else ()), *ALWAYS)}
    loader = dict(found.pop('train_dataloader') or {})
    found['train_data'] = without(loader.get('dataset'), ('data_root', '_scope_'))
    found |= {key: loader.get(key) for key in ('batch_size', 'sampler', 'batch_sampler', 'drop_last')}
    model = cfg.model if isinstance(cfg.get('model'), dict) else {}
    found |= {'model.train_cfg': model.get('train_cfg'), 'processes': processes}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    found['versions'] = {**versions(), 'device': device, 'commit': _commit()}
    recipe = {key: _no_folders(plain(value)) for key, value in found.items() if value is not None}
    return dict(recipe=recipe, quantization=quantization_of(cfg))


def training_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the `meta` of a checkpoint says of its training; without `quantization` if it is of an older version."""
    found = {key: meta.get(key) for key in ('seed', 'epoch', 'iter')}
    found |= {key: meta[key] for key in ('recipe',) if isinstance(meta.get(key), dict)}
    found |= {key: meta[key] for key in ('changed',) if meta.get(key) and isinstance(meta[key], list)}
    return {**found, 'quantization': meta['quantization']} if 'quantization' in meta else found


LENGTH = ('train_cfg.max_epochs', 'train_cfg.max_iters')


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], length: bool = False) -> list[str]:
    """In what a recipe differs from one before, one line each; {} is one that is not known.

    Left out is what does not change what was trained already: how often it is validated, the versions, and the length.

    Args:
        length: tell it too, as what was trained already went by fractions of it.
    """
    one, other = (flat({k: v for k, v in each.items() if k != 'versions'}) for each in (before, after))
    told = LENGTH if length else ()
    keys = [key for key in {**one, **other} if before and (key in told or not key.startswith('train_cfg.'))]
    return [f'{k} {one.get(k, NOT_SET)} → {other.get(k, NOT_SET)}' for k in keys if one.get(k) != other.get(k)]


def settings_of(config: Quantization | None) -> dict[str, Any]:
    """What a run record says of the settings of a model; None is a float model, and so is a control."""
    config = None if config is not None and config.control else config
    return dict(
        methods=[config.weight.method, config.activation.method] if config else ['float', 'float'],
        options=config.choices() if config else {},
        bits=[config.weight.bits, config.activation.bits] if config else [FLOAT_BITS, FLOAT_BITS],
        first_last_bits=config.first_last_bits if config else FLOAT_BITS,
        deployable=config.deployable if config else None,
    )


def other_settings(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> list[str]:
    """In what the `quantization` dict of a checkpoint differs from that of a config, one line each."""
    configs = (None if each is None else Quantization.from_dict(each) for each in (theirs, ours))
    one, other = ({**s.pop('options'), **s} for s in map(settings_of, configs))
    return [
        f'{key} is {one.get(key, NOT_SET)!r} in the checkpoint and {other.get(key, NOT_SET)!r} in the config'
        for key in {**one, **other}
        if one.get(key, NOT_SET) != other.get(key, NOT_SET)
    ]


@functools.cache
def _commit() -> str | None:
    """The commit of the code that runs, asked once: files may change while it runs."""
    return git_revision()['commit']


def without(value: Any, keys: tuple[str, ...]) -> Any:
    """Nested settings without some keys."""
    if isinstance(value, Mapping):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, (list, tuple)) else value


def _no_folders(value: Any) -> Any:
    """A value without the folders of a machine: a record is published."""
    if isinstance(value, dict):
        return {key: _no_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_no_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith('/') else value
