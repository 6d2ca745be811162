"""PACT: the clipping level of activations is learned by gradient.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018, arXiv:1805.06085. Eq. 1: y
= clip(x, 0, alpha); Eq. 2: y_q = round(y * (2^k - 1) / alpha) * alpha / (2^k - 1); Eq. 3: dy_q/dalpha = 1 where x >=
alpha, else 0. alpha takes weight decay (section 3.2: L2 regularization with the factor of the weights). The paper
quantizes weights as DoReFa does: `quantization.method='pact'` takes both.
Deviations: alpha starts at the largest |x| of calibration (the paper trains from scratch and starts at a constant);
inputs below zero are clipped at -alpha too, those with a short negative tail at the zero point that calibration
found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..typed import Bounds
from .activation import ActivationQuantizer
from .dorefa import DoReFaWeight
from .fixed_point import FixedPoint
from .registry import register


@register('pact', title='PACT', weights=DoReFaWeight)
class PACTActivation(ActivationQuantizer):
    """Activations with a learned threshold."""

    @dataclass(frozen=True)
    class Options(FixedPoint):
        lr_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Learning rate of alpha, as a multiple of that of the weights."""
        decay_mult: Annotated[float, Bounds(0, 1000)] = 1.0
        """Weight decay of alpha, as a multiple of that of the weights."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.alpha = nn.Parameter(torch.ones(()))

    def start(self, observed: Tensor) -> None:
        super().start(observed)
        if self.calibrated:
            self.alpha.data.copy_(self.threshold)

    def current_threshold(self) -> Tensor:
        return self.alpha.abs()  # abs: an alpha that crosses 0 goes on learning

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        # step = alpha / hi, so the gradient hi of a clipped value becomes 1 for alpha
        return self.learn(x, step, 1.0, inside=False)
