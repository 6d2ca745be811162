"""DoReFa: weights squashed by tanh onto fixed levels, activations clipped at 1.

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients", 2016,
arXiv:1606.06160. Eq. 9: w_q = 2 * quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, the gradient passes through tanh
and max; Eq. 11: a_q = quantize_k(clip(a, 0, 1)), where quantize_k(r) = round((2^k - 1) r) / (2^k - 1) is straight
through. 2^k levels without 0: the codes are the odd integers from -(2^k - 1) to 2^k - 1.
Deviations: gradients are not quantized; w_q is multiplied by a constant, so that mean|w_q| is the mean|w| of the
float checkpoint: the paper trains from scratch and batch normalization absorbs the scale, here there are layers
without it; so weights that are all zero stay so. Inputs below zero are clipped at the largest |x| of calibration.
8-bit layers (first, last and outputs, which are not the paper's) take the method 'minmax'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from .activation import ActivationQuantizer, Statistics
from .registry import register
from .weight import WeightQuantizer


@register('dorefa', title='DoReFa')
class DoReFaWeight(WeightQuantizer):
    """Weights by Eq. 9, with the maximum of each group."""

    allowed_bits = range(2, 8)
    keeps = False

    def __init__(self, bits: int, shape: Sequence[int], groups: int | str | None = None) -> None:
        super().__init__(bits, shape, groups)
        self.set_state(lo=1 - 2**bits, hi=2**bits - 1)

    def squashed(self, weight: Tensor) -> Tensor:
        """tanh(w) / max|tanh(w)|, in [-1, 1], in float32 or better."""
        squashed = torch.tanh(weight if weight.dtype == torch.float64 else weight.float())
        top = F.per_group(squashed.flatten(1).abs().amax(1), self.sizes, 'max')
        return squashed / self.spread(torch.where(top > 0, top, 1))

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return 2 * ((self.squashed(weight) / 2 + 0.5) * self.hi).round() - self.hi

    def start_threshold(self, weight: Tensor) -> Tensor:
        levels = self.round(weight, weight) / self.hi
        return F.mean_abs(weight, self.sizes) / F.mean_abs(levels, self.sizes)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        surrogate = self.squashed(weight) * (step * self.hi)
        return F.straight_through(surrogate, self.round(weight, step) * step)


@register('dorefa')
class DoReFaActivation(ActivationQuantizer):
    """Activations by Eq. 11."""

    allowed_bits = range(2, 8)

    def start_threshold(self, seen: Statistics) -> Tensor:
        return torch.ones_like(seen.high) if self.kind == 'unsigned' else seen.largest
