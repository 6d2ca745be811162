"""SYQ: binary or ternary weights with a learned scale for each place of the kernel.

Faraone et al., "SYQ: Learning Symmetric Quantization For Efficient Deep Neural Networks", CVPR 2018,
arXiv:1807.00301. w_q = alpha_p * q, where q is sign(w), or with two bits 0 where |w| <= 0.05 * max|w| of the layer,
and alpha_p is learned for each place p of the kernel ("pixel-wise"), starting at the mean |w| there. The gradient of
q is straight through, so that of a weight is alpha_p times that of w_q. The paper quantizes activations to fixed
levels: fixed point with the step 2^-f.
Deviations: activations are DoReFa's, whose fixed levels reach to 1; `groups` has no effect; row-wise and layer-wise
scales are left out.
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
from .base import Stage
from .dorefa import DoReFaActivation
from .registry import register
from .weight import WeightQuantizer


@register('syq', title='SYQ', activations=DoReFaActivation)
class SYQWeight(WeightQuantizer):
    """Weights -alpha_p, 0 and alpha_p."""

    uneven = 'SYQ has a scale for each place of the kernel'
    allowed_bits = range(1, 3)

    @dataclass(frozen=True)
    class Options:
        lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Learning rate of alpha, as a multiple of that of the weights."""

    def __init__(self, bits: int, shape: Sequence[int], groups: int | str | None = None, **options: Any) -> None:
        super().__init__(bits, shape, 1, **options)
        self.set_state(lo=-1, hi=1)
        places = math.prod(shape[2:])
        self.alpha = nn.Parameter(torch.ones(places))
        self.register_buffer('threshold', torch.zeros(places))

    def start(self, weight: Tensor) -> None:
        values = weight.abs().float().flatten(2) if len(self.shape) > 2 else weight.abs()
        mean = values.mean((0, 1))
        if not bool(torch.isfinite(mean).all()):  # the sum is beyond float32
            mean = values.double().mean((0, 1)).float()
        # a sign has no zero: with one bit a place of zeros keeps the scale 0
        self.alpha.data.copy_(mean if self.bits == 1 else F.nonzero_start(mean, weight))
        super().start(weight)

    def current_threshold(self, weight: Tensor) -> Tensor:
        return self.alpha.abs()

    def spread(self, values: Tensor) -> Tensor:
        """A value of each place of the kernel, shaped to broadcast against the weight."""
        return values.view(1, 1, *self.shape[2:])

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        sign = torch.where(weight >= 0, 1.0, -1.0)
        return sign if self.bits == 1 else sign * (weight.abs() > 0.05 * weight.abs().amax())

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        if self.stage == Stage.FREEZE:
            step = F.straight_through(0 * self.spread(self.alpha), step)  # DDP waits for its gradient
        return step * F.straight_through(weight, self.round(weight, step))
