"""Activations whose threshold follows the inputs: a running average, moved once per optimizer step.

What the forwards of a step collect is read, and all thresholds of a model are moved, in a few operations on vectors:
one by one, the hundreds of inputs of a detector would take as many small operations each.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import functional as F
from ..typed import Bounds
from .activation import ActivationQuantizer


class FollowingQuantizer(ActivationQuantizer):
    """T <- T + m * (k * s / n - T), with what `measure` gave, summed over the forwards and ranks of a step.

    A method overrides `measure`, has an option `momentum`, and registers a scalar buffer `k`.
    """

    follows = True

    k: Tensor

    @dataclass(frozen=True)
    class Options:
        momentum: Annotated[float, Bounds(0, 1)] = 0.01
        """m of the running average."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self.sum: Any = 0.0
        """Since the last move: the sum of all s, a scalar."""
        self.count: Any = 0
        """Since the last move: the sum of all n, a scalar."""

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        """s and n of one input, scalars, s in float32."""
        raise NotImplementedError

    def track(self, x: Tensor) -> None:
        total, count = self.measure(x)
        self.sum, self.count = self.sum + total, self.count + count


def collected(quantizers: Collection[FollowingQuantizer]) -> Tensor:
    """s and n of each quantizer since the last move, (N, 2) float64; may be summed over ranks."""
    device = next(iter(quantizers)).threshold.device
    sums, counts = _vector([q.sum for q in quantizers], device), _vector([q.count for q in quantizers], device)
    return torch.stack([sums.double(), counts.double()], 1)


def move_thresholds(quantizers: Collection[FollowingQuantizer], statistics: Tensor) -> None:
    """Move T by (N, 2) statistics, and start them anew; a T whose n is 0 stays."""
    exact, total, count = statistics[:, 0] / statistics[:, 1].clamp(min=1), *statistics.float().unbind(1)
    thresholds = [q.threshold for q in quantizers]
    before, k = torch.stack(thresholds), torch.stack([q.k for q in quantizers])
    momentum = _vector([q.options.momentum for q in quantizers], before.device)
    target = k * total / count.clamp(min=1)
    overflow = torch.isfinite(exact) & ~torch.isfinite(target)  # what is not finite itself stays so, and is reported
    target = torch.where(overflow, (k * exact).clamp(max=F.LARGEST).float(), target)
    moved = before + momentum * (target - before)
    torch._foreach_copy_(thresholds, list(torch.where(count > 0, moved, before).unbind()))
    for quantizer in quantizers:
        quantizer.sum, quantizer.count = 0.0, 0


def _vector(values: list[Any], device: torch.device) -> Tensor:
    """Numbers and scalar tensors as one float32 vector; a float64 one if a number is too large for float32."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if not tensors:
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([torch.as_tensor(value, dtype=dtype, device=device) for value in values])
