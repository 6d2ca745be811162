"""The quantization methods: a file each, listed here by the name that a config uses."""

from .balanced import BalancedWeight
from .base import ActivationQuantizer, Quantizer, Stage, WeightQuantizer, learned_parameters
from .dorefa import DoReFaActivation, DoReFaWeight
from .following import FollowingQuantizer
from .gdrq import GDRQActivation, GDRQWeight
from .hwgq import HWGQActivation
from .log2 import Log2Activation, Log2Weight
from .lsq import LSQActivation, LSQWeight
from .lsq_plus import LSQPlusActivation, LSQPlusWeight
from .minmax import MinMaxActivation, MinMaxWeight
from .pact import PACTActivation
from .ptq import PTQActivation, PTQWeight
from .syq import SYQWeight
from .ttq import TTQWeight
from .twn import TWNWeight
from .xnor import XNORWeight

WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {
    'gdrq': GDRQWeight,
    'dorefa': DoReFaWeight,
    'lsq': LSQWeight,
    'lsq_plus': LSQPlusWeight,
    'minmax': MinMaxWeight,
    'ptq': PTQWeight,
    'balanced': BalancedWeight,
    'twn': TWNWeight,
    'ttq': TTQWeight,
    'syq': SYQWeight,
    'xnor': XNORWeight,
    'log2': Log2Weight,
}
ACTIVATION_METHODS: dict[str, type[ActivationQuantizer]] = {
    'gdrq': GDRQActivation,
    'dorefa': DoReFaActivation,
    'pact': PACTActivation,
    'lsq': LSQActivation,
    'lsq_plus': LSQPlusActivation,
    'minmax': MinMaxActivation,
    'ptq': PTQActivation,
    'hwgq': HWGQActivation,
    'log2': Log2Activation,
}
METHODS: dict[str, tuple[str, str]] = {
    'gdrq': ('gdrq', 'gdrq'),
    'dorefa': ('dorefa', 'dorefa'),
    'pact': ('dorefa', 'pact'),
    'lsq': ('lsq', 'lsq'),
    'lsq_plus': ('lsq_plus', 'lsq_plus'),
    'minmax': ('minmax', 'minmax'),
    'ptq': ('ptq', 'ptq'),
    'hwgq': ('minmax', 'hwgq'),
    'balanced': ('balanced', 'dorefa'),
    'twn': ('twn', 'minmax'),
    'ttq': ('ttq', 'minmax'),
    'syq': ('syq', 'dorefa'),
    'xnor': ('xnor', 'minmax'),
    'log2': ('log2', 'log2'),
}
"""`quantization.method` -> method of the weights and of the activations, as the paper combines them; where a paper
leaves one side in float, that side takes 'minmax' (ours)."""

__all__ = [
    'ACTIVATION_METHODS',
    'ActivationQuantizer',
    'FollowingQuantizer',
    'METHODS',
    'Quantizer',
    'Stage',
    'WEIGHT_METHODS',
    'WeightQuantizer',
    'learned_parameters',
]
