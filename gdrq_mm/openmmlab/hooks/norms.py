"""Keep the running statistics of batch normalization the same in all processes."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce_params, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import SYNCED
from ..models import bare_model


@HOOKS.register_module()
class NormHook(Hook):
    """Average the running statistics of BN that is not synchronized, after each iteration, in one collective.

    mmengine leaves each process its own and saves those of the first. Then the others would validate another model,
    train another one in the freeze stage, and go on differently after a resume.

    Example:
        custom_hooks = [dict(type='NormHook')]   # QuantRunner adds it by itself
    """

    priority = 'ABOVE_NORMAL'  # before EMA

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if get_world_size() == 1:
            return
        statistics = [
            buffer
            for module in bare_model(runner.model).modules()
            if isinstance(module, _BatchNorm) and not isinstance(module, SYNCED) and module.training
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if statistics:
            all_reduce_params(statistics, op='mean')
