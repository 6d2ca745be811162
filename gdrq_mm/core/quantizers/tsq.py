"""TSQ: sparse activations first, then weights by alternating least squares.

Wang et al., "Two-Step Quantization for Low-bit Neural Networks", CVPR 2018. First step: the network is trained with
weights in float and activations that are quantized and sparse, as small ones become 0. Second step: given these
activations, weights become ternary by an iterative solution of a least-squares problem. The paper's main case has
activations of 2 bits. Of the paper only the abstract was at hand; the rest is ours:
Activations: x is 0 up to epsilon, beyond it the nearest of d, 2d, ..., T. For the standard normal distribution epsilon
is the quantile that `sparsity` names, and d has the least squared error beyond epsilon; an input has its sigma, from
a running mean(|x|). Signed inputs are treated so on both sides; a short negative tail becomes 0. The gradient is that
of a clipped ReLU.
Weights: alpha * c in each group, c in {-1, 0, 1}. By turns c is the nearest to w / alpha, and alpha = sum(c w) /
sum(c^2), one turn after each step. The paper fits the outputs of a layer; this fits its weights, which train on,
straight through. They are float in training up to the fraction `weights_from`, but for its first step. Evaluation
rounds them, and so does a loop that tells no progress (`after_step`).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import functional as F
from ..typed import Bounds
from .activation import Statistics
from .base import Stage
from .following import FollowingQuantizer
from .registry import register
from .weight import WeightQuantizer


@functools.cache
def sparse_step(levels: int, epsilon: float) -> float:
    """The step of least squared error on x > epsilon, x standard normal, for this many levels above 0."""
    x = torch.linspace(epsilon, epsilon + 6, 3001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)

    def error(step: float) -> float:
        return float(((step * (x / step).round().clamp(1, levels) - x).square() * density).sum())

    return min((i / (200 * levels) for i in range(100, 1201)), key=error)  # T from 0.5 to 6


@register('tsq', title='TSQ')
class TSQWeight(WeightQuantizer):
    """Weights -alpha, 0 and alpha, from a fraction of the training on."""

    allowed_bits = range(2, 3)

    rounding: Tensor
    """Whether weights are rounded in training, 0 or 1; a scalar, int8, saved: a resumed training goes on as it was."""

    @dataclass(frozen=True)
    class Options:
        weights_from: Annotated[float, Bounds(0, 1, closed=True)] = 0.5
        """Fraction of the training from which weights are quantized."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer('rounding', torch.ones((), dtype=torch.int8))

    def start_threshold(self, weight: Tensor) -> Tensor:
        first = F.nonzero_start(F.search_threshold(weight, self.lo, self.hi, self.sizes), weight)
        return F.refit_threshold(weight, first, self.lo, self.hi, self.sizes, rounds=10)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        value = self.round(weight, step) * step
        if self.trains and self.stage != Stage.FREEZE:
            value = torch.where(self.rounding > 0, value, weight)
        return F.straight_through(weight, value)

    def after_step(self, weight: Tensor, step: int) -> None:
        if self.stage == Stage.FREEZE:
            return
        if self.progress is not None:
            self.rounding.fill_(int(self.progress >= self.options.weights_from))
        self.threshold.copy_(F.refit_threshold(weight, self.threshold, self.lo, self.hi, self.sizes))


@register('tsq')
class TSQActivation(FollowingQuantizer):
    """Activations that are 0 up to epsilon; T = hi * step is k * mean(|x|), so it follows as HWGQ's does."""

    allowed_bits = range(2, 8)
    uneven = 'TSQ rounds small inputs to 0, not to the nearest level'

    cut: Tensor
    """epsilon as a multiple of d, a scalar."""

    @dataclass(frozen=True)
    class Options(FollowingQuantizer.Options):
        sparsity: Annotated[float, Bounds(0.5, 0.99, closed=True)] = 0.625
        """Share of a Gaussian, what goes into a ReLU, that becomes 0; with 0.5 the ReLU's share."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.register_buffer('k', torch.zeros(()))
        self.register_buffer('cut', torch.zeros(()))

    def set_range(self, kind: str, zero_point: int = 1) -> None:
        super().set_range('unsigned' if kind == 'zero_point' else kind)

    def start_threshold(self, seen: Statistics) -> Tensor:
        sigma = math.sqrt(math.pi / 2 if self.kind == 'signed' else 2 * math.pi)  # times mean(|x|)
        epsilon = NormalDist().inv_cdf(self.options.sparsity)
        step = sparse_step(self.hi, epsilon)
        self.k.fill_(self.hi * step * sigma)
        self.cut.fill_(epsilon / step)
        return self.k * seen.mean

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.sum_abs(x), x.numel()

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        size = x.detach().abs().float()
        levels = F.fake_quantize(torch.maximum(size, step), step, 0, self.hi)  # beyond epsilon at least the first
        value = torch.sign(x.detach()).clamp(min=self.lo) * torch.where(size > self.cut * step, levels, 0)
        return F.straight_through(F.clip(x, step * self.hi, low=step * self.lo), value)
