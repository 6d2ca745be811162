"""TTQ: ternary weights with a learned scale for each sign.

Zhu et al., "Trained Ternary Quantization", ICLR 2017, arXiv:1612.01064. Eq. 6: w_t = W_p where w > delta, -W_n where
w < -delta, else 0; Eq. 9: delta = t * max|w|, t = 0.05; Eq. 7: W_p and W_n take the gradients of their weights; Eq.
8: the gradient of a weight is scaled by W_p, 1 or W_n.
The paper keeps activations in float; `quantization.method='ttq'` takes 'minmax' for them.
Deviations: the paper scales latent weights to [-1, 1] first; ours keep the scale of the float checkpoint, and so Eq.
8 reads W_p / max|w|, 1 and W_n / max|w|. W_p and W_n start at the mean |w| above delta. Eq. 7 gives W_n the
gradient of its weights; ours has the other sign, as d(-W_n)/dW_n = -1. A pair for each group, if
`groups` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..typed import Bounds
from .base import Stage
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer


@register('ttq', title='TTQ', activations=MinMaxActivation)
class TTQWeight(WeightQuantizer):
    """Weights -W_n, 0 and W_p."""

    uneven = 'TTQ has a scale for each sign'
    allowed_bits = range(2, 3)

    frozen: Tensor
    """W_p and W_n as they were last saved or frozen, (2, G); T is the larger one."""

    @dataclass(frozen=True)
    class Options:
        t: Annotated[float, Bounds(0, 1)] = 0.05
        """delta = t * max|w| of the group."""
        lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Learning rate of W_p and W_n, as a multiple of that of the weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.positive = nn.Parameter(torch.ones(self.groups))
        self.negative = nn.Parameter(torch.ones(self.groups))
        self.register_buffer('frozen', torch.zeros(2, self.groups))

    @property
    def scale_count(self) -> int:
        return self.frozen.numel()

    def start(self, weight: Tensor) -> None:
        code = self.round(weight, weight)
        for sign, scale in ((1, self.positive), (-1, self.negative)):
            mean = F.mean_of_chosen(weight, code == sign, self.sizes)
            scale.data.copy_(F.nonzero_start(mean, weight))
        super().start(weight)

    def scales(self) -> Tensor:
        """W_p and W_n, (2, G)."""
        return torch.stack([self.positive.abs(), self.negative.abs()])

    def current_threshold(self, weight: Tensor) -> Tensor:
        return self.scales().detach().amax(0)

    @torch.no_grad()
    def settle(self, *weight: Tensor) -> None:
        super().settle(*weight)
        if self.calibrated and self.stage != Stage.FREEZE:
            self.frozen.copy_(self.scales())

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return torch.sign(weight) * (weight.abs() > self.spread(self.options.t * F.max_abs(weight, self.sizes)))

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        code = self.round(weight, step)
        learned = self.scales()
        if self.stage == Stage.FREEZE:
            learned = F.straight_through(0 * learned, self.frozen)
        up, down = (self.spread(values) for values in learned)
        top = self.spread(F.max_abs(weight, self.sizes))
        scaled = torch.where(code > 0, up, down).detach() / torch.where(top > 0, top, 1)
        surrogate = weight * torch.where(code == 0, 1, scaled)
        value = torch.where(code > 0, up, torch.where(code < 0, -down, 0))
        return value + F.straight_through(surrogate, torch.zeros_like(surrogate))
