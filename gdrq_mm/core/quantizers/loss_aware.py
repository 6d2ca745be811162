"""Loss-aware quantization: the step of least error, where a weight counts as much as the loss curves along it.

Hou and Kwok, "Loss-aware Weight Quantization of Deep Networks", ICLR 2018, arXiv:1802.08635. The step d and the codes c
of a layer minimize sum_i h_i (w_i - d c_i)^2, where h is the diagonal of the curvature, taken from Adam: the root of
its second moment, the running mean of squared gradients. They are found by turns: the codes nearest to w / d, then
d = sum(h c w) / sum(h c^2), from the last d on. The gradient of a weight is that of the quantized one.
The text of the paper was not at hand. It keeps activations in float; `quantization.method='loss_aware'` takes 'minmax'
for them.
Deviations: optimizers other than Adam keep no second moment, so with each of them we keep one of our own, of the
gradients of the quantized weights of every 10th step, each divided by its mean square, as only ratios matter here. A
weight without gradients counts a little, so that no sum is empty. The first d is that of a search without h. In a
compiled model no gradients are seen, and all weights count the same. A step for each group, if `groups` says so.
ELQ (Zhou et al., CVPR 2018), which adds the change of the loss to INQ's portions, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..compat import is_compiling
from ..ranks import all_reduce
from .base import Stage
from .fixed_point import FixedPoint
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer

INTERVAL = 10
"""Optimizer steps between two looks at the gradient (ours): processes add it up then, as large as the weights."""
DECAY = 0.99
"""Of the second moment, from look to look: after 10 looks as much as Adam's 0.999 after 100 steps (ours)."""
LEAST = 1e-3
"""What each weight counts at least, where their mean square root is 1 (ours)."""


@register('loss_aware', title='Loss-aware', activations=MinMaxActivation)
class LossAwareWeight(WeightQuantizer):
    """Weights with the step of least error in the curvature's measure."""

    @dataclass(frozen=True)
    class Options(FixedPoint):
        """Those of a step that may be a power of two."""

    second: Tensor
    """Running mean of squared gradients, in the shape of the filters; only training reads it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer('second', torch.zeros(self.shape))

    def start_threshold(self, weight: Tensor) -> Tensor:
        first = F.nonzero_start(F.search_threshold(weight, self.lo, self.hi, self.sizes), weight)
        return F.refit_threshold(weight, first, self.lo, self.hi, self.sizes, rounds=10)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        out = F.straight_through(weight, self.round(weight, step) * step)
        if self.trains and self.stage == Stage.QUANTIZE and out.requires_grad and not is_compiling():
            out.register_hook(self._note)
        return out

    def _note(self, gradient: Tensor) -> None:
        self.pending = gradient if self.pending is None else self.pending + gradient

    def after_step(self, weight: Tensor, step: int) -> None:
        gradient, self.pending = self.pending, None
        if self.stage != Stage.QUANTIZE or (step + 1) % INTERVAL:
            return
        gradient = torch.zeros(self.shape, device=weight.device) if gradient is None else gradient.float()
        all_reduce(gradient, 'sum')
        square = gradient.double().square()
        mean = square.mean()
        if_any = (mean > 0) & torch.isfinite(mean)
        moved = DECAY * self.second + (1 - DECAY) * (square / torch.where(if_any, mean, 1)).float()
        self.second.copy_(torch.where(if_any, moved, self.second))
        args = weight, self.threshold, self.lo, self.hi, self.sizes, self.importance()
        self.threshold.copy_(F.refit_threshold(*args, rounds=2))

    def importance(self) -> Tensor:
        """h: the square root of the second moment, in the shape of the filters."""
        root = self.second.sqrt()
        mean = root.mean()
        return root + LEAST * torch.where(mean > 0, mean, 1)
