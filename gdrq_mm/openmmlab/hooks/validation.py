"""Validate after a resume what was not validated before."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner


@HOOKS.register_module()
class DueValidationHook(Hook):
    """A resumed training begins with the validation that its checkpoint was saved before, if one is due there.

    mmengine saves first and validates then. A run that ends in between would never validate that state: the best
    checkpoint may be missing, and a schedule that waits for a plateau misses a score.

    Example:
        custom_hooks = [dict(type='DueValidationHook')]   # QuantRunner adds it by itself
    """

    priority = 'LOWEST'  # when every other hook is ready for training

    def before_train(self, runner: Runner) -> None:
        if getattr(runner, 'resumed_unvalidated', False) and is_due(runner):
            runner.logger.info('Validating first: the run that saved the checkpoint had not done so.')
            runner.val_loop.run()

    def before_val(self, runner: Runner) -> None:
        runner.validated_at = runner.iter


def is_due(runner: Runner) -> bool:
    """Whether the training loop validates the state it is in."""
    loop: Any = runner.train_loop
    if runner.val_loop is None or not loop.iter:
        return False
    loop._decide_current_val_interval()
    if isinstance(loop, EpochBasedTrainLoop):
        done, last, whole = loop.epoch, loop.max_epochs, loop.iter == loop.epoch * len(loop.dataloader)
    else:
        done, last, whole = loop.iter, loop.max_iters, True
    return whole and done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
