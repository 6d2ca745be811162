"""Which layers cost the accuracy: what quantization does to each tensor, and the metric with one layer quantized."""

from .damage import Meter
from .parts import Part, choose, only, parts_of
from .runs import analyze, load, prepare, take_samples, weights_of

__all__ = ['Meter', 'Part', 'analyze', 'choose', 'load', 'only', 'parts_of', 'prepare', 'take_samples', 'weights_of']
