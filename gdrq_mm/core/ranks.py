"""Collectives between the processes of a training; with one process they do nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(tensor: Tensor, op: str) -> None:
    """Replace a tensor, on whatever device, by its 'sum' or 'max' over all processes."""
    if world_size() == 1:
        return
    on_gpu = dist.get_backend() == 'nccl'
    moved = tensor.cuda() if on_gpu and not tensor.is_cuda else tensor
    dist.all_reduce(moved, {'sum': dist.ReduceOp.SUM, 'max': dist.ReduceOp.MAX}[op])
    if moved is not tensor:
        tensor.copy_(moved)


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks; any object that can be pickled."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found
