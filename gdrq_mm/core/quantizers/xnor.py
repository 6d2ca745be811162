"""XNOR-Net's binary weights.

Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks", ECCV 2016,
arXiv:1603.05279. Eq. 6: w_b = alpha * sign(w) with alpha = mean(|w|) of the filter; section 3.1: the gradient of a
weight is that of w_b times 1 / n + alpha where |w| <= 1, else 1 / n; n is the number of weights that share alpha.
Only weights ("Binary-Weight-Network"): binary activations need the paper's order of layers, batch normalization
before the convolution, which OpenMMLab's models do not have. `quantization.method='xnor'` takes 'minmax' for
activations.
Deviations: sign(0) is 1, as the bit has two values. Filters may share alpha, if `groups` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer


@register('xnor', title='XNOR', activations=MinMaxActivation)
class XNORWeight(WeightQuantizer):
    """Weights -alpha and alpha."""

    allowed_bits = range(1, 2)
    default_groups = 'channel'

    def __init__(self, bits: int, shape: Sequence[int], groups: int | str | None = None) -> None:
        super().__init__(bits, shape, groups)
        self.set_state(lo=-1, hi=1)

    def current_threshold(self, weight: Tensor) -> Tensor:
        return F.mean_abs(weight, self.sizes)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return torch.where(weight >= 0, 1.0, -1.0)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        counts = F.per_channel(self.sizes * weight[0].numel(), self.sizes, weight.shape)
        passed = 1 / counts + step * (weight.detach().abs() <= 1)
        return F.straight_through(weight * passed, self.round(weight, step) * step)
