"""Logarithmic quantization: levels are powers of two.

Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016, arXiv:1603.01025.
Section 3: Q(x) = sign(x) * 2^e with e = round(log2|x|) clipped at the full scale range above, 0 below the smallest
exponent. The largest level is the power of two nearest to the largest |x|: of the group at each step for weights, of
calibration for activations. The gradient is straight through.
Deviations: the sign takes one of the bits, so n bits have 2^(n-1) - 1 exponents and zero; inputs with a short
negative tail are signed. More than 5 bits only add levels next to zero: 8-bit layers take the method 'minmax'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .activation import ActivationQuantizer, Statistics
from .registry import register
from .weight import WeightQuantizer


def log2_codes(x: Tensor, top: Tensor, lo: int, hi: int) -> Tensor:
    """0, or sign(x) * c for the level top * 2^(c - hi); a number below the smallest level's range gives 0."""
    exponent = torch.log2(x.abs() / torch.where(top > 0, top, 1)).round().clamp(max=0)
    code = torch.where(exponent > -hi, exponent + hi, 0) * torch.sign(x)
    return torch.where(top > 0, code.clamp(lo, hi), 0)


def log2_levels(codes: Tensor, top: Tensor, hi: int) -> Tensor:
    """The inverse of :func:`log2_codes`."""
    return torch.sign(codes) * top * torch.exp2(codes.abs() - hi)


@register('log2')
class Log2Weight(WeightQuantizer):
    """Weights with sign and exponent."""

    uneven = 'logarithmic levels are powers of two'
    allowed_bits = range(2, 6)

    def current_threshold(self, weight: Tensor) -> Tensor:
        return F.power_of_two(F.max_abs(weight, self.sizes)).clamp(max=F.LARGEST)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return log2_codes(weight, step * self.hi, self.lo, self.hi)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight, log2_levels(self.round(weight, step), step * self.hi, self.hi))


@register('log2')
class Log2Activation(ActivationQuantizer):
    """Activations with exponent, and sign if they need one."""

    uneven = 'logarithmic levels are powers of two'
    allowed_bits = range(2, 6)

    def set_range(self, kind: str, zero_point: int = 1) -> None:
        super().set_range('signed' if kind == 'zero_point' else kind)

    def start_threshold(self, seen: Statistics) -> Tensor:
        return F.power_of_two(seen.largest)

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        top = step * self.hi
        codes = log2_codes(x.float(), top, self.lo, self.hi)
        return F.straight_through(x, log2_levels(codes, top, self.hi))
