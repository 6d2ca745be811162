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
from ..ranks import all_reduce, world_size
from ..typed import Bounds
from .activation import ActivationQuantizer


class FollowingQuantizer(ActivationQuantizer):
    """T <- T + m * (k * s / n - T), with what `measure` gave, summed over the forwards and ranks of a step.

    With `largest`, s is the largest of the forwards and ranks instead, since each has a part of the batch; n is 1.

    A method overrides `measure`, has an option `momentum`, and registers a scalar buffer `k`.
    """

    follows = True
    largest = False
    """Whether s is a largest value, not a sum."""

    k: Tensor

    @dataclass(frozen=True)
    class Options:
        momentum: Annotated[float, Bounds(0, 1)] = 0.01
        """m of the running average."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, range, **options)
        self._sums = torch.zeros(2, dtype=torch.float64)

    @property
    def sums(self) -> Tensor:
        """Since the last move: the sums of all s and of all n, or the largest, (2,) float64.

        No buffer: DistributedDataParallel would copy those of one process, and `half` would round them."""
        if self._sums.device != self.threshold.device:
            self._sums = torch.zeros(2, dtype=torch.float64, device=self.threshold.device)
        return self._sums

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        _ = self.sums  # on the new device now: else torch.compile sees other sums in its second call
        return moved

    def measure(self, x: Tensor) -> tuple[Tensor, Any]:
        """s and n of one input, scalars; with `largest` n is 1."""
        raise NotImplementedError

    def track(self, x: Tensor) -> None:
        total, count = self.measure(x)
        if self.largest:
            self.sums[0] = torch.maximum(self.sums[0], total)
            self.sums[1] = 1
        else:
            self.sums[0] += total
            self.sums[1] += count


def collected(quantizers: Collection[FollowingQuantizer]) -> Tensor:
    """s and n of each quantizer since the last move, (N, 2) float64, of all processes."""
    found = torch.stack([q.sums for q in quantizers])
    return found if world_size() == 1 else _of_all_processes(found, [i for i, q in enumerate(quantizers) if q.largest])


def _of_all_processes(found: Tensor, largest: list[int]) -> Tensor:
    """The sums over the processes; in the rows `largest` the largest s / n of a process, and n = 1."""
    total, count = found[largest].unbind(1)
    highest = torch.stack([total / count.clamp(min=1), count.clamp(max=1)], 1)
    all_reduce(found, 'sum')
    if largest:
        all_reduce(highest, 'max')
        found[largest] = highest
    return found


def move_thresholds(quantizers: Collection[FollowingQuantizer], momentum: Any = None) -> None:
    """Move T by what all processes collected, which starts anew; a T whose n is 0 stays. `momentum` replaces theirs."""
    if not quantizers:
        return
    total, count = collected(quantizers).unbind(1)
    thresholds = [q.threshold for q in quantizers]
    before, k = torch.stack(thresholds), torch.stack([q.k for q in quantizers])
    momenta = torch.tensor([momentum or q.options.momentum for q in quantizers], device=before.device)
    mean = total / count.clamp(min=1)
    target = torch.where(torch.isfinite(mean), (k * mean).clamp(max=F.LARGEST), mean).float()
    moved = before + momenta * (target - before)
    torch._foreach_copy_(thresholds, list(torch.where(count > 0, moved, before).unbind()))
    torch._foreach_zero_([q.sums for q in quantizers])
