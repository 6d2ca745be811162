"""Several processes, above all without a GPU: what mmengine 0.10.12 and torch have for CUDA devices only."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed.nn.functional as dist
import torch.nn as nn
from mmengine.dist import get_world_size
from mmengine.model import convert_sync_batchnorm
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.errors import building


@contextmanager
def no_device() -> Iterator[None]:
    """mmengine selects a CUDA device for each process of a launcher; here there is none to select."""
    select = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        yield
    finally:
        torch.cuda.set_device = select


def leave(end: str | int) -> NoReturn:
    """End this process as sys.exit does, with a last line or an exit code, and its data workers in any case.

    Data workers get no time to stop: a signal to them can be lost, as they shield themselves (hooks/stop.py), and one
    may hang. Then the process ends without the interpreter's and C++'s clean-up: threads of gloo, OpenMP or a runtime
    may live as long as what they work for, and what destroys them then can abort a process that has done its work, or
    wait for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a data worker is killed
    for worker in multiprocessing.active_children():
        worker.kill()
    if isinstance(end, str):
        print(end, file=sys.stderr)
        end = 1
    if end == os.EX_OK and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # loggers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)


class CPUSyncBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm for a CPU, where torch's raises: mean and variance of the batches of all processes.

    Made by `synchronized` only. It is no nn.SyncBatchNorm: DistributedDataParallel refuses that on a CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        if not self.training or get_world_size() == 1:
            return super().forward(input)
        dims = [d for d in range(input.dim()) if d != 1]
        x = input.float()  # half precision too, as torch does
        variance, mean = torch.var_mean(x, dims, correction=0)
        count = x.new_full((1,), input.numel() // input.shape[1], dtype=torch.float64)
        sums = dist.all_reduce(torch.cat([count * mean, count * (variance + mean.double().square()), count]))
        mean, variance = sums[:-1].view(2, -1) / sums[-1]
        variance = variance - mean.square()
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * (sums[-1] / (sums[-1] - 1)).item())
        shape = [-1 if d == 1 else 1 for d in range(input.dim())]
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (x * scale.float().view(shape) + shift.float().view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        counter: Any = self.num_batches_tracked
        counter.add_(1)
        momentum = 1 / counter.item() if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(new.to(running.dtype), momentum)  # type: ignore[union-attr]


SYNCED = (nn.SyncBatchNorm, CPUSyncBatchNorm)
"""Batch normalizations whose statistics are the same in all processes."""


def synchronized(model: nn.Module, sync_bn: str | None) -> nn.Module:
    """A model for several processes: with `sync_bn` all BN is synchronized; without a GPU by CPUSyncBatchNorm."""
    if sync_bn:
        with building(f'sync_bn={sync_bn!r}'):
            model = convert_sync_batchnorm(model, sync_bn)
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
    return model
