"""Hooks of the quantized run: state, never structure. A file each."""

from .calibration import CalibrationHook
from .checkpoint import WholeCheckpointHook
from .guard import FiniteLossHook
from .norms import NormHook
from .stages import StageHook
from .statistics import StatisticsHook
from .stop import StopHook
from .thresholds import ThresholdHook

__all__ = [
    'CalibrationHook',
    'FiniteLossHook',
    'NormHook',
    'StageHook',
    'StatisticsHook',
    'StopHook',
    'ThresholdHook',
    'WholeCheckpointHook',
]
