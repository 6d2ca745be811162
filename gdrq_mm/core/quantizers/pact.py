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

import torch
from torch import Tensor, nn

from .base import ActivationQuantizer, Check, number


class PACTActivation(ActivationQuantizer):
    """Activations with a learned threshold.

    Args:
        lr_mult: learning rate of alpha, as a multiple of that of the weights.
        decay_mult: its weight decay, as a multiple of that of the weights.
    """

    @classmethod
    def options(cls) -> dict[str, Check]:
        return dict(lr_mult=number(0, 1000), decay_mult=number(0, 1000))

    def __init__(self, bits: int, range: str = 'auto', lr_mult: float = 1.0, decay_mult: float = 1.0) -> None:
        super().__init__(bits, range)
        self.lr_mult, self.decay_mult = lr_mult, decay_mult
        self.alpha = nn.Parameter(torch.ones(()))

    def calibrate(self, observed: Tensor) -> None:
        super().calibrate(observed)
        if self.calibrated:
            self.alpha.data.copy_(self.threshold)

    def current_threshold(self) -> Tensor:
        return self.alpha.abs()  # abs: an alpha that crosses 0 goes on learning

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        # step = alpha / hi, so the gradient hi of a clipped value becomes 1 for alpha
        return self.learn(x, step, 1.0, inside=False)
