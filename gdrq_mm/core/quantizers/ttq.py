"""TTQ: ternary weights with a learned scale for each sign.

Zhu et al., "Trained Ternary Quantization", ICLR 2017, arXiv:1612.01064. Eq. 6: w_t = W_p where w > delta, -W_n where
w < -delta, else 0; Eq. 9: delta = t * max|w|, t = 0.05; Eq. 7: W_p and W_n take the gradients of their weights; Eq.
8: the gradient of a weight is scaled by W_p, 1 or W_n.
The paper keeps activations in float; `quantization.method='ttq'` takes 'minmax' for them.
Deviations: the paper scales latent weights to [-1, 1] first; ours keep the scale of the float checkpoint, and so Eq.
8 reads W_p / max|w|, 1 and W_n / max|w|. W_p and W_n start at the mean |w| above delta. A pair for each group, if
`groups` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import Check, Stage, WeightQuantizer, nonzero_start, number


class TTQWeight(WeightQuantizer):
    """Weights -W_n, 0 and W_p.

    Args:
        t: delta = t * max|w| of the group.
        lr_mult: learning rate of W_p and W_n, as a multiple of that of the weights.
    """

    uneven = 'TTQ has a scale for each sign'

    allowed_bits = range(2, 3)

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(t=number(0, 1), lr_mult=number(0, 1000))

    def __init__(
        self, bits: int, channels: int, groups: int | str | None = None, t: float = 0.05, lr_mult: float = 1.0
    ) -> None:
        super().__init__(bits, channels, groups)
        self.t, self.lr_mult = t, lr_mult
        self.positive = nn.Parameter(torch.ones(self.groups))
        self.negative = nn.Parameter(torch.ones(self.groups))
        self.register_buffer('frozen', torch.zeros(2, self.groups))

    frozen: Tensor

    def _spread(self, values: Tensor, weight: Tensor) -> Tensor:
        return F.per_channel(values, self.sizes, weight.dim())

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return torch.sign(weight) * (weight.abs() > self._spread(self.t * F.max_abs(weight, self.sizes), weight))

    def calibrate(self, weight: Tensor) -> None:
        code = self.round(weight, weight)
        for sign, scale in ((1, self.positive), (-1, self.negative)):
            chosen = (code == sign).float()
            total = F.per_group((weight.abs() * chosen).flatten(1).sum(1), self.sizes)
            mean = total / F.per_group(chosen.flatten(1).sum(1), self.sizes).clamp(min=1)
            scale.data.copy_(nonzero_start(mean, weight))
        super().calibrate(weight)

    def threshold_of(self, weight: Tensor) -> Tensor:
        self.frozen.copy_(torch.stack([self.positive.detach().abs(), self.negative.detach().abs()]))
        return self.frozen.amax(0)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        code = self.round(weight, step)
        learned = torch.stack([self.positive.abs(), self.negative.abs()])
        if self.stage == Stage.FREEZE:
            learned = F.straight_through(0 * learned, self.frozen)
        up, down = (self._spread(values, weight) for values in learned)
        scaled = torch.where(code > 0, up, down).detach() / self._spread(F.max_abs(weight, self.sizes), weight)
        surrogate = weight * torch.where(code == 0, 1, scaled)
        value = torch.where(code > 0, up, torch.where(code < 0, -down, 0))
        return value + F.straight_through(surrogate, torch.zeros_like(surrogate))
