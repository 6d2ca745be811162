"""The model of several processes: wrapped, and with batch normalization that is synchronized without a GPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.nn.functional as dist
import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import UserError
from ..core.modules import replace_modules


class CPUSyncBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm for a CPU, where torch's raises: mean and variance of the batches of all processes.

    Made by `synchronized` only. It is no nn.SyncBatchNorm: DistributedDataParallel refuses that on a CPU.
    """

    only_normalizes = True

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


SYNC_BN = ('torch', 'mmcv')
"""What `sync_bn` of a config may be, beside None."""


def synchronized(model: nn.Module, sync_bn: str | None) -> nn.Module:
    """A model for several processes: with `sync_bn` all BN is synchronized; without a GPU by CPUSyncBatchNorm.

    That of mmcv (`sync_bn='mmcv'`, MMSyncBN) becomes torch's: it is no BN to torch, and nothing that looks for BN, such
    as the fold into a layer, would find it. Both weigh the processes by their numbers of values, mmcv's with
    `stats_mode='N'` alone; where these are equal there is no difference.

    Raises:
        UserError: `sync_bn` is not known.
    """
    if sync_bn is not None:
        if sync_bn not in SYNC_BN:
            raise UserError(f'sync_bn={sync_bn!r} is not one of {", ".join(SYNC_BN)}')
        model = convert_sync_batchnorm(model)
    replace_modules(model, {m: _of_torch(m) for m in model.modules() if type(m).__module__ == 'mmcv.ops.sync_bn'})
    if not torch.cuda.is_available():
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = CPUSyncBatchNorm  # type: ignore[assignment]
    return model


def _of_torch(norm: Any) -> nn.SyncBatchNorm:
    """torch's normalization with the Parameters and buffers of mmcv's."""
    new = nn.SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
    return new


def wrapper_config(cfg: Config, wrapper: dict[str, Any] | None) -> dict[str, Any] | None:
    """The `model_wrapper_cfg` for the processes of this machine, with or without GPUs.

    Raises:
        UserError: it is no DistributedDataParallel. FSDP cuts weights into pieces, but thresholds are of whole filters.
    """
    name = (wrapper or {}).get('type', 'MMDistributedDataParallel')
    kind = MODEL_WRAPPERS.get(name) if isinstance(name, str) else name
    if not (isinstance(kind, type) and issubclass(kind, DistributedDataParallel)):
        raise UserError(f'model_wrapper_cfg.type={name!r} is not supported; take MMDistributedDataParallel')
    if torch.cuda.is_available():
        return wrapper
    unused = cfg.get('find_unused_parameters', False)
    wrapper = wrapper or dict(broadcast_buffers=False, find_unused_parameters=unused)
    return {**wrapper, 'device_ids': None}  # mmengine's default are CUDA devices
