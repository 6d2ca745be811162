"""Move thresholds once per optimizer step."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.step import after_step
from ..models import bare_model


@HOOKS.register_module()
class ThresholdHook(Hook):
    """After each optimizer step: project weights, then move the thresholds of activations (docs/method.md, section 2).

    Statistics of all inner forwards of gradient accumulation and of all ranks are added up, in one collective, in two
    where a method takes largest values. The priority puts it before EMA (mmengine's EMAHook is NORMAL).

    Example:
        custom_hooks = [dict(type='ThresholdHook')]   # QuantRunner adds it by itself
    """

    priority = 'ABOVE_NORMAL'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update():
            return
        step = runner.iter // getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        after_step(bare_model(runner.model), step, (runner.iter + 1) / runner.max_iters)
