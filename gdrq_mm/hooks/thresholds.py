"""Move thresholds once per optimizer step."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..convert import bare_model, moving_quantizers, quant_layers
from ..quantizers.following import collected, move_thresholds


@HOOKS.register_module()
class ThresholdHook(Hook):
    """After each optimizer step: project weights, then move the thresholds of activations (METHOD: section 2).

    Statistics of all inner forwards of gradient accumulation and of all ranks are added up, in one collective. The
    priority puts it before EMA (mmengine's EMAHook is NORMAL).

    Example:
        custom_hooks = [dict(type='ThresholdHook')]   # QuantRunner adds it by itself
    """

    priority = 'ABOVE_NORMAL'

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update():
            return
        model = bare_model(runner.model)
        step = runner.iter // getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        for layer in quant_layers(model).values():
            if layer.weight_quant is not None and layer.weight_quant.calibrated:
                projected = layer.weight_quant.after_step(layer.filters(), step)
                if projected is not None:
                    layer.weight.copy_(layer.set_filters(projected))
        moving = moving_quantizers(model).values()
        if moving:
            statistics = collected(moving)
            all_reduce(statistics, 'sum')
            move_thresholds(moving, statistics)
