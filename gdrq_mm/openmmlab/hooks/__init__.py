"""Hooks of the quantized run: state, never structure. A file each."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from ...core.config import Quantization
from ..mistakes import registered
from .calibration import CalibrationHook
from .checkpoint import WholeCheckpointHook
from .distill import DistillHook
from .guard import FiniteLossHook
from .norms import NormHook
from .oscillation import OscillationHook
from .settle import SettleHook
from .stages import StageHook
from .statistics import StatisticsHook
from .stop import StopHook
from .thresholds import ThresholdHook
from .validation import DueValidationHook
from .work_dir import WorkDirHook

__all__ = [
    'CalibrationHook',
    'DistillHook',
    'DueValidationHook',
    'FiniteLossHook',
    'NormHook',
    'OscillationHook',
    'SettleHook',
    'StageHook',
    'StatisticsHook',
    'StopHook',
    'ThresholdHook',
    'WholeCheckpointHook',
    'WorkDirHook',
    'hooks_of',
    'with_whole_checkpoints',
]


def hooks_of(quantization: Quantization | None) -> list[Hook]:
    """The hooks of a run, for a float model (None) or a quantized one."""
    hooks: list[Hook] = [WorkDirHook(), FiniteLossHook(), NormHook(), StopHook(), DueValidationHook()]
    if quantization is not None:
        hooks.append(StageHook(quantization.schedule.reshape, quantization.schedule.freeze))
        if quantization.schedule.settle:
            hooks.append(SettleHook(quantization.schedule.settle))
        if quantization.distill is not None:
            hooks.append(DistillHook())
        if not quantization.control:
            hooks += [CalibrationHook(quantization.calibration_batches), ThresholdHook(), StatisticsHook()]
    return hooks


def with_whole_checkpoints(default_hooks: Any) -> Any:
    """The `default_hooks` of a config with WholeCheckpointHook where they have mmengine's CheckpointHook."""
    default = dict(type='CheckpointHook', interval=1)
    hook = (default_hooks or {}).get('checkpoint', default)
    if isinstance(hook, dict) and 'type' not in hook:
        hook = {**default, **hook}
    if not isinstance(hook, dict) or registered(hook.get('type'), HOOKS) is not CheckpointHook:
        return default_hooks
    return {**(default_hooks or {}), 'checkpoint': {**hook, 'type': WholeCheckpointHook}}
