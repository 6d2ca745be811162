"""Hooks of the quantized run: state, never structure. A file each."""

from .calibration import CalibrationHook
from .stages import StageHook
from .statistics import StatisticsHook
from .thresholds import ThresholdHook

__all__ = ['CalibrationHook', 'StageHook', 'StatisticsHook', 'ThresholdHook']
