"""The run record of a config: what was tested, on which data, from which checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.config import Config

from ..core.config import FLOAT_BITS, Quantization
from ..core.convert import Report
from ..core.files import file_digest
from ..core.quantizers import Quantizer, Stage
from ..report.layers import totals
from ..report.record import VERSION, git_revision, hardware, versions
from .tasks import dataset_of, task_of


def make_record(
    cfg: Config,
    checkpoint: str,
    metrics: Mapping[str, Any],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict:
    """A record of one test run.

    Args:
        cfg: the config that was run.
        checkpoint: path or address of the checkpoint that was tested.
        metrics: what the evaluator returned.
        model: what QuantRunner.describe() says of the model: sizes in bytes, bits, methods.
        training: what QuantRunner.training says of the run that wrote the checkpoint: seed, length, start checkpoint.
    """
    return dict(
        record_version=VERSION,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        task=task_of(cfg),
        model=dict(name=model_name(cfg), config_sha256=_digest(_architecture(_bare(cfg.model))), **model),
        data=_data(cfg),
        metrics={key: float(value) for key, value in metrics.items()},
        quantization=cfg.quantization.to_dict() if 'quantization' in cfg else None,
        config=dict(file=_relative(cfg.filename), text=_config_text(cfg)),
        checkpoint=dict(file=_relative(checkpoint), sha256=file_digest(checkpoint)),
        training=dict(training),
        git=git_revision(),
        versions=versions(),
        hardware=hardware(),
    )


def describe_model(model: nn.Module, config: Quantization | None, report: Report) -> dict[str, Any]:
    """What a run record says of a bare model: methods, bits, stage, sizes."""
    stages = {m.stage for m in model.modules() if isinstance(m, Quantizer)} - {Stage.FLOAT}
    return dict(
        methods=[config.weight.method, config.activation.method] if config else ['float', 'float'],
        options=config.choices() if config else {},
        bits=[config.weight.bits, config.activation.bits] if config else [FLOAT_BITS, FLOAT_BITS],
        first_last_bits=config.first_last_bits if config else FLOAT_BITS,
        deployable=config.deployable if config else None,
        stage=max(stages).name.lower() if stages else 'float',
        **dataclasses.asdict(totals(model, report)),
    )


def model_name(cfg: Config) -> str:
    """A short name such as 'ResNet_CIFAR-18', 'FasterRCNN ResNet-50' or 'PSP ResNetV1c-50'."""
    model = _bare(cfg.model)
    backbone = model.get('backbone') or {}
    name = str(backbone.get('type', '')).split('.')[-1]
    size = backbone.get('depth') or backbone.get('arch')
    name = f'{name}-{size}' if isinstance(size, (int, str)) else name
    heads = model.get('decode_head') or model  # mmseg's models differ in it only
    whole = str((heads[-1] if isinstance(heads, list) else heads)['type']).split('.')[-1].removesuffix('Head')
    return name if whole == 'ImageClassifier' else f'{whole} {name}'.strip()


def _data(cfg: Config) -> dict[str, Any]:
    """What decides whether two records can be compared: data set, split and evaluation settings."""
    dataset = dataset_of(cfg.test_dataloader)
    root = str(dataset.get('data_root') or '')
    plain = {k: v for k, v in dataset.to_dict().items() if k not in ('data_root', '_scope_')}
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    # Records made on different machines are comparable: paths count from the data folder on.
    evaluator = [{k: _below(v, root) if isinstance(v, str) else v for k, v in e.items()} for e in evaluators]
    parts = Path(root).parts
    below = parts[len(parts) - parts[::-1].index('data') :] if 'data' in parts else parts[-1:]
    return dict(
        name='/'.join(below) or str(dataset.type),
        type=str(dataset.type),
        root=_relative(root),
        evaluation_sha256=_digest([plain, evaluator]),
    )


def _below(path: str, root: str) -> str:
    return path[len(root) :].lstrip('/') if root and path.startswith(root) else path


def _bare(model: Any) -> Any:
    """The model config inside that of test-time augmentation."""
    while 'module' in model:
        model = model['module']
    return model


def _config_text(cfg: Config) -> str:
    shown = copy.deepcopy(cfg)
    shown.work_dir, shown.load_from = _relative(cfg.get('work_dir')), _relative(cfg.get('load_from'))
    # A record is published: it must not show the folders of a machine.
    return re.sub(r"'(/[^'\n]+)'", lambda match: repr(_relative(match[1])), shown.pretty_text)


def _architecture(model: Any) -> Any:
    """A model config without the keys that do not change the architecture: initial weights, settings of training."""
    if isinstance(model, Mapping):
        return {k: _architecture(v) for k, v in model.items() if k not in ('init_cfg', '_scope_', 'train_cfg')}
    return [_architecture(v) for v in model] if isinstance(model, (list, tuple)) else model


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relative(path: str | None) -> str | None:
    """A path relative to the working directory, or only its name outside of it; an address stays as it is."""
    if path is None or '://' in path:
        return path
    relative = os.path.relpath(path)
    return Path(path).name if relative.startswith('..') else relative
