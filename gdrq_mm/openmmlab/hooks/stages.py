"""Move the model through the stages reshape, quantize and freeze."""

from __future__ import annotations

import torch.nn as nn
from mmengine.hooks import CheckpointHook, EMAHook, Hook
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

    When rounding begins, the best score so far is forgotten: it belongs to a model that was not quantized.

    Example:
        custom_hooks = [dict(type='StageHook', reshape=0.3, freeze=0.9)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, reshape: float = 0.0, freeze: float = 1.0) -> None:
        self.reshape, self.freeze = reshape, freeze
        self.stage: Stage | None = None

    def stage_at(self, progress: float) -> Stage:
        """Stage at a fraction of the training length."""
        if progress < self.reshape:
            return Stage.RESHAPE
        return Stage.FREEZE if progress >= self.freeze else Stage.QUANTIZE

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        model = bare_model(runner.model)
        stage = self.stage_at(runner.iter / runner.max_iters)
        if stage != self.stage:
            runner.logger.info(f'Stage {stage.name.lower()} from iteration {runner.iter} of {runner.max_iters}.')
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    _copy_state(model, hook.ema_model.module)
                    set_stage(hook.ema_model.module, stage)
            if set_stage(model, stage) == Stage.RESHAPE:
                _forget_best(runner)
            self.stage = stage
        if stage == Stage.FREEZE:
            for module in model.modules():  # model.train() of the next epoch would start the statistics again
                if isinstance(module, _BatchNorm) and module.training:
                    module.eval()


def _copy_state(model: nn.Module, average: nn.Module) -> None:
    """Bring the quantizers of an average up to date: EMA copies a model before calibration, and skips integers."""
    for ours, theirs in zip(model.modules(), average.modules()):
        if isinstance(ours, Quantizer) and isinstance(theirs, Quantizer):
            theirs.set_state(stage=ours.stage, calibrated=ours.calibrated, lo=ours.lo, hi=ours.hi)


def _forget_best(runner: Runner) -> None:
    for key in list(runner.message_hub.runtime_info):
        if key.startswith(('best_score', 'best_ckpt')):
            runner.message_hub.pop_info(key)
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            hook.best_ckpt_path = None
            paths = getattr(hook, 'best_ckpt_path_dict', {})  # there with several indicators
            paths.update(dict.fromkeys(paths))
