"""LSQ+: LSQ with a learned offset for activations that are not zero at their lower end.

Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPR
Workshops 2020, arXiv:2004.09576. Activations, Eq. 3 to 6: Q(x) = s * round(clip((x - beta) / s, 0, 2^k - 1)) + beta
with gradients for s and beta; weights: symmetric, s starts at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(k-1) (section
3.3); activations start at the least squared error. The gradient scale of both is LSQ's.
Deviations: beta is rounded to whole steps, straight through, so that zero keeps a code: padding and merging into
integers need that. It is learned for inputs with a short negative tail (SiLU, GELU); unsigned inputs start and stay
at 0, signed ones are symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..typed import Bounds
from .activation import Statistics
from .base import Stage
from .fixed_point import FixedPoint
from .lsq import LearnedStepOptions, LSQActivation, LSQWeight
from .registry import register


@register('lsq_plus', title='LSQ+')
class LSQPlusWeight(LSQWeight):
    """Weights with a learned step that starts from the third standard deviation."""

    @dataclass(frozen=True)
    class Options(LearnedStepOptions, FixedPoint):  # type: ignore[override]  # without another start
        """Those of a learned step, which may be a power of two."""

    def start_threshold(self, weight: Tensor) -> Tensor:
        flat = weight.detach().double().flatten(1)
        count = self.sizes * flat.shape[1]
        mean = F.per_group(flat.sum(1), self.sizes) / count
        square = F.per_group(flat.square().sum(1), self.sizes) / count
        sigma = (square - mean.square()).clamp(min=0).sqrt()
        step = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (self.bits - 1)
        return (step * max(-self.lo, self.hi)).clamp(max=F.LARGEST).float()


@register('lsq_plus')
class LSQPlusActivation(LSQActivation):
    """Activations with a learned step and, beside a zero point, a learned offset."""

    keeps_samples = True

    @dataclass(frozen=True)
    class Options:
        lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Learning rate of step and offset, as a multiple of that of the weights."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.beta = nn.Parameter(torch.zeros(()))

    def start(self, observed: Tensor) -> None:
        super().start(observed)
        if self.kind == 'zero_point':
            self.beta.data.copy_(self.lo * self.learned_step.detach())

    def start_threshold(self, seen: Statistics) -> Tensor:
        assert self.samples is not None
        return F.search_activation_threshold(self.samples, seen.low, seen.high, self.kind, self.bits)

    def zero_point(self) -> Tensor:
        """The code that the offset stands for now, a scalar; `lo` is the number that `settle` last read from it."""
        step = self.learned_step.detach().abs()
        return (-self.beta / torch.where(step > 0, step, 1)).detach().round().clamp(1, (2**self.bits - 1) // 2)

    def learns_offset(self) -> bool:
        """Whether beta is in use and not frozen."""
        return self.calibrated and self.kind == 'zero_point' and self.stage != Stage.FREEZE

    def settle(self, *weight: Tensor) -> None:
        if self.learns_offset() and (zero_point := int(self.zero_point())) != -self.lo:
            self.set_range('zero_point', zero_point)
        super().settle()

    def after_step(self, step: int) -> None:
        if self.learns_offset():  # reads a number, so a GPU waits: with a zero point alone
            self.settle()

    def step(self) -> Tensor:
        if not self.learns_offset():
            return super().step()
        top = 2**self.bits - 1 - self.zero_point()
        return self.learned_step.abs() * top / top  # with the zero point of this moment, also where EMA changed it

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        if not self.learns_offset():
            return super().quantize(x, step + 0 * self.beta)  # DistributedDataParallel waits for its gradient
        levels = 2**self.bits - 1
        scale = (x[0].numel() * levels) ** -0.5
        learned, beta, zero_point = self.learned_step.abs(), self.beta, self.zero_point()
        step = F.straight_through(learned * scale, learned)  # scaled gradients
        low = F.straight_through(beta * scale, -zero_point * learned)
        high = F.straight_through(low + levels * step, (levels - zero_point) * learned)
        wide = x.float()
        inside = step * F.round_ste(wide / torch.where(step > 0, step, 1))
        clipped = torch.where(wide <= low, low, torch.where(wide >= high, high, inside))
        return clipped.to(x.dtype)
