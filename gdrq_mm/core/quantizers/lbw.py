"""LBW-Net: weights are powers of two with a least-squares scale.

Yin et al., "Quantization and Training of Low Bit-Width Convolutional Neural Networks for Object Detection", 2016,
arXiv:1612.06052. Weights become zero or powers of two, w_q = 2^s q, by minimizing ||w - w_q|| in each forward: exactly
for 2 bits, for more by a thresholding scheme with one free parameter mu. Of the paper only the abstract was at hand;
the rest is ours:
q is one of 0 and +-2^-t, t = 0 to n - 1, with n = 2^(b-2). For b = 2 we try each s near the largest |w|, as the best q
for a given s is the nearest. For more bits q = 1 where |w| >= mu, 2^-t where mu 2^-t <= |w| < mu 2^(1-t), the
smallest from 2/3 of that on, and s = floor(log2(4/3 sum(q w) / sum(q^2))), the best for these q. The gradient is
straight through. A scale for each group, if `groups` says so; `quantization.method='lbw'` takes 'minmax' for
activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from .. import functional as F
from ..typed import Bounds
from .log2 import log2_levels
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer


def power_codes(x: Tensor, top: Tensor, hi: int) -> Tensor:
    """0, or sign(x) * c for the nearest of the levels top * 2^(c - hi), c from 1 to hi; the larger one at a tie."""
    ends = torch.exp2(torch.arange(1 - hi, 1, dtype=torch.float32, device=x.device)) * 0.75  # between two levels
    ends[0] = 2.0**-hi  # between 0 and the smallest
    ratio = x.detach().float().abs() / torch.where(top > 0, top, 1)
    return torch.sign(x.detach()) * torch.bucketize(ratio, ends, right=True) * (top > 0)


class PowerWeight(WeightQuantizer):
    """Weights 0 and +-top * 2^-t for 2^(b-2) exponents t; T is the largest level."""

    allowed_bits = range(2, 7)

    def code_range(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 2)), 2 ** (self.bits - 2)

    @property
    def uneven(self) -> str | None:  # type: ignore[override]
        """One or two powers of two, of 2 and 3 bits, are 0, 1 and 2 times a step."""
        return None if self.hi <= 2 else 'with more than 3 bits powers of two are not whole multiples of one step'

    def levels(self, codes: Tensor, step: Tensor) -> Tensor:
        """The weights that codes stand for."""
        return log2_levels(codes, step * self.hi, self.hi)


@register('lbw', title='LBW-Net', activations=MinMaxActivation)
class LBWWeight(PowerWeight):
    """Weights with the power-of-two scale of least squared error in each group."""

    @dataclass(frozen=True)
    class Options:
        mu: Annotated[float, Bounds(0, 1)] = 0.75
        """The free parameter as a multiple of max|w|, for 3 bits and more. 3/4 is the middle of the two largest levels,
        if the largest is max|w|."""

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        """Not with 3 bits: what lies at the scale may be below the cut at mu, which is a part of max|w|."""
        return self.hi == 1

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        top = step if self.hi == 1 else self.spread(4 / 3 * self.options.mu * F.max_abs(weight, self.sizes))
        return power_codes(weight, top, self.hi)

    def current_threshold(self, weight: Tensor) -> Tensor:
        weight = weight.detach().float()
        if self.hi == 1:
            return self._best_scale(weight)
        q = self.levels(self.round(weight, weight), weight.new_tensor(1 / self.hi)).double()
        product = F.per_group((q * weight).flatten(1).sum(1), self.sizes)
        square = F.per_group((q * q).flatten(1).sum(1), self.sizes)
        return F.power_of_two((product / torch.where(square > 0, square, 1)).float(), 'linear').clamp(max=F.LARGEST)

    def _best_scale(self, weight: Tensor) -> Tensor:
        top = F.power_of_two(F.max_abs(weight, self.sizes), 'up').clamp(max=F.LARGEST)
        best, least = top, torch.zeros_like(top, dtype=torch.float64)
        for scale in (top * 2.0**-i for i in range(12)):  # below, it would take millions of small weights to matter
            value = self.spread(scale).double() * power_codes(weight, self.spread(scale), 1)
            error = F.per_group((value * (value - 2 * weight)).flatten(1).sum(1), self.sizes)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight, self.levels(self.round(weight, step), step))
