"""Move the model through the stages reshape, quantize and freeze."""

from __future__ import annotations

from math import inf

import torch.nn as nn
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, EMAHook, Hook
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.quantizers import Quantizer, Stage
from ...core.step import set_stage
from ..models import bare_model


@HOOKS.register_module()
class StageHook(Hook):
    """Set the stage of all quantizers from the progress of training (docs/method.md, section 5).

    Args:
        reshape: fraction of the training length until which nothing is rounded; 0 leaves the stage out.
        freeze: fraction from which thresholds and BN statistics stand still; 1 leaves the stage out.

    When rounding begins, the scores so far are forgotten: they belong to a model that was not quantized. So the best
    checkpoint, early stopping and schedules that wait for a plateau start anew; and no score ends training before.

    Example:
        custom_hooks = [dict(type='StageHook', reshape=0.3, freeze=0.9)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, reshape: float = 0.0, freeze: float = 1.0) -> None:
        self.reshape, self.freeze = reshape, freeze
        self.stage: Stage | None = None
        self.trained = self.stopped_before = False
        """Whether a training goes on that has taken a step, perhaps before it was resumed."""

    def before_train(self, runner: Runner) -> None:
        self.trained = runner.iter > 0

    def stage_at(self, progress: float) -> Stage:
        """Stage at a fraction of the training length."""
        if progress < self.reshape:
            return Stage.RESHAPE
        return Stage.FREEZE if progress >= self.freeze else Stage.QUANTIZE

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        self.trained = True
        model = bare_model(runner.model)
        stage = self.stage_at(runner.iter / runner.max_iters)
        if stage != self.stage:
            runner.logger.info(f'Stage {stage.name.lower()} from iteration {runner.iter} of {runner.max_iters}.')
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    _copy_state(model, hook.ema_model.module)
                    set_stage(hook.ema_model.module, stage)
            if set_stage(model, stage) == Stage.RESHAPE:
                _forget_scores(runner)
            self.stage = stage
        if stage == Stage.FREEZE:
            for module in model.modules():  # model.train() of the next epoch would start the statistics again
                if isinstance(module, _BatchNorm) and module.training:
                    module.eval()

    def before_val(self, runner: Runner) -> None:
        self.stopped_before = self.trained and runner.train_loop.stop_training

    def after_val(self, runner: Runner) -> None:
        # Other hooks have seen the scores; this point is behind all of theirs
        if not self.trained or self.stage_at((runner.iter - 1) / runner.max_iters) != Stage.RESHAPE:
            return
        if runner.train_loop.stop_training and not self.stopped_before:
            runner.logger.info('Training goes on: that score is not one of the quantized model.')
            runner.train_loop.stop_training = False
            _forget_early_stopping(runner)


def _copy_state(model: nn.Module, average: nn.Module) -> None:
    """Bring the quantizers of an average up to date: EMA copies a model before calibration, and skips integers."""
    for ours, theirs in zip(model.modules(), average.modules()):
        if isinstance(ours, Quantizer) and isinstance(theirs, Quantizer):
            theirs.set_state(stage=ours.stage, calibrated=ours.calibrated, lo=ours.lo, hi=ours.hi)


def _forget_scores(runner: Runner) -> None:
    for key in list(runner.message_hub.runtime_info):
        if key.startswith(('best_score', 'best_ckpt')):
            runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            hook.best_ckpt_path = None
            paths = getattr(hook, 'best_ckpt_path_dict', {})  # there with several indicators
            paths.update(dict.fromkeys(paths))
    _forget_early_stopping(runner)
    schedulers = runner.param_schedulers or []
    for each in schedulers.values() if isinstance(schedulers, dict) else [schedulers]:
        for scheduler in each:
            if isinstance(scheduler, ReduceOnPlateauParamScheduler):
                scheduler._reset()


def _forget_early_stopping(runner: Runner) -> None:
    for hook in runner.hooks:
        if isinstance(hook, EarlyStoppingHook):
            hook.best_score = -inf if hook.rule == 'greater' else inf  # the next score is better, and it waits anew
