"""BNN: weights and inputs of one bit.

Hubara et al., "Binarized Neural Networks", NIPS 2016, arXiv:1602.02830: x_b = sign(x), which is 1 at 0; the gradient
is that of hard tanh, g_x = g_xb where |x| <= 1, else 0; after a step the stored weights are clipped to [-1, 1]. The
text of the paper was not at hand.
Deviations: the paper trains from scratch with BN in front of every sign, here a network starts from a float
checkpoint, with ReLU in front of layers and some layers without BN. So signs have scales: that of weights is their
mean |w| as in XNOR-Net, which grows to the paper's 1 as they do, that of inputs, T, is constant, the level of least
squared error for Gaussian ones, and their gradient is 0 beyond T. Inputs without negative values, or with a short
negative tail, would all have the sign 1: they get 0 below T / 2 and T above, which is the sign of x - T / 2, shifted.
A scale of weights for each group, if `groups` says so. Layers of 8 bits take the method 'minmax'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as F
from .activation import ActivationQuantizer, Statistics
from .registry import register
from .weight import WeightQuantizer

LEVEL = 1.534
"""The level t > 0 of least squared error in {0, t} for max(x, 0), x Gaussian, as a multiple of the mean of the values
above 0; a test computes it anew. In {-t, t} it is 1, for any distribution."""


def sign(x: Tensor) -> Tensor:
    """1 or -1; there is no third value."""
    return torch.where(x >= 0, 1.0, -1.0)


@register('bnn', title='BNN')
class BNNWeight(WeightQuantizer):
    """Weights -alpha and alpha."""

    allowed_bits = range(1, 2)

    def code_range(self) -> tuple[int, int]:
        return -1, 1

    def current_threshold(self, weight: Tensor) -> Tensor:
        return F.mean_abs(weight, self.sizes)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return sign(weight)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        return F.straight_through(weight.clamp(-1, 1), sign(weight) * step)

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        return weight.clamp(-1, 1)


@register('bnn')
class BNNActivation(ActivationQuantizer):
    """Activations -T and T if they are signed, else 0 and T."""

    allowed_bits = range(1, 2)

    @property
    def uneven(self) -> str | None:  # type: ignore[override]
        """Signs have no code 0, to which an integer kernel rounds small inputs."""
        return 'BNN gives signed inputs two levels, -T and T, and none for 0' if self.kind == 'signed' else None

    def set_range(self, kind: str, zero_point: int = 1) -> None:
        self.set_state(lo=-1 if kind == 'signed' else 0, hi=1)

    def start_threshold(self, seen: Statistics) -> Tensor:
        if self.range == 'auto' and not seen.low < 0:
            self.set_range('unsigned')  # zeros only, which have become 'signed'
        return seen.mean if self.kind == 'signed' else LEVEL * seen.nonzero_mean

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        if self.kind != 'signed':
            return super().quantize(x, step)
        limit = step.to(x.dtype)
        return F.straight_through(torch.clamp(x, -limit, limit), sign(x) * limit)
