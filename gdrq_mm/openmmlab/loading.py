"""Data loaders: built once and seeded; predictions on a first sample; going on in the middle of an epoch."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn as nn
from mmengine.model import BaseTTAModel
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from ..core.errors import UserError
from ..core.modules import mute_leaves
from .models import bare_model
from .seeding import kept_random_state, reseed_dataloader, skip_batches
from .tasks import TASKS


def loader_of(runner: Any, name: str) -> DataLoader:
    """A data loader of a runner's config by its attribute, such as '_train_dataloader'; built once, for the loop too.

    Raises:
        UserError: a file or folder of its data set does not exist, or what is in it is wrong.
    """
    loader = getattr(runner, name)
    if isinstance(loader, dict):
        diff = runner._randomness_cfg.get('diff_rank_seed', False)
        try:
            loader = runner.build_dataloader(loader, seed=runner.seed, diff_rank_seed=diff)
        except (OSError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            if not (isinstance(error, OSError) or _of_layout(error)):
                raise
            raise UserError(f'{name[1:]}: the data set cannot be read: {error}') from None
        setattr(runner, name, loader)
    return loader


def _of_layout(error: BaseException) -> bool:
    """Whether a library raised it while it listed what a data set has: the files are not laid out as it expects."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    library = frames[-1].f_globals.get('__name__', '').partition('.')[0] in ('mmengine', *TASKS)
    return library and any(frame.f_code.co_name == 'load_data_list' for frame in frames)


def trials_of(runner: Any, model: nn.Module) -> list[Callable[[], None]]:
    """What may tell the plan of a model: a prediction on the first sample to validate or test, then a training loss."""
    names = [n for n in ('_val_dataloader', '_test_dataloader') if getattr(runner, n, None) is not None]
    trials: list[Callable[[], None]] = [partial(_predict_sample, runner, model, name) for name in names[:1]]
    if getattr(runner, '_train_dataloader', None) is not None:
        trials.append(partial(_lose_sample, runner, model))
    return trials


def _predict_sample(runner: Any, model: nn.Module, name: str) -> None:
    loader = loader_of(runner, name)
    with kept_random_state():
        batch = loader.collate_fn([loader.dataset[0]])
        if isinstance(model, BaseTTAModel):  # its loader gives a list with an entry for each augmentation
            batch = {key: value[0] for key, value in batch.items()}
        bare_model(model).test_step(batch)
        if hasattr(bare_model(model), 'prototype_inited'):  # mmpretrain's retriever would keep those of these weights
            bare_model(model).prototype_inited = False


def _lose_sample(runner: Any, model: nn.Module) -> None:
    loader = loader_of(runner, '_train_dataloader')
    with kept_random_state():
        batch = loader.collate_fn([loader.dataset[0]])
        mute_leaves(model.train())
        data = model.data_preprocessor(batch, training=False)  # type: ignore[operator]
        model(**data, mode='loss')


def go_on(loop: Any, seed: int, batches: int | None = None) -> None:
    """Let a resumed training loop draw by the seed of the checkpoint, and start in the middle of an epoch too.

    Args:
        batches: of an epoch in the training of the checkpoint; None if it does not say. With another number now, the
            loop goes on at the same fraction of the training.
    """
    reseed_dataloader(loop.dataloader, seed)
    if not isinstance(loop, EpochBasedTrainLoop):
        return
    now, done = len(loop.dataloader), loop.iter - loop.epoch * (batches or len(loop.dataloader))
    if batches not in (None, now):
        done = done * now // batches
        loop._iter = loop.epoch * now + done
    if done > 0:
        skip_batches(loop.dataloader, done)
