"""Balanced Quantization: as many weights on each level.

Zhou et al., "Balanced Quantization: An Effective and Efficient Approach to Quantized Neural Networks", Journal of
Computer Science and Technology 2017, arXiv:1706.07145. The histogram of the weights is equalized by partitioning them
recursively k times, each part gets one of 2^k evenly spaced levels, the gradient is straight through. As in the
paper's faster variant a part is cut at its mean, not at its median. The paper quantizes activations as DoReFa does.
Deviations: the outermost levels are at a constant that keeps the mean|w| of the float checkpoint (the scale is ours).
A part of equal weights has none above its mean and gets its lowest level, in a group of one weight the most negative.
8-bit layers take the method 'minmax'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .dorefa import DoReFaActivation, DoReFaWeight
from .registry import register


@register('balanced', title='Balanced', activations=DoReFaActivation)
class BalancedWeight(DoReFaWeight):
    """Weights by rank, on DoReFa's levels and with its constant."""

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        flat = weight.detach().float().flatten(1)
        group = torch.repeat_interleave(torch.arange(self.groups, device=flat.device), self.sizes)
        values, part = flat.flatten(), group.repeat_interleave(flat.shape[1])
        for level in range(self.bits):
            parts = self.groups * 2**level
            count = torch.bincount(part, minlength=parts).clamp(min=1)
            mean = torch.bincount(part, values.double(), minlength=parts) / count
            part = 2 * part + (values > mean[part])
        return (2.0 * (part % 2**self.bits) - self.hi).view_as(weight)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight, self.round(weight, step) * step)
