"""Write what happens to the distributions: scalars and histograms through mmengine's Visualizer."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, IterTimerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend
from torch import Tensor

from ...core.modules import activation_quantizers, every_module, hooked, quant_layers, uncompiled
from ...core.quantizers import Quantizer, Stage
from ...report.damage import measure, quantized_weight
from ...report.plots import Distribution, distribution_sheet
from ..models import bare_model

SAMPLES = 1 << 16
"""Values of a weight or an activation that are looked at; evenly spaced ones of the tensor (ours)."""


@HOOKS.register_module()
class StatisticsHook(Hook):
    """Write what the quantizers see, for each layer's weight and each activation.

    Every `interval` iterations (0: never), in the first and the last one and the first of each stage: so the pictures
    show the distributions before training, after reshape and after quantization.

    Scalars `quant/<name>/{threshold, clip_ratio, quantized_loss, distance_to_uniform}` and a picture of all histograms
    go to every backend of the visualizer, the histograms themselves to TensorBoard if it is one of them. The table of
    layers is logged before training and testing.

    Example:
        custom_hooks = [dict(type='StatisticsHook', interval=500)]   # QuantRunner adds it by itself
    """

    priority = 'LOW'

    def __init__(self, interval: int = 500) -> None:
        self.interval = interval
        self._due = False
        self._stages: frozenset[Stage] = frozenset()
        self._samples: dict[str, Tensor] = {}
        self._watched = ExitStack()

    def before_train(self, runner: Runner) -> None:
        if hasattr(runner, 'log_layers'):
            runner.log_layers()

    before_test = before_train

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        model = bare_model(runner.model)
        before, self._stages = self._stages, frozenset(m.stage for m in every_module(model) if isinstance(m, Quantizer))
        last = runner.iter + 1 == runner.max_iters
        begins = self._stages != before
        self._due = self.interval > 0 and (begins or last or self.every_n_train_iters(runner, self.interval))
        if not self._due:
            return

        def watch(name: str, quantizer: nn.Module) -> Any:
            def keep(module: Any, args: Any) -> None:
                self._samples[name] = _some(args[0].detach().flatten()).float()

            return quantizer.register_forward_pre_hook(keep)

        self._watched.enter_context(uncompiled())
        self._watched.enter_context(hooked(watch(*each) for each in activation_quantizers(model).items()))

    @torch.no_grad()
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not self._due:
            return
        self._watched.close()
        samples, self._samples = self._samples, {}
        if not is_main_process():
            return
        began = time.time()
        self._write(runner, self._distributions(bare_model(runner.model), samples))
        for hook in runner.hooks:  # else the picture counts as loading data, and the estimate of the end with it
            if isinstance(hook, IterTimerHook):
                hook.t += time.time() - began

    @staticmethod
    def _distributions(model: Any, samples: dict[str, Tensor]) -> list[Distribution]:
        found = []
        for name, layer in quant_layers(model).items():
            quant = layer.weight_quant
            if quant is not None and quant.calibrated:
                weight, *rest = quantized_weight(layer)
                values = (_some(value.expand_as(weight).flatten()) for value in (weight, *rest))
                found.append(_distribution(f'{name}.weight', quant.bits, *values))
        for name, quant in activation_quantizers(model).items():
            if quant.calibrated and name in samples and samples[name].numel():
                x, step = samples[name], quant.step()
                ends = quant.lo * step, quant.hi * step
                found.append(_distribution(name, quant.bits, x, quant.quantize(x, step), *ends))
        return found

    def _write(self, runner: Runner, distributions: list[Distribution]) -> None:
        if not distributions:
            return
        scalars = {f'quant/{d.name}/{key}': value for d in distributions for key, value in d.scalars().items()}
        runner.visualizer.add_scalars(scalars, step=runner.iter)
        runner.visualizer.add_image('distributions', distribution_sheet(distributions), step=runner.iter)
        for backend in runner.visualizer._vis_backends.values():
            if isinstance(backend, TensorboardVisBackend):
                for d in distributions:
                    backend.experiment.add_histogram(f'quant/{d.name}', d.values, runner.iter)


def _some(values: Tensor) -> Tensor:
    """Evenly spaced ones of (N,); the spacing is odd, else it may hit the same channels only."""
    return values[:: max(1, len(values) // SAMPLES) | 1]


def _distribution(name: str, bits: int, x: Tensor, quantized: Tensor, low: Tensor, high: Tensor) -> Distribution:
    damage = measure(x, quantized, low, high, bits)
    assert damage is not None
    return Distribution(
        name=name.replace('.own_input_quant', ''),
        values=x.float().flatten().cpu().numpy(),
        low=float(low.mean()),
        threshold=float(torch.maximum(-low, high).mean()),
        damage=damage,
    )
