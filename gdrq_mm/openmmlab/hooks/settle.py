"""At the end of a training: statistics of BN and thresholds anew, on weakly augmented pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch.nn as nn
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import Runner

from ...core.quantizers import WeightQuantizer
from ...core.reestimate import reestimate
from ..models import bare_model
from ..seeding import kept_random_state
from ..tasks import type_name
from .calibration import own_loader

STRONG = (
    *('AutoAugment', 'RandAugment', 'AugMix', 'ColorJitter', 'Lighting', 'RandomErasing', 'Albumentations', 'Albu'),
    *('Mosaic', 'CachedMosaic', 'MixUp', 'CachedMixUp', 'CopyPaste', 'RandomMosaic', 'CutOut', 'RandomCutOut'),
    *('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'RandomAffine', 'Rotate', 'RandomRotate'),
)
"""Transforms of the three libraries that training pictures are settled without (ours); crops, flips and sizes stay."""


def weakly_augmented(cfg: Any) -> Any:
    """The config of a data set without the transforms of STRONG, in every pipeline in it.

    A choice of transforms keeps its places, as it may have a probability for each: what is strong does nothing there.
    """
    if isinstance(cfg, dict):
        kept = {key: weakly_augmented(value) for key, value in cfg.items()}
        for key in ('pipeline', 'transforms'):
            if isinstance(kept.get(key), list):
                choice = type_name(cfg) == 'RandomChoice'
                options = [each if isinstance(each, list) else [each] for each in kept[key]]
                weak = [[each for each in option if type_name(each) not in STRONG] for option in options]
                kept[key] = weak if choice else [each for option in weak for each in option]
        return kept
    return type(cfg)(weakly_augmented(each) for each in cfg) if isinstance(cfg, (list, tuple)) else cfg


@HOOKS.register_module()
class SettleHook(Hook):
    """After the last training iteration, compute BN statistics and thresholds anew with the weights as they are.

    With EMAHook it is the average that settles: its weights are those that are tested.

    Args:
        length: number of batches, as a fraction of the training length; at most one pass over the data.

    Example:
        custom_hooks = [dict(type='SettleHook', length=0.02)]   # also for a float model
    """

    priority = 'LOW'  # behind thresholds and EMA, before the checkpoint is written

    def __init__(self, length: float = 0.02) -> None:
        self.length = length

    def before_train(self, runner: Runner) -> None:
        if runner.iter >= runner.max_iters:  # the run before has settled; what is left is to validate
            self._exchange_buffers(runner)

    def _exchange_buffers(self, runner: Runner) -> None:
        """The average has buffers of its own now: validation exchanges them with the weights."""
        for average in _averages(runner):
            average.update_buffers = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if runner.iter + 1 < runner.max_iters:
            return
        model = bare_model(runner.model)
        for average in _averages(runner):
            model = _with_portions_of(model, bare_model(average.module))
        self._exchange_buffers(runner)
        cfg, preprocessor = (runner.cfg.get('train_dataloader') or {}).get('dataset'), model.data_preprocessor
        with kept_random_state(), _without_batch_augments(preprocessor):
            dataset = DATASETS.build(weakly_augmented(cfg)) if isinstance(cfg, dict) else None
            batches = islice(own_loader(runner, dataset), max(1, round(self.length * runner.max_iters)))
            count = reestimate(model, batches, lambda batch: model(**preprocessor(batch, training=True), mode='loss'))
        runner.logger.info(f'BN statistics and thresholds settled on {count} batches.')

    def after_train(self, runner: Runner) -> None:
        if runner.iter < runner.max_iters:
            runner.logger.warning('The training ended early: BN statistics and thresholds are not settled.')


def _averages(runner: Runner) -> list[Any]:
    """The average of EMAHook, if there is one."""
    return [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)][:1]


def _with_portions_of(model: nn.Module, average: nn.Module) -> nn.Module:
    """The average, in which those weights are rounded that are in the model: an average skips integers (inq, tsq)."""
    for ours, theirs in zip(model.modules(), average.modules()):
        if isinstance(ours, WeightQuantizer):
            for name, buffer in ours.named_buffers(recurse=False):
                if not buffer.is_floating_point() and name != 'state':
                    theirs.get_buffer(name).copy_(buffer)
    return average


@contextmanager
def _without_batch_augments(preprocessor: Any) -> Iterator[None]:
    """No mixup, and no other augmentation of whole batches."""
    before = getattr(preprocessor, 'batch_augments', None)
    if before is not None:
        preprocessor.batch_augments = None
    try:
        yield
    finally:
        if before is not None:
            preprocessor.batch_augments = before
