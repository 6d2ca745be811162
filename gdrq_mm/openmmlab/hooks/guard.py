"""Stop at a loss, a gradient or a weight that is not finite, and say where it came from."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.errors import UserError
from ..checkpoints import last_written
from ..models import bare_model
from ..origin import not_finite, origin

STATE = ('running_mean', 'running_var', 'threshold')
"""Ends of the names of buffers that are looked at with the weights: BN statistics and thresholds."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End training with one message when a loss, a gradient or a weight is NaN or infinite.

    The loss and the gradients are looked at with every optimizer step. A step with such gradients is not taken, so the
    weights are still those that caused them. Weights, BN statistics and thresholds are looked at every `interval`
    steps, and before each checkpoint: what spoils them shows in the next loss, unless clipping hides it. The message
    names the input, the parameter, or the first layer whose output is not finite. All processes stop at the same step.
    A step that GradScaler leaves out is none. Checkpoints written before stay as they are.

    Example:
        custom_hooks = [dict(type='FiniteLossHook', interval=10)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.steps = 0
        self.loss = self.gradients = ''
        self.batch: Any = None

    def before_train(self, runner: Runner) -> None:
        names = {id(p): name for name, p in bare_model(runner.model).named_parameters()}
        optimizer = runner.optim_wrapper.optimizer

        def check(*args: Any) -> None:
            if getattr(optimizer, 'found_inf', None) is not None:
                return  # a fused optimizer leaves such a step out by itself: GradScaler has told it
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            bad = not_finite((names.get(id(p), 'a parameter'), p.grad) for p in parameters)
            if bad:
                # It flows back from layer to layer, so the last is where it began; clipping spreads it to all.
                where = bad[-1] if len(bad) < len(parameters) else 'each parameter'
                self.gradients = f'the gradient of {where} is not finite at iteration {runner.iter}'
                for parameter in parameters:
                    parameter.grad = None

        optimizer.register_step_pre_hook(check)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # mmengine's RuntimeInfoHook has read these values already, so this does not make a GPU wait once more.
        values = {name: float(torch.as_tensor(value).detach()) for name, value in (outputs or {}).items()}
        bad = [f'{name}={value}' for name, value in values.items() if not math.isfinite(value)]
        if bad and not self.loss:
            self.loss, self.batch = f'{", ".join(bad)} at iteration {runner.iter}', data_batch
        if not runner.optim_wrapper.should_update():  # the other processes ask each other at their steps only
            return
        self.steps += 1
        model = bare_model(runner.model)
        other = self.gradients
        if not (self.loss or other) and self.steps % self.interval == 0:
            spoilt = _spoilt(model)
            other = spoilt and f'{spoilt} after iteration {runner.iter}'
        stop = torch.tensor(int(bool(self.loss or other)))
        all_reduce(stop, 'max')
        if not stop:
            return
        with runner.optim_wrapper.optim_context(model):  # in all processes, as a head may wait for the others
            cause = origin(model, self.batch if self.loss else data_batch)
        reason = f': {cause}' if cause and cause not in other else ''
        found = all_gather_object((self.loss and self.loss + reason, other and other + reason))
        causes = [loss for loss, _ in found if loss] or [other for _, other in found if other]
        _stop(runner, '; '.join(dict.fromkeys(causes)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # What hooks changed after the step, and an average of the weights, which is in the model now
        spoilt = _spoilt(bare_model(runner.model))
        if spoilt:
            _stop(runner, f'{spoilt} at iteration {runner.iter}')


def _stop(runner: Runner, what: str) -> None:
    raise UserError(f'{what}; training stops, {last_written(runner.work_dir)}')


def _spoilt(model: nn.Module) -> str:
    """The first parameter, BN statistic or threshold that is not finite; '' if there is none."""
    state = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(STATE))
    bad = not_finite([*model.named_parameters(), *state])
    return f'{bad[0]} has values that are not finite' if bad else ''
