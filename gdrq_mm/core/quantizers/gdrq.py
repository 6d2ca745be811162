"""GDRQ: Scale-Clip and group-based quantization.

Yu et al., "Low-bit Quantization Needs Good Distribution", CVPR Workshops 2020, arXiv:1908.01477.
Scale-Clip: T = k * mean(|x|); weights in groups of filters with a threshold each; activations with a running average.
Ours, not the paper's: the default k, the momentum, the symmetric signed range, the range of activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import Check, Stage, WeightQuantizer, nonzero_start, number, one_of
from .following import FollowingQuantizer
from .lsq import lsq_scale

WEIGHT_K = {2: 2.0, 3: 3.0, 4: 3.5, 5: 4.5, 6: 5.5, 7: 6.0, 8: 7.0}
"""Default k for weights by bits (ours; docs/ablations.md says for which bits there was a search). With the full range T
belongs to the code -2^(n-1), so there k is larger by 2^(n-1) / (2^(n-1) - 1), and the step the same."""

ACTIVATION_K = {
    'unsigned': {2: 6.0, 3: 9.0, 4: 12.0, 5: 14.0, 6: 16.0, 7: 20.0, 8: 24.0},
    'signed': {2: 2.0, 3: 3.7, 4: 5.5, 5: 7.5, 6: 9.5, 7: 13.0, 8: 20.0},
    'zero_point': {2: 5.0, 3: 7.0, 4: 10.0, 5: 14.0, 6: 18.0, 7: 24.0, 8: 32.0},
}
"""Default k for activations by range and bits (ours; docs/ablations.md says for which bits there was a search). Of few
bits k is about that of least squared error on the inputs of real models; 8 bits have levels to spare, and clip next to
nothing."""

SEARCH_INTERVAL = 100
"""Optimizer steps between two searches of the weight threshold (ours)."""


class GDRQWeight(WeightQuantizer):
    """Weights by Scale-Clip in groups (docs/method.md, sections 2 and 3).

    Args:
        k: T_g = k * mean(|w|) of the group. None: WEIGHT_K.
        clip: 'forward', clipped on the way into the layer, or 'project', the stored weights are clipped after each
            optimizer step.
        gradient: of a clipped weight: 'masked' (0) or 'straight_through' (1).
        threshold: 'scale_clip'; 'search', the T of least quantized loss; 'learned', the step by gradient, as LSQ does.
        narrow_range: leave out the code -2^(n-1).
    """

    bits_options = ('k',)
    default_groups = 4

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(
            k=number(0, 1000, none=True),
            clip=one_of('forward', 'project'),
            gradient=one_of('masked', 'straight_through'),
            threshold=one_of('scale_clip', 'search', 'learned'),
            narrow_range=one_of(True, False),
        )

    def __init__(
        self,
        bits: int,
        channels: int,
        groups: int | str | None = None,
        k: float | None = None,
        clip: str = 'forward',
        gradient: str = 'masked',
        threshold: str = 'scale_clip',
        narrow_range: bool = True,
    ) -> None:
        super().__init__(bits, channels, groups, narrow_range)
        self.given_k, self.clip, self.gradient, self.source = k, clip, gradient, threshold
        if threshold == 'learned':
            self.learned_step = nn.Parameter(torch.ones(self.groups))

    @property
    def k(self) -> float:
        """The k in use."""
        return WEIGHT_K[self.bits] * -self.lo / self.hi if self.given_k is None else self.given_k

    @property
    def rule(self) -> str:
        return f'GDRQWeight with {f"k = {self.k:g}" if self.source == "scale_clip" else f"a {self.source} threshold"}'

    def threshold_of(self, weight: Tensor) -> Tensor:
        if self.source == 'learned':
            return self.learned_step.abs() * max(-self.lo, self.hi)  # abs: a step that crosses 0 goes on learning
        if self.source == 'search':
            return self.threshold
        return F.scale_clip_threshold(weight, self.k, self.sizes)

    def calibrate(self, weight: Tensor) -> None:
        start = F.scale_clip_threshold(weight, self.k, self.sizes)
        if self.source == 'search':
            start = F.search_threshold(weight, self.lo, self.hi, self.sizes)
        elif self.source == 'learned':
            start = nonzero_start(start, weight)
            self.learned_step.data.copy_(F.step_size(start, self.lo, self.hi))
        self.threshold.copy_(start)
        self.set_state(calibrated=True)

    def reshape(self, weight: Tensor, threshold: Tensor) -> Tensor:
        # Projection has already clipped the stored weight.
        return weight if self.clip == 'project' else F.clip(weight, threshold, self.gradient)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        if self.source == 'learned':
            return self.learn(weight, step, lsq_scale(self, weight))
        return F.fake_quantize(weight, step, self.lo, self.hi, self.gradient)

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        if self.stage not in (Stage.RESHAPE, Stage.QUANTIZE) or (self.clip == 'forward' and self.source != 'search'):
            return None  # the next forward computes T itself
        if self.source == 'search' and (step + 1) % SEARCH_INTERVAL == 0:
            self.threshold.copy_(F.search_threshold(weight, self.lo, self.hi, self.sizes))
        threshold = self.threshold_of(weight).detach()
        self.threshold.copy_(threshold)
        if self.clip == 'forward':
            return None
        limit = F.per_channel(threshold, self.sizes, weight.dim())
        return torch.clamp(weight, -limit, limit)


class GDRQActivation(FollowingQuantizer):
    """Activations by Scale-Clip with a running threshold, T <- T + m * (k * mean(|x|) - T) (docs/method.md, section 2).

    Args:
        k: None: ACTIVATION_K of the range and bits, but at most max|x| / mean(|x|) of the calibration (ours).
        momentum: m of the running average.
        mean: over 'all' elements, or over the 'nonzero' ones.
        gradient: of a clipped activation: 'masked' (0) or 'straight_through' (1).
    """

    bits_options = ('k',)

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(
            k=number(0, 1000, none=True),
            momentum=number(0, 1),
            mean=one_of('all', 'nonzero'),
            gradient=one_of('masked', 'straight_through'),
        )

    def __init__(
        self,
        bits: int,
        range: str = 'auto',
        k: float | None = None,
        momentum: float = 0.01,
        mean: str = 'all',
        gradient: str = 'masked',
    ) -> None:
        super().__init__(bits, range, momentum)
        self.given_k, self.mean_of, self.gradient = k, mean, gradient
        self.register_buffer('k', torch.zeros(()))

    def start_threshold(self, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
        self.k.fill_(ACTIVATION_K[self.kind][self.bits] if self.given_k is None else self.given_k)
        if self.given_k is None and mean > 0:  # beyond the largest value there is nothing to clip: images, ReLU6
            self.k.clamp_(max=torch.maximum(-low, high) / mean)
        return self.k * mean

    def reshape(self, x: Tensor, threshold: Tensor) -> Tensor:
        return F.clip(x, (self.hi * self.step()).to(x.dtype), self.gradient, (self.lo * self.step()).to(x.dtype))

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        return F.fake_quantize(x, step, self.lo, self.hi, self.gradient)

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.sum_abs(x), torch.count_nonzero(x) if self.mean_of == 'nonzero' else x.numel()
