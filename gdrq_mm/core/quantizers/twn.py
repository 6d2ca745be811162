"""TWN: ternary weights with one scale.

Li et al., "Ternary Weight Networks", 2016, arXiv:1605.04711. Eq. 5 and 6: w_t = alpha * sign(w) where |w| > delta, else
0, with delta = 0.7 * mean(|w|) and alpha the mean |w| of those above it; the gradient is straight through.
The paper keeps activations in float; `quantization.method='twn'` takes 'minmax' for them.
Deviations: delta and alpha of each group, if `groups` says so; the paper has one group a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .minmax import MinMaxActivation
from .registry import register
from .weight import WeightQuantizer


@register('twn', title='TWN', activations=MinMaxActivation)
class TWNWeight(WeightQuantizer):
    """Weights -alpha, 0 and alpha."""

    allowed_bits = range(2, 3)

    def _delta(self, weight: Tensor) -> Tensor:
        return self.spread(0.7 * F.mean_abs(weight, self.sizes))

    def current_threshold(self, weight: Tensor) -> Tensor:
        weight = weight.detach().float()
        return F.mean_of_chosen(weight, weight.abs() > self._delta(weight), self.sizes)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return torch.sign(weight) * (weight.abs() > self._delta(weight))

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight, self.round(weight, step) * step)
