"""LSQ+: LSQ with a learned offset for activations that are not zero at their lower end.

Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPR
Workshops 2020, arXiv:2004.09576. Activations, Eq. 3 to 6: Q(x) = s * round(clip((x - beta) / s, 0, 2^k - 1)) + beta
with gradients for s and beta; weights: symmetric, s starts at max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(k-1) (section
3.3); activations start at the least squared error. The gradient scale of both is LSQ's.
Deviations: beta is rounded to whole steps, straight through, so that zero keeps a code: padding and merging into
integers need that. It is learned for inputs with a short negative tail (SiLU, GELU); unsigned inputs start and stay
at 0, signed ones are symmetric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from .base import Stage
from .lsq import LSQActivation, LSQWeight


class LSQPlusWeight(LSQWeight):
    """Weights with a learned step that starts from the third standard deviation."""

    def start_step(self, weight: Tensor) -> Tensor:
        flat = weight.detach().float().flatten(1)
        count = self.sizes * flat.shape[1]
        mean = F.per_group(flat.sum(1), self.sizes) / count
        square = F.per_group(flat.square().sum(1), self.sizes) / count
        sigma = (square - mean.square()).clamp(min=0).sqrt()
        return torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 2 ** (self.bits - 1)


class LSQPlusActivation(LSQActivation):
    """Activations with a learned step and, beside a zero point, a learned offset."""

    keeps_samples = True

    def __init__(self, bits: int, range: str = 'auto', lr_mult: float = 1.0) -> None:
        super().__init__(bits, range, lr_mult)
        self.beta = nn.Parameter(torch.zeros(()))

    def start_threshold(self, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return self.search_start(low, high)

    def calibrate(self, observed: Tensor) -> None:
        super().calibrate(observed)
        if self.kind == 'zero_point':
            self.beta.data.copy_(self.lo * self.learned_step.detach())

    def settle(self) -> None:
        """Take the codes that the offset stands for now."""
        if self.calibrated and self.kind == 'zero_point' and self.stage != Stage.FREEZE:
            levels = 2**self.bits - 1
            zero_point = int((-self.beta / self.learned_step.abs()).round().clamp(1, levels // 2))
            self.set_state(lo=-zero_point, hi=levels - zero_point)

    def freeze(self) -> None:
        self.settle()
        super().freeze()

    def train(self, mode: bool = True) -> Any:
        """Between training and evaluation the whole number that `lo` and `hi` hold is brought up to date."""
        self.settle()
        return super().train(mode)

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        if self.stage == Stage.FREEZE or self.kind != 'zero_point':
            return super().quantize(x, step + 0 * self.beta)  # DistributedDataParallel waits for its gradient
        levels = 2**self.bits - 1
        scale = (x[0].numel() * levels) ** -0.5
        learned, beta = self.learned_step.abs(), self.beta
        step = F.straight_through(learned * scale, learned)  # scaled gradients
        zero_point = (-beta / learned).detach().round().clamp(1, levels // 2)
        low = F.straight_through(beta * scale, -zero_point * learned)
        high = F.straight_through(low + levels * step, (levels - zero_point) * learned)
        wide = x.float()
        inside = step * F.round_ste(wide / step)
        clipped = torch.where(wide <= low, low, torch.where(wide >= high, high, inside))
        return clipped.to(x.dtype)
