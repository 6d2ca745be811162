"""FGQ: ternary weights with a scale for every few of them.

Mellempudi et al., "Ternary Neural Networks with Fine-Grained Quantization", 2017, arXiv:1705.01462. A trained network
gets ternary weights in groups of N weights, N = 4 or 64, and activations of 4 or 8 bits; with N = 64 it is trained on.
Of the paper only the abstract was at hand; the rest is ours:
a group is N weights of a filter along the input channels, at one place of the kernel. In it w_t = alpha * sign(w) for
the k largest |w|, else 0, with alpha their mean, and the k of least squared error: that of the largest
(sum of the k largest)^2 / k. The gradient is straight through. `groups` has no effect; `quantization.method='fgq'`
takes 'minmax' for activations. A layer with fewer input channels than N, such as a depthwise one, is cut along all
weights of a filter: a group of one weight would be that weight in float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..typed import Bounds
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer


@register('fgq', title='FGQ', activations=MinMaxActivation)
class FGQWeight(WeightQuantizer):
    """Weights -alpha, 0 and alpha."""

    uneven = 'FGQ has several scales in a filter, along the input channels, and a channel has one multiplier'
    allowed_bits = range(2, 3)

    @dataclass(frozen=True)
    class Options:
        n: Annotated[int, Bounds(1, closed=True)] = 4
        """N, the weights of a group; at most, where N does not divide them."""

    def __init__(self, bits: int, shape: Sequence[int], groups: int | str | None = None, **options: Any) -> None:
        super().__init__(bits, shape, 1, **options)
        channels = shape[1] if shape[1] >= self.options.n else math.prod(shape[1:])
        self.rows = shape[0], channels, math.prod(shape[1:]) // max(channels, 1)
        """Filters, weights that are cut into groups, and places where that is done."""
        self.count = math.ceil(channels / self.options.n)
        self.each = math.ceil(channels / max(self.count, 1))
        self.register_buffer('threshold', torch.zeros(shape[0], self.count, self.rows[2]))

    def current_threshold(self, weight: Tensor) -> Tensor:
        rows = weight.detach().abs().double().reshape(self.rows)
        parts = nn.functional.pad(rows, (0, 0, 0, self.count * self.each - rows.shape[1]))
        largest = parts.unflatten(1, (self.count, self.each)).sort(2, descending=True).values
        numbers = torch.arange(1, self.each + 1, device=weight.device).view(-1, 1)
        means = largest.cumsum(2) / numbers
        best = (means.square() * numbers).argmax(2, keepdim=True)
        return means.gather(2, best).squeeze(2).float()

    def spread(self, values: Tensor) -> Tensor:
        """A value of each group, in the shape of the weight."""
        return values.repeat_interleave(self.each, 1)[:, : self.rows[1]].reshape(self.shape)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight, self.round(weight, step) * step)
