"""GDRQ: Scale-Clip and group-based quantization.

Yu et al., "Low-bit Quantization Needs Good Distribution", CVPR Workshops 2020, arXiv:1908.01477.
Scale-Clip: T = k * mean(|x|); weights in groups of filters with a threshold each; activations with a running average.
Ours, not the paper's: the default k, the momentum, the symmetric signed range, the four levels of 2 bits, the range of
activations, and that their mean leaves out zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from .. import functional as F
from ..errors import UserError
from ..kernels import Uniform
from ..typed import Bounds
from .activation import ActivationQuantizer, Statistics
from .base import OF_BITS, Stage
from .fixed_point import FixedPoint
from .following import FollowingQuantizer
from .registry import register
from .weight import WeightQuantizer

WEIGHT_K = {2: 2.0, 3: 3.0, 4: 4.5, 5: 5.0, 6: 5.5, 7: 6.0, 8: 7.0}
"""Default k for weights by bits (ours; only that of 4 bits was searched, docs/ablations.md). With the full range T
belongs to the code -2^(n-1), so there k is larger by 2^(n-1) / (2^(n-1) - 1), and the step the same."""

WEIGHT_K_WITHOUT_ZERO = {2: 1.875, 3: 2.5}
"""Default k where 0 is no level (ours); T is the outer level. About that of least squared error on Gaussian weights."""

ACTIVATION_K = {
    'unsigned': {2: 2.6, 3: 3.6, 4: 4.6, 5: 5.6, 6: 7.0, 7: 9.0, 8: 12.0},
    'signed': {2: 2.0, 3: 3.7, 4: 5.5, 5: 7.5, 6: 9.5, 7: 13.0, 8: 20.0},
    'zero_point': {2: 5.0, 3: 7.0, 4: 10.0, 5: 14.0, 6: 18.0, 7: 24.0, 8: 32.0},
}
"""Default k for activations by range and bits (ours; docs/ablations.md says for which bits there was a search). For
unsigned ones it is bits + 0.6, about where LSQ's learned thresholds end; 8 bits have levels to spare, and clip next to
nothing."""

INTERVAL = 100
"""Optimizer steps between two looks at the weights for what is not k * mean: a searched T, or the largest (ours)."""

IN_OUTER_CELL = 0.45
"""How far below the outer level the largest weight may lie for the default k (ours), in distances of two levels; the
cell ends at 0.5. With a larger k, levels would never be used: weights that are nearly uniform, as those of 1x1
convolutions often are, end at 2 to 4 times their mean. Within the outer cell the largest may still grow before it is
clipped. Projected weights end at T; there k is not lowered."""


def default_weight_k(bits: int, lo: int, hi: int) -> float:
    """The default k for codes from lo to hi."""
    return WEIGHT_K_WITHOUT_ZERO[bits] if hi >= 2 ** (bits - 1) else WEIGHT_K[bits] * -lo / hi


def limited_k(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """The default k, lowered until the largest weight, of the group where it is largest, takes the outer level."""
    lo, hi, mean = quantizer.lo, quantizer.hi, F.mean_abs(weight, quantizer.sizes)
    ratio = (F.max_abs(weight, quantizer.sizes) / torch.where(mean > 0, mean, 1)).amax()
    reach, most = ratio * -lo / (hi - IN_OUTER_CELL * quantizer.apart), default_weight_k(quantizer.bits, lo, hi)
    return torch.where(reach > 0, reach.clamp(max=most), most)


@register('gdrq', title='GDRQ')
class GDRQWeight(WeightQuantizer):
    """Weights by Scale-Clip in groups (docs/method.md, sections 2 and 3)."""

    default_groups = 4

    @dataclass(frozen=True)
    class Options(FixedPoint):
        k: Annotated[float, Bounds(0, 1000)] | None = field(default=None, metadata=OF_BITS)
        """T_g = k * mean(|w|) of the group. None: the default of the bits, or less, see `limited_k`."""
        clip: Literal['forward', 'project'] = 'forward'
        """'forward', clipped on the way into the layer, or 'project', clipped as stored after each optimizer step."""
        gradient: Literal['masked', 'straight_through'] = 'masked'
        """Of a clipped weight: 0 or 1."""
        threshold: Literal['scale_clip', 'search'] = 'scale_clip'
        """'scale_clip', or 'search', the T of least quantized loss."""
        levels: Literal['narrow', 'full', 'without_zero'] | None = field(default=None, metadata=OF_BITS)
        """Codes of n bits. 'narrow': -(2^(n-1) - 1) to 2^(n-1) - 1; 'full': -2^(n-1) too; 'without_zero', for 2 and 3
        bits: odd half steps, -3, -1, 1, 3 at 2 bits. None: 'without_zero' at 2 bits, else 'narrow'."""

    options: Options
    k: Tensor

    def __init_subclass__(cls) -> None:
        if cls.current_threshold is not GDRQWeight.current_threshold:  # kernels compute k * mean(|w|)
            cls.factor_of_mean = WeightQuantizer.factor_of_mean  # type: ignore[method-assign]

    def __init__(self, bits: int, *args: Any, **options: Any) -> None:
        super().__init__(bits, *args, **options)
        k = default_weight_k(bits, self.lo, self.hi) if self.options.k is None else self.options.k
        self.register_buffer('k', torch.tensor(k))  # a trained model keeps it, whatever the default becomes

    def code_range(self) -> tuple[int, int]:
        levels = self.options.levels or ('without_zero' if self.bits == 2 else 'narrow')
        top = 2**self.bits - 1
        return (-top, top) if levels == 'without_zero' else F.code_range(self.bits, True, levels == 'narrow')

    @classmethod
    def check_options(cls, bits: int, options: Mapping[str, Any], path: str) -> None:
        if options.get('levels') == 'without_zero' and bits not in WEIGHT_K_WITHOUT_ZERO:
            raise UserError(f"{path}.levels='without_zero' is for 2 and 3 bits, not for {bits}")

    def start_threshold(self, weight: Tensor) -> Tensor:
        if self.options.threshold == 'search':
            return F.search_threshold(weight, self.lo, self.hi, self.sizes, self.apart)
        if self.options.k is None and self.options.clip == 'forward':
            self.k.copy_(limited_k(self, weight))
        return F.scale_clip_threshold(weight, self.k, self.sizes)

    def current_threshold(self, weight: Tensor) -> Tensor:
        searched = self.options.threshold == 'search'
        return self.threshold if searched else F.scale_clip_threshold(weight, self.k, self.sizes)

    def factor_of_mean(self) -> float | None:
        simple = self.options.threshold == 'scale_clip' and not self.options.power_of_two
        return float(self.k) if simple and self.stage != Stage.FREEZE else None

    def reshape(self, weight: Tensor, threshold: Tensor) -> Tensor:
        # Projection has already clipped the stored weight.
        return weight if self.options.clip == 'project' else F.clip(weight, threshold, self.gradient)

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        if self.stage not in (Stage.RESHAPE, Stage.QUANTIZE):
            return None
        if (step + 1) % INTERVAL == 0:
            self.threshold.copy_(self.start_threshold(weight))
        return self.project(weight) if self.options.clip == 'project' else None

    def project(self, weight: Tensor) -> Tensor:
        """The filters clipped at T."""
        self.settle(weight)
        limit = self.spread(self.in_use(self.threshold))
        return torch.clamp(weight, -limit, limit)


@register('gdrq')
class GDRQActivation(FollowingQuantizer):
    """Activations by Scale-Clip with a running threshold (docs/method.md, section 2).

    T <- T + m * (k * mean(|x|) - T), once an optimizer step. The mean is that of the values that are not zero.
    """

    @dataclass(frozen=True)
    class Options(FixedPoint):
        k: Annotated[float, Bounds(0, 1000)] | None = field(default=None, metadata=OF_BITS)
        """None: ACTIVATION_K of the range and bits, but at most max|x| / mean(|x|) of the calibration (ours)."""
        momentum: Annotated[float, Bounds(0, 1)] = 0.01
        """m of the running average."""
        mean: Literal['all', 'nonzero'] = 'nonzero'
        """Over the elements that are not zero, as the default k wants, or over all: 4 bits need k = 12 then."""
        gradient: Literal['masked', 'straight_through'] = 'masked'
        """Of a clipped activation: 0 or 1."""

    options: Options

    def __init_subclass__(cls) -> None:
        if cls.measure is not GDRQActivation.measure:  # kernels measure as GDRQActivation does
            cls.uniform = ActivationQuantizer.uniform  # type: ignore[method-assign]

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.register_buffer('k', torch.zeros(()))

    def start_threshold(self, seen: Statistics) -> Tensor:
        k, mean = self.options.k, seen.mean if self.options.mean == 'all' else seen.nonzero_mean
        self.k.fill_(ACTIVATION_K[self.kind][self.bits] if k is None else k)
        if k is None and mean > 0:  # beyond the largest value there is nothing to clip: images, ReLU6
            self.k.clamp_(max=seen.largest / mean)
        return self.k * mean

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.sum_abs(x), x.numel() if self.options.mean == 'all' else (x != 0).sum()  # count_nonzero is slower

    def uniform(self) -> Uniform | None:
        sums, nonzero = self.sums if self.tracks() else None, self.options.mean == 'nonzero'
        return Uniform(self.threshold_in_use(), self.lo, self.hi, self.masked, sums, nonzero, max(-self.lo, self.hi))

    def reshape(self, x: Tensor, threshold: Tensor) -> Tensor:
        step = self.step()
        return F.clip(x, (self.hi * step).to(x.dtype), self.gradient, (self.lo * step).to(x.dtype))
