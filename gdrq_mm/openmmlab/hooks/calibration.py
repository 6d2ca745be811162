"""Start thresholds from training batches, after the weights are loaded."""

from __future__ import annotations

from itertools import islice
from typing import Any

from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...core.calibrate import calibrate
from ...core.quantizers import Quantizer
from ..models import bare_model
from ..seeding import kept_random_state


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Run `batches` training batches in float, then decide ranges and start thresholds, the same on every rank.

    Nothing is done if the checkpoint held thresholds. A layer that no batch reaches stays float; the table of layers
    says so.

    Example:
        custom_hooks = [dict(type='CalibrationHook', batches=8)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        if any(m.calibrated for m in model.modules() if isinstance(m, Quantizer)):
            return
        if not runner._load_from:
            runner.logger.warning('The config has no load_from: quantization starts without a trained float model.')
        runner.logger.info(f'Calibrating thresholds on {self.batches} training batches.')

        def predict(batch: Any) -> None:
            model(**model.data_preprocessor(batch, training=True), mode='loss')

        with kept_random_state():
            calibrate(model, islice(_own_loader(runner), self.batches), predict, training=True)


def _own_loader(runner: Runner) -> DataLoader:
    """The training data once more, so that the sampler of the run is not moved by calibration."""
    loader = runner.train_dataloader
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    sampler = DefaultSampler(loader.dataset, shuffle=True, seed=runner.seed)
    return DataLoader(loader.dataset, batch_size, sampler=sampler, collate_fn=loader.collate_fn)
