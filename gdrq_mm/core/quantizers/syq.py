"""SYQ: binary or ternary weights with a learned scale for each place of the kernel.

Faraone et al., "SYQ: Learning Symmetric Quantization For Efficient Deep Neural Networks", CVPR 2018,
arXiv:1807.00301. w_q = alpha_p * q, where q is sign(w), or with two bits 0 where |w| <= 0.05 * max|w| of the layer,
and alpha_p is learned for each place p of the kernel ("pixel-wise"), starting at the mean |w| there. The gradient of
q is straight through, so that of a weight is alpha_p times that of w_q. The paper quantizes activations to fixed
levels, as DoReFa does.
Deviations: `groups` has no effect; row-wise and layer-wise scales are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import Check, Stage, WeightQuantizer, nonzero_start, number


class SYQWeight(WeightQuantizer):
    """Weights -alpha_p, 0 and alpha_p.

    Args:
        kernel: size of the kernel, such as (3, 3), () for a linear layer.
        lr_mult: learning rate of alpha, as a multiple of that of the weights.
    """

    uneven = 'SYQ has a scale for each place of the kernel'

    allowed_bits = range(1, 3)
    by_place = True

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(lr_mult=number(0, 1000))

    def __init__(
        self,
        bits: int,
        channels: int,
        groups: int | str | None = None,
        kernel: Sequence[int] = (),
        lr_mult: float = 1.0,
    ) -> None:
        super().__init__(bits, channels, 1)
        self.set_state(lo=-1, hi=1)
        self.kernel, self.lr_mult = tuple(kernel), lr_mult
        self.alpha = nn.Parameter(torch.ones(math.prod(kernel)))
        self.register_buffer('threshold', torch.zeros(math.prod(kernel)))

    def calibrate(self, weight: Tensor) -> None:
        mean = weight.float().abs().flatten(2).mean((0, 1)) if self.kernel else weight.abs().mean()
        # a sign has no zero: with one bit a place of zeros keeps the scale 0
        self.alpha.data.copy_(mean if self.bits == 1 else nonzero_start(mean, weight))
        super().calibrate(weight)

    def threshold_of(self, weight: Tensor) -> Tensor:
        return self.alpha.abs()

    def step(self, weight: Tensor) -> Tensor:
        return self.current_threshold(weight).view(1, 1, *self.kernel)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        sign = torch.where(weight >= 0, 1.0, -1.0)
        return sign if self.bits == 1 else sign * (weight.abs() > 0.05 * weight.abs().amax())

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        if self.stage == Stage.FREEZE:
            step = F.straight_through(0 * self.alpha.view_as(step), step)  # DDP waits for its gradient
        return step * F.straight_through(weight, self.round(weight, step))
