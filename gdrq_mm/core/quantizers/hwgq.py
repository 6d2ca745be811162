"""HWGQ: activations on the uniform levels that fit a rectified Gaussian best.

Cai et al., "Deep Learning with Low Precision by Half-wave Gaussian Quantization", CVPR 2017, arXiv:1702.00953.
Section 4.2: Q(x) = q_i for x in (t_i, t_i+1], 0 for x <= 0, with evenly spaced q_i of least squared error for the
standard normal distribution: any x > 0 gets at least the first level; section 4.3: the gradient is that of a clipped
ReLU.
The paper binarizes weights: combine with `weight=dict(method='xnor', bits=1)`.
Deviations: the paper's inputs have unit variance, ours are scaled by their sigma, from a running mean(|x|), which is
sigma / sqrt(2 pi) for a rectified Gaussian; signed inputs take the levels that fit a whole Gaussian, with a zero
level, those with a zero point the half-wave step. 8-bit layers take the method 'minmax'.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .activation import Statistics
from .following import FollowingQuantizer
from .minmax import MinMaxWeight
from .registry import register

HALF_WAVE = {2: 0.5388, 3: 0.3217, 4: 0.1842, 5: 0.1030, 6: 0.0566, 7: 0.0307, 8: 0.0165}
"""Step of least squared error by bits for max(x, 0) of a standard normal x; a test computes it anew."""
FULL_WAVE = {2: 1.224, 3: 0.6508, 4: 0.3534, 5: 0.1932, 6: 0.1055, 7: 0.0573, 8: 0.0309}
"""The same for x itself with the codes -(2^(n-1) - 1) to 2^(n-1) - 1."""


@register('hwgq', title='HWGQ', weights=MinMaxWeight)
class HWGQActivation(FollowingQuantizer):
    """Activations with the step of their sigma; its T = hi * step is k * mean(|x|), so T follows as in GDRQ."""

    allowed_bits = range(2, 8)
    uneven = 'HWGQ rounds small positive inputs up, not to the nearest level'

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.register_buffer('k', torch.zeros(()))

    def start_threshold(self, seen: Statistics) -> Tensor:
        signed = self.kind == 'signed'
        sigma = math.sqrt(math.pi / 2) if signed else math.sqrt(2 * math.pi)  # times mean(|x|)
        self.k.fill_((FULL_WAVE if signed else HALF_WAVE)[self.bits] * self.hi * sigma)
        return self.k * seen.mean

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        return F.sum_abs(x), x.numel()

    def reshape(self, x: Tensor, threshold: Tensor) -> Tensor:
        step = self.step()
        return F.clip(x, (self.hi * step).to(x.dtype), low=(self.lo * step).to(x.dtype))

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        out = super().quantize(x, step)
        if self.kind != 'unsigned':
            return out
        return F.straight_through(out, torch.maximum(out, (x > 0) * step))
