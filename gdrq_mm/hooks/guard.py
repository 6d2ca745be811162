"""Stop at a loss or a weight that is not finite."""

from __future__ import annotations

import math

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import last_written
from ..convert import bare_model
from ..errors import UserError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End training with one message when a loss is NaN or infinite, or a weight is when a checkpoint is to be written.

    Checkpoints written before stay as they are.

    Example:
        custom_hooks = [dict(type='FiniteLossHook')]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # mmengine's RuntimeInfoHook has read these values already, so this does not make a GPU wait once more.
        values = {name: float(torch.as_tensor(value).detach()) for name, value in (outputs or {}).items()}
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            _stop(runner, ', '.join(f'{name}={value}' for name, value in bad.items()))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # A quantized model can have a finite loss with infinite weights: clipping hides them.
        model = bare_model(runner.model)
        statistics = [(n, b) for n, b in model.named_buffers() if n.endswith(('running_mean', 'running_var'))]
        for name, value in [*model.named_parameters(), *statistics]:
            if not bool(torch.isfinite(value).all()):
                _stop(runner, f'{name} has values that are not finite')


def _stop(runner: Runner, what: str) -> None:
    raise UserError(f'{what} at iteration {runner.iter}; training stops, {last_written(runner.work_dir)}')
