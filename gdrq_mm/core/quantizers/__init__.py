"""The quantization methods, a file each. Every module of this folder is imported, so `@register` is all it takes."""

import importlib
import pkgutil

from ..typed import Bounds
from .activation import ActivationQuantizer, Statistics
from .base import OF_BITS, ModeOfModel, Quantizer, Stage, learned_parameters
from .following import FollowingQuantizer
from .registry import ACTIVATION_METHODS, METHODS, TITLES, WEIGHT_METHODS, register
from .weight import WeightQuantizer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f'{__name__}.{_module.name}')

__all__ = [
    'ACTIVATION_METHODS',
    'ActivationQuantizer',
    'Bounds',
    'FollowingQuantizer',
    'METHODS',
    'ModeOfModel',
    'OF_BITS',
    'Quantizer',
    'Stage',
    'Statistics',
    'TITLES',
    'WEIGHT_METHODS',
    'WeightQuantizer',
    'learned_parameters',
    'register',
]
