"""Write what happens to the distributions: scalars and histograms through mmengine's Visualizer."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend

from .. import functional as F
from ..convert import activation_quantizers, bare_model, quant_layers


@HOOKS.register_module()
class StatisticsHook(Hook):
    """Every `interval` iterations write threshold, clip ratio, quantized loss and distance to uniform of each layer.

    Scalars go to every backend of the visualizer, histograms of weights to TensorBoard if it is one of them.

    Example:
        custom_hooks = [dict(type='StatisticsHook', interval=500)]   # QuantRunner adds it by itself
    """

    priority = 'LOW'

    def __init__(self, interval: int = 500) -> None:
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        if hasattr(runner, 'log_layers'):
            runner.log_layers()

    def before_test(self, runner: Runner) -> None:
        if hasattr(runner, 'log_layers'):
            runner.log_layers()

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not self.every_n_train_iters(runner, self.interval):
            return
        model = bare_model(runner.model)
        scalars: dict[str, float] = {}
        for name, layer in quant_layers(model).items():
            quant = layer.weight_quant
            if quant is None or not quant.calibrated:
                continue
            weight = layer.filters()
            threshold = quant.current_threshold(weight)
            limit = F.per_channel(threshold, quant.sizes, weight.dim())
            quantized = F.fake_quantize(weight, quant.step(weight), quant.lo, quant.hi)
            scalars[f'quant/{name}.weight.threshold'] = float(threshold.mean())
            scalars[f'quant/{name}.weight.clip_ratio'] = float((weight.abs() > limit).float().mean())
            scalars[f'quant/{name}.weight.quantized_loss'] = float(F.quantized_loss(weight, quantized))
            scalars[f'quant/{name}.weight.distance_to_uniform'] = float(F.distance_to_uniform(weight))
            for backend in runner.visualizer._vis_backends.values():
                if isinstance(backend, TensorboardVisBackend):
                    backend.experiment.add_histogram(f'quant/{name}.weight', weight.float().cpu(), runner.iter)
        for name, activation in activation_quantizers(model).items():
            if activation.calibrated:
                scalars[f'quant/{name}.threshold'] = float(activation.threshold)
        runner.visualizer.add_scalars(scalars, step=runner.iter)
