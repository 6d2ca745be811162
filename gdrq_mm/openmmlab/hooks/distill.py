"""Add the distance to the float model to the losses of a training."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.distill import Distillation
from ..distill import distillation_of
from ..models import bare_model


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds `loss_distill` to the losses of each training forward, as `quantization.distill` says.

    The teacher is no part of the model: no checkpoint, optimizer or process group sees it.
    """

    priority = 'LOW'  # behind CalibrationHook, whose forwards are no training

    def __init__(self) -> None:
        self.distillation: Distillation | None = None
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        distillation = distillation_of(model, runner.cfg, bool(runner.cfg.get('unsafe_load')))
        distance = torch.compiler.disable(distillation) if runner.cfg.get('compile') else distillation
        runner.logger.info(f'Distillation compares {", ".join(distillation.distances)}.')

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            distillation.forget()

        def add(module: Any, args: Any, kwargs: Any, losses: Any) -> None:
            mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
            if mode != 'loss' or not module.training or not torch.is_grad_enabled():  # as settling has it
                return
            given = dict(zip(('inputs', 'data_samples'), args)) | kwargs
            losses['loss_distill'] = distance(given['inputs'], given.get('data_samples'))

        self._handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(add, with_kwargs=True),
        ]
        self.distillation = distillation

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        if self.distillation is not None:
            self.distillation.stop()
