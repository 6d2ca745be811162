"""LSQ: the step size is learned by gradient.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
Eq. 1 to 3: Q(v) = s * round(clip(v / s, -Qn, Qp)) with dQ/ds = -Qn, Qp, or round(v/s) - v/s inside the range; section
2.1: s starts at 2 <|v|> / sqrt(Qp); section 2.2: its gradient is scaled by 1 / sqrt(N * Qp), N the weights of the
layer or the features of one image (of one region in the layers of a box head).
Deviations: a step for each group of filters if `groups` says so; activations start from all calibration batches, not
from the first training batch; inputs below zero get signed codes without the lowest, -2^(n-1), those with a short
negative tail a zero point that stays what calibration found, and Qp is then the largest code. Steps take no weight
decay (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from .. import functional as F
from ..typed import Bounds
from .activation import ActivationQuantizer, Statistics
from .fixed_point import FixedPoint
from .gdrq import limited_k
from .registry import register
from .weight import WeightQuantizer


@dataclass(frozen=True)
class LearnedStepOptions:
    """Options of weights with a learned step."""

    narrow_range: bool = False
    """Leave out the code -2^(n-1); the paper has it."""
    lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
    """Learning rate of the step, as a multiple of that of the weights."""


@register('lsq', title='LSQ')
class LSQWeight(WeightQuantizer):
    """Weights with a learned step in each group."""

    @dataclass(frozen=True)
    class Options(LearnedStepOptions, FixedPoint):
        start: Literal['lsq', 'scale_clip'] = 'lsq'
        """Where the step starts: as in the paper, or at the T of Scale-Clip with GDRQ's default k (ours)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.learned_step = nn.Parameter(torch.ones(self.groups))

    def start(self, weight: Tensor) -> None:
        top = max(-self.lo, self.hi)
        self.learned_step.data.copy_(F.nonzero_start(self.start_threshold(weight), weight) / top)
        self.threshold.copy_(self.current_threshold(weight).detach())
        self.set_state(calibrated=True)

    def start_threshold(self, weight: Tensor) -> Tensor:
        if self.options.start == 'scale_clip':
            return F.scale_clip_threshold(weight, limited_k(self, weight), self.sizes)
        return (2 * F.mean_abs(weight, self.sizes) / self.hi**0.5 * max(-self.lo, self.hi)).clamp(max=F.LARGEST)

    def current_threshold(self, weight: Tensor) -> Tensor:
        return self.learned_step.abs() * max(-self.lo, self.hi)  # abs: a step that crosses 0 goes on learning

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return self.learn(weight, step, self.spread((self.sizes * weight[0].numel() * self.hi) ** -0.5))


@register('lsq')
class LSQActivation(ActivationQuantizer):
    """Activations with a learned step."""

    @dataclass(frozen=True)
    class Options(FixedPoint):
        lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Learning rate of the step, as a multiple of that of the weights."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.learned_step = nn.Parameter(torch.ones(()))

    def start(self, observed: Tensor) -> None:
        super().start(observed)
        if self.calibrated:
            self.learned_step.data.copy_(F.step_size(self.threshold, self.lo, self.hi))

    def start_threshold(self, seen: Statistics) -> Tensor:
        return 2 * seen.mean / self.hi**0.5 * max(-self.lo, self.hi)

    def current_threshold(self) -> Tensor:
        return self.learned_step.abs() * max(-self.lo, self.hi)

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        return self.learn(x, step, (x[0].numel() * self.hi) ** -0.5)
