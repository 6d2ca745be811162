"""LSQ: the step size is learned by gradient.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
Eq. 1 to 3: Q(v) = s * round(clip(v / s, -Qn, Qp)) with dQ/ds = -Qn, Qp, or round(v/s) - v/s inside the range; section
2.1: s starts at 2 <|v|> / sqrt(Qp); section 2.2: its gradient is scaled by 1 / sqrt(N * Qp), N the weights of the
layer or the features of one image (of one region in the layers of a box head).
Deviations: a step for each group of filters if `groups` says so; activations start from all calibration batches, not
from the first training batch; inputs below zero get signed codes without the lowest, -2^(n-1), those with a short
negative tail a zero point that stays what calibration found. Steps take no weight decay (ours).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import ActivationQuantizer, Check, WeightQuantizer, nonzero_start, number, one_of


def lsq_scale(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """Gradient scale 1 / sqrt(N * Qp) with the N of each group, shaped to broadcast against the weight."""
    scale = (quantizer.sizes * weight[0].numel() * quantizer.hi) ** -0.5
    return F.per_channel(scale, quantizer.sizes, weight.dim())


class LSQWeight(WeightQuantizer):
    """Weights with a learned step in each group.

    Args:
        narrow_range: leave out the code -2^(n-1); the paper has it.
        lr_mult: learning rate of the step, as a multiple of that of the weights.
    """

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(narrow_range=one_of(True, False), lr_mult=number(0, 1000))

    def __init__(
        self,
        bits: int,
        channels: int,
        groups: int | str | None = None,
        narrow_range: bool = False,
        lr_mult: float = 1.0,
    ) -> None:
        super().__init__(bits, channels, groups, narrow_range)
        self.lr_mult = lr_mult
        self.learned_step = nn.Parameter(torch.ones(self.groups))

    def start_step(self, weight: Tensor) -> Tensor:
        """The step of each group before training, (G,)."""
        return 2 * F.mean_abs(weight, self.sizes) / self.hi**0.5

    def calibrate(self, weight: Tensor) -> None:
        top = max(-self.lo, self.hi)
        self.learned_step.data.copy_(nonzero_start(self.start_step(weight) * top, weight) / top)
        super().calibrate(weight)

    def threshold_of(self, weight: Tensor) -> Tensor:
        return self.learned_step.abs() * max(-self.lo, self.hi)  # abs: a step that crosses 0 goes on learning

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return self.learn(weight, step, lsq_scale(self, weight))


class LSQActivation(ActivationQuantizer):
    """Activations with a learned step.

    Args:
        lr_mult: learning rate of the step, as a multiple of that of the weights.
    """

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(lr_mult=number(0, 1000))

    def __init__(self, bits: int, range: str = 'auto', lr_mult: float = 1.0) -> None:
        super().__init__(bits, range)
        self.lr_mult = lr_mult
        self.learned_step = nn.Parameter(torch.ones(()))

    def start_threshold(self, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return 2 * mean / self.hi**0.5 * max(-self.lo, self.hi)

    def calibrate(self, observed: Tensor) -> None:
        super().calibrate(observed)
        if self.calibrated:
            self.learned_step.data.copy_(F.step_size(self.threshold, self.lo, self.hi))

    def current_threshold(self) -> Tensor:
        return self.learned_step.abs() * max(-self.lo, self.hi)

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        return self.learn(x, step, (x[0].numel() * self.hi) ** -0.5)
