"""Start thresholds from training batches, after the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...core.calibrate import calibrate, uncalibrated, wrong_statistics
from ...core.quantizers import Quantizer
from ..models import bare_model
from ..seeding import kept_random_state

ENDLESS = ('InfiniteSampler', InfiniteSampler)
EVERY_SAMPLE = ('DefaultSampler', DefaultSampler, *ENDLESS)
"""Samplers that give every sample as often as any other: calibration draws as the first one does, shuffled."""


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Run `batches` training batches in float, then decide ranges and start thresholds, the same on every rank.

    What a checkpoint held stays: of a quantized one with another head the head alone is calibrated. A layer that no
    batch reaches stays float; the table of layers says so.

    Example:
        custom_hooks = [dict(type='CalibrationHook', batches=8)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches
        self.trains_next = True
        """Whether the model is trained with these thresholds."""

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        some = any(m.calibrated for m in model.modules() if isinstance(m, Quantizer))
        missing = uncalibrated(model)
        if some and not missing:
            return
        if not runner._load_from and not some:
            runner.logger.warning('The config has no load_from: quantization starts without a trained float model.')
        which = f'{len(missing)} thresholds that no checkpoint held' if some else 'thresholds'
        runner.logger.info(f'Calibrating {which} on {self.batches} training batches.')

        def predict(batch: Any) -> None:
            model(**model.data_preprocessor(batch, training=True), mode='loss')

        with kept_random_state():
            batches = islice(own_loader(runner), self.batches)
            wrong = calibrate(model, batches, predict, True, self.trains_next, missing=some)
        if wrong:
            runner.logger.warning(wrong_statistics(wrong, self.trains_next))


def batch_size_of(loader: DataLoader, cfg: Mapping[str, Any]) -> int:
    """The batch size of a data loader, which knows none if it has a sampler of batches; `cfg` is its config."""
    found: Any = cfg.get('batch_size') or loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    return int(found)


def own_loader(runner: Runner, dataset: Any = None) -> DataLoader:
    """The training data once more, or another data set in its place, so that the sampler of the run is not moved."""
    loader, cfg = runner.train_dataloader, runner.cfg.get('train_dataloader')
    dataset, collate = dataset or loader.dataset, loader.collate_fn
    cfg = cfg if isinstance(cfg, dict) else {}
    sampler_cfg, batch_cfg = cfg.get('sampler') or {}, cfg.get('batch_sampler')
    size = batch_size_of(loader, cfg)
    whole = bool(cfg.get('drop_last'))
    if not isinstance(sampler_cfg, dict) or sampler_cfg.get('type', DefaultSampler) in EVERY_SAMPLE:
        sampler: Any = DefaultSampler(dataset, shuffle=True, seed=runner.seed)
        # An endless sampler has no incomplete last batch: batch normalization cannot train on a single picture
        endless = isinstance(sampler_cfg, dict) and sampler_cfg.get('type') in ENDLESS
        whole |= endless and len(sampler) >= size
    else:
        sampler = DATA_SAMPLERS.build(sampler_cfg, default_args=dict(dataset=dataset, seed=runner.seed))
    if isinstance(batch_cfg, dict):
        batches = DATA_SAMPLERS.build(batch_cfg, default_args=dict(sampler=sampler, batch_size=size))
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)
    return DataLoader(dataset, size, sampler=sampler, drop_last=whole, collate_fn=collate)
