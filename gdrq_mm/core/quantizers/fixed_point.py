"""Steps that are powers of two: Ristretto's dynamic fixed point (Gysel et al. 2016, arXiv:1604.03168)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .. import functional as F

if TYPE_CHECKING:
    from .base import Quantizer


@dataclass(frozen=True)
class FixedPoint:
    """Options of a method whose step may be a power of two."""

    power_of_two: bool = False
    """The step is a power of two: the multiplier of a layer becomes a shift."""


def fixed_point(quantizer: Quantizer, threshold: Tensor) -> Tensor:
    """T of the power of two next to its step, if the quantizer has the option; else T.

    Ristretto's step is the smallest that clips nothing, `steps_up`; elsewhere it is the nearest (ours). The gradient of
    T is straight through (ours).
    """
    if not getattr(quantizer.options, 'power_of_two', False):
        return threshold
    top = max(-quantizer.lo, quantizer.hi)
    step = F.power_of_two(threshold / top, 'up' if quantizer.steps_up else 'log')
    return F.straight_through(threshold, step * top)
