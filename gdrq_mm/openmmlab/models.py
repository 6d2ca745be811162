"""From the model of a config to the quantized model."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper

from ..core.config import Quantization
from ..core.convert import Report, float_report, quantize_model
from ..core.errors import UserError
from ..core.topology import Plan, record
from .compat import mend_losses
from .heads import TRAINING_ONLY, last_layers
from .tasks import type_name


def bare_model(model: nn.Module) -> Any:
    """The model without a wrapper for several processes or for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module  # type: ignore[assignment]
    return model


def record_plan(model: nn.Module, predict: Callable[[], Any]) -> Plan:
    """The plan of a bare model from one prediction, with what is known of the libraries' heads.

    Boxes of any score count meanwhile: an untrained detector is sure of nothing, and would not reach its mask head.
    """
    training_only = [name for name, _ in model.named_children() if name in TRAINING_ONLY]
    with _any_score(model):
        return record(model, predict, whole=False, last=last_layers(model), training_only=training_only)


@contextmanager
def _any_score(model: nn.Module) -> Iterator[None]:
    """Set each `score_thr` in the `test_cfg` of the model and its heads to 0, and back at the end."""
    found: list[tuple[Any, Any]] = []

    def lower(cfg: Any) -> None:
        if isinstance(cfg, dict):
            if isinstance(cfg.get('score_thr'), (int, float)):
                found.append((cfg, cfg['score_thr']))
                cfg['score_thr'] = 0.0
            for value in cfg.values():
                lower(value)

    for module in model.modules():
        lower(getattr(module, 'test_cfg', None))
    try:
        yield
    finally:
        for cfg, value in reversed(found):  # heads share their dicts with the model: the first value is the config's
            cfg['score_thr'] = value


def first_plan(model: nn.Module, trials: Sequence[Callable[[], Any]]) -> Plan:
    """The plan from the first trial that does not fail; that of the last one is raised.

    A library may fail to predict what it can train: mmdet 3.5.1 does for SSD.
    """
    *others, last = trials
    for trial in others:
        try:
            return record_plan(model, trial)
        except UserError:
            raise
        except Exception as error:
            _warn(f'a trial prediction failed ({_told(error)}); what feeds what is recorded from a training loss')
    try:
        return record_plan(model, last)
    except Exception as error:
        note = getattr(error, 'add_note', _warn)  # Python 3.10 has no notes
        note('It was a trial, which tells what feeds what in the model, before anything was quantized.')
        raise


def _plan_of_float(model: nn.Module, trials: Sequence[Callable[[], Any]]) -> Plan:
    """The plan of a model that stays float: only its table needs one, so that it does without."""
    try:
        return first_plan(model, trials)
    except UserError:
        raise
    except Exception as error:
        _warn(f'a trial prediction failed ({_told(error)}); the table of layers has no numbers of operations')
        return Plan()


def _told(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.splitlines()[0]


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


def prepare_model(
    model: nn.Module, cfg: Config, trials: Sequence[Callable[[], Any]], plan: Plan | None = None
) -> Report:
    """Give a model of a config its memory format and its quantized layers, in place.

    Args:
        trials: predictions of the model, or a training loss, from which is learned what feeds what. The first one that
            does not fail counts.
        plan: that of a checkpoint, where there is one; then nothing is predicted.

    Raises:
        UserError: the model cannot be quantized.
    """
    use_memory_format(model, cfg)
    mend_losses(model)
    bare, quantization = bare_model(model), read_quantization(cfg)
    if quantization is None or quantization.control:
        return float_report(bare, plan or _plan_of_float(bare, trials))
    if {'student', 'teacher'} <= bare._modules.keys():  # mmdet's semi-supervised detectors
        raise UserError(
            'the model has a student and a teacher, and a prediction runs one of them: train it in float, then '
            'quantize the detector in it by a config of its own'
        )
    report = quantize_model(bare, quantization, plan or first_plan(bare, trials))
    bare.train(bare.training)  # models with frozen parts freeze them here: what was added to these parts too
    model.to(next(model.parameters()).device)
    return report


def use_memory_format(model: nn.Module, cfg: Config) -> None:
    """Give a model the `memory_format` of its config, in place.

    mmcv's operators know contiguous tensors only: on a CPU RoIAlign would pool other values, deformable convolutions
    would fail. They get contiguous inputs.
    """
    memory_format = cfg.get('memory_format', 'contiguous')
    if memory_format not in ('contiguous', 'channels_last'):
        raise UserError(f'memory_format={memory_format!r} is not one of contiguous, channels_last')
    if memory_format == 'channels_last':
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in model.modules():
            if type(module).__module__.startswith('mmcv.ops.'):
                module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                module.register_forward_pre_hook(_with_contiguous_inputs, with_kwargs=True)


def _with_contiguous_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def contiguous(value: Any) -> Any:
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    return tuple(map(contiguous, args)), {key: contiguous(value) for key, value in kwargs.items()}


def read_quantization(cfg: Config) -> Quantization | None:
    """The validated `quantization` dict of a config; None if it has none, or None to switch off that of a base config.

    Raises:
        UserError: a value in it is wrong, or the config has a name that looks like it or like load_from: nothing reads
            that, and the training would be another one.
    """
    for setting in ('quantization', 'load_from'):
        for name in difflib.get_close_matches(setting, set(cfg) - {setting}, n=1, cutoff=0.85):
            raise UserError(f"{name} is not a setting; did you mean '{setting}'? (else rename it)")
    given = cfg.get('quantization')
    return None if given is None else Quantization.from_dict(given)


def quantization_of(cfg: Config) -> dict[str, Any] | None:
    """The `quantization` dict of a config as plain data, as checkpoints hold it."""
    given = cfg.get('quantization')
    return None if given is None else given.to_dict()


def _is_pretrained(init: Any) -> bool:
    return isinstance(init, dict) and type_name(init) in ('Pretrained', 'PretrainedInit')


def drop_pretrained(cfg: Any) -> None:
    """Remove `init_cfg=dict(type='Pretrained', ...)` and mmseg's `pretrained=...` from a model config, at any depth."""
    if isinstance(cfg, dict):
        if isinstance(cfg.get('pretrained'), str):
            cfg['pretrained'] = None
        init = cfg.get('init_cfg')
        if _is_pretrained(init):
            cfg['init_cfg'] = None
        elif isinstance(init, (list, tuple)):
            cfg['init_cfg'] = [each for each in init if not _is_pretrained(each)] or None
        for value in cfg.values():
            drop_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            drop_pretrained(value)
