"""Hooks of the quantized run: state, never structure. A file each."""

from .calibration import CalibrationHook
from .guard import FiniteLossHook
from .stages import StageHook
from .statistics import StatisticsHook
from .thresholds import ThresholdHook

__all__ = ['CalibrationHook', 'FiniteLossHook', 'StageHook', 'StatisticsHook', 'ThresholdHook']
