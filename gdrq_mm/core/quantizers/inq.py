"""INQ: weights become powers of two in portions, while the others train on.

Zhou et al., "Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights", ICLR 2017,
arXiv:1702.03044. Levels are 0 and +-2^e for e = n1 down to n2, with n1 = floor(log2(4/3 max|w|)) of the trained layer
and n2 = n1 + 1 - 2^(b-2); a weight takes the nearest. Again and again the largest |w| of those that are left, up to a
share of the layer, become their levels and stay there; the others train on in float to make up for them. In the end
all are levels. For ResNet-18 with 5 bits the shares are 1/2, 3/4, 7/8 and 1.
The paper keeps activations in float; `quantization.method='inq'` takes 'minmax' for them.
Deviations: portions begin at even fractions of the training, the first after the first step, which trains all weights
straight through, as does a loop that tells no progress (`after_step`). Evaluation rounds all weights, so that scores
are those of the quantized model, and so does the stage freeze. Levels of each group, if `groups` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import functional as F
from ..typed import Bounds
from .base import Stage
from .lbw import PowerWeight, power_codes
from .minmax import MinMaxActivation
from .registry import register

FREE, UNTOLD = -128, 127
"""In the place of a code: the weight trains in float; it is rounded and trains, as no progress was told yet."""


@register('inq', title='INQ', activations=MinMaxActivation)
class INQWeight(PowerWeight):
    """Weights of which a growing portion stays at powers of two."""

    allowed_bits = range(2, 6)

    held: Tensor
    """The code of each weight that has become a level, else FREE or UNTOLD; int8, in the shape of the filters. With
    it a resumed training goes on as it was."""

    @dataclass(frozen=True)
    class Options:
        portions: Annotated[int, Bounds(1, 20, closed=True)] = 4
        """How many; each takes half of the weights that are left, the last one all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer('held', torch.full(self.shape, UNTOLD, dtype=torch.int8))
        self._share = 0.0

    def start_threshold(self, weight: Tensor) -> Tensor:
        largest = F.nonzero_start(F.max_abs(weight, self.sizes), weight)
        return F.power_of_two(largest, 'linear').clamp(max=F.LARGEST)

    def start(self, weight: Tensor) -> None:
        self.held.fill_(UNTOLD)
        self._share = 0.0
        super().start(weight)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        return power_codes(weight, step * self.hi, self.hi)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        levels = self.levels(self.round(weight, step), step)
        if not self.trains or self.stage == Stage.FREEZE:
            return F.straight_through(weight, levels)
        trained = torch.where(self.held == UNTOLD, levels, weight)
        free = (self.held == FREE) | (self.held == UNTOLD)
        kept = self.levels(self.held.float(), step)
        return F.straight_through(torch.where(free, weight, 0), torch.where(free, trained, kept))

    def share(self) -> float:
        """Share of the weights that are levels at this progress of the training."""
        portion = int((self.progress or 0) * self.options.portions) + 1
        last = portion >= self.options.portions or self.stage == Stage.FREEZE
        return 1.0 if last else 1 - 0.5**portion

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        if self.progress is None or self.stage not in (Stage.QUANTIZE, Stage.FREEZE):
            return None
        size = self.step(weight)
        if self.share() != self._share:  # or the training is resumed: then all that is due is held already
            self._share = self.share()
            self._hold(weight, size)
        return torch.where(self.held == FREE, weight, self.levels(self.held.float(), size))

    def _hold(self, weight: Tensor, step: Tensor) -> None:
        """Hold the largest weights of those that are left, up to the share that is due."""
        self.held.copy_(torch.where(self.held == UNTOLD, FREE, self.held))
        order = torch.where(self.held == FREE, weight.abs().float(), torch.inf).flatten()
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order.argsort(descending=True, stable=True)[: round(self._share * len(order))]] = True
        new = chosen.view(self.shape) & (self.held == FREE)
        self.held.copy_(torch.where(new, self.round(weight, step), self.held))
