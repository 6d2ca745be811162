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
from torch import Tensor

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

    An accelerator computes while Python goes on, and would have to be waited for. There gradients are looked at one
    step later, when the loss has been waited for anyway; the bad step is taken then, and no checkpoint is written.

    Example:
        custom_hooks = [dict(type='FiniteLossHook', interval=10)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.steps = 0
        self.loss = self.gradients = ''
        self.batch: Any = None
        self.late: bool | None = None
        """Whether gradients are looked at one step later; None: by the device."""
        self._began = 0
        self._largest: tuple[list[str], Tensor, int] | None = None
        """Of the last step: names, the largest |gradient| of each, (N,), and the iteration."""

    def before_train(self, runner: Runner) -> None:
        names = {id(p): name for name, p in bare_model(runner.model).named_parameters()}
        optimizer = runner.optim_wrapper.optimizer

        def check(*args: Any) -> None:
            if getattr(optimizer, 'found_inf', None) is not None:
                return  # a fused optimizer leaves such a step out by itself: GradScaler has told it
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            called = [names.get(id(p), 'a parameter') for p in parameters]
            late = self.late if self.late is not None else any(p.device.type != 'cpu' for p in parameters)
            if late:
                self._look_back()
                if parameters:
                    largest = torch._foreach_norm([p.grad for p in parameters], torch.inf)
                    self._largest = called, torch.stack([each.float() for each in largest]), runner.iter
            else:
                self._judge(not_finite(zip(called, (p.grad for p in parameters))), len(parameters), runner.iter)
            if self.gradients:
                for parameter in parameters:
                    parameter.grad = None

        optimizer.register_step_pre_hook(check)

    def _look_back(self) -> None:
        """Look at the gradients of the last step, if that was put off."""
        if self._largest is not None:
            names, largest, iteration = self._largest
            self._largest = None
            fine = largest.isfinite().tolist()
            self._judge([name for name, ok in zip(names, fine) if not ok], len(names), iteration)

    def _judge(self, bad: list[str], count: int, iteration: int) -> None:
        """Note which of `count` gradients are not finite."""
        if bad and not self.gradients:
            # It flows back from layer to layer, so the last is where it began; clipping spreads it to all.
            where = bad[-1] if len(bad) < count else 'each parameter'
            self.gradients, self._began = f'the gradient of {where} is not finite at iteration {iteration}', iteration

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # mmengine's RuntimeInfoHook has read these values already, so this does not make a GPU wait once more.
        # What is no loss, as mmengine tells it by the name, may have no value, such as a mean over no boxes.
        losses = {name: value for name, value in (outputs or {}).items() if 'loss' in name}
        values = {name: float(torch.as_tensor(value).detach()) for name, value in losses.items()}
        bad = [f'{name}={value}' for name, value in values.items() if not math.isfinite(value)]
        follows = self.gradients and self._began < runner.iter  # from a step with such gradients
        if bad and not self.loss and not follows:
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
        self._look_back()
        if self.gradients:
            _stop(runner, self.gradients)
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
