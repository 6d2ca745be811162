"""Stop at a loss that is not finite."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..errors import UserError


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End training with one message when a loss is NaN or infinite; checkpoints written before stay as they are.

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
            listed = ', '.join(f'{name}={value}' for name, value in bad.items())
            raise UserError(f'{listed} at iteration {runner.iter}; training stops, {_last_checkpoint(runner)}')


def _last_checkpoint(runner: Runner) -> str:
    pointer = Path(runner.work_dir) / 'last_checkpoint'
    if not pointer.is_file():
        return 'no checkpoint had been written yet'
    return f'the last good checkpoint is {pointer.read_text().strip()}'
