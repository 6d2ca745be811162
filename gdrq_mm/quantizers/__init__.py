"""The quantization methods: a file each, listed here by the name that a config uses."""

from .base import ActivationQuantizer, Quantizer, Stage, WeightQuantizer, learned_parameters
from .gdrq import GDRQActivation, GDRQWeight

WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {'gdrq': GDRQWeight}
ACTIVATION_METHODS: dict[str, type[ActivationQuantizer]] = {'gdrq': GDRQActivation}

__all__ = [
    'ACTIVATION_METHODS',
    'ActivationQuantizer',
    'GDRQActivation',
    'GDRQWeight',
    'Quantizer',
    'Stage',
    'WEIGHT_METHODS',
    'WeightQuantizer',
    'learned_parameters',
]
