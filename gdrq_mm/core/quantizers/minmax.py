"""Min-max: the range is that of the values, as in most toolkits.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877, section 3.1: weights by their largest |w| at each step, activations by moving averages of their
extremes. Weights per channel, as Krishnamoorthi, arXiv:1806.08342, section 3.1.3, recommends and as torch.ao does.
Deviations: symmetric weights; the zero point of activations stays what calibration found, so only T moves; ranks share
one average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..kernels import Uniform, fake_quantize
from .activation import Statistics
from .base import Stage
from .fixed_point import FixedPoint
from .following import FollowingQuantizer
from .registry import register
from .weight import WeightQuantizer

NO_END = 2**20
"""A code that no value reaches."""


@register('minmax', title='min-max')
class MinMaxWeight(WeightQuantizer):
    """Weights with T = max|w| of each group, by default of each filter."""

    default_groups = 'channel'
    steps_up = True

    @dataclass(frozen=True)
    class Options(FixedPoint):
        """Those of a step that may be a power of two."""

    def current_threshold(self, weight: Tensor) -> Tensor:
        return F.max_abs(weight, self.sizes)

    @property
    def masked(self) -> bool:
        # Nothing is beyond the largest |w|, but hi * (T / hi) may be rounded to less than T, which would mask it.
        return self.stage == Stage.FREEZE


@register('minmax')
class MinMaxActivation(FollowingQuantizer):
    """Activations with a running largest |x|, T <- T + m * (max|x| - T); m is 0.01 as in torch.ao."""

    largest = True
    steps_up = True

    @dataclass(frozen=True)
    class Options(FollowingQuantizer.Options, FixedPoint):
        """Those of both."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.register_buffer('k', torch.ones(()), persistent=False)

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high).float(), 1


class AttentionWeights(MinMaxActivation):
    """What softmax makes: unsigned, T follows the largest value, which counts as 1 at most. For all methods (ours).

    A method that clips by the mean, as Scale-Clip, would clip what attention looks at most. In training codes have no
    end: dropout divides what it keeps by 1 - p, and a clipped one would be less on average than in evaluation. So what
    is larger than in the batches before is clipped in evaluation alone.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits, 'unsigned')

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        hi = NO_END if self.trains else self.hi
        return fake_quantize(x, Uniform(step, self.lo, hi, self.masked))

    def start_threshold(self, seen: Statistics) -> Tensor:
        return super().start_threshold(seen).clamp(max=1)

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        largest, count = super().measure(x)
        return largest.clamp(max=1), count
