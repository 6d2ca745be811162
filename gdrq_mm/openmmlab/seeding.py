"""Random numbers that a resumed run draws again: mmengine saves no random state.

Each sample is seeded by (seed, epoch, position in the epoch), in whichever process it is loaded; each iteration of the
main process by (seed, rank, iteration). So neither the number of workers nor an interruption changes what is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader


def seed_all(*numbers: int, devices: bool = True) -> None:
    """Seed Python, NumPy and torch from a few integers; `devices=False` leaves accelerators out (100 times faster)."""
    seed = int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # of all torch would warn
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _SeededIndex(int):
    """A sample's index that carries the seed of its random transforms, into worker processes too."""

    numbers: tuple[int, ...]

    def __reduce__(self) -> Any:
        return _seeded_index, (int(self), self.numbers)


def _seeded_index(index: int, numbers: tuple[int, ...]) -> _SeededIndex:
    new = _SeededIndex(index)
    new.numbers = numbers
    return new


class _SeededSampler:
    """Yields the indices of a sampler, each with its seed; everything else is the sampler's."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.start = 0
        if hasattr(sampler, 'skip'):  # mmengine asks for it when an iteration-based run is resumed
            self.skip = self._skip

    def _skip(self, samples: int) -> None:
        self.sampler.skip(samples)
        self.start = samples

    def __getattr__(self, name: str) -> Any:
        if name == 'sampler':
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(self.sampler, self.start):
            yield _seeded_index(index, (self.seed, get_rank(), getattr(self.sampler, 'epoch', 0), position))


def _seeded_class(cls: type) -> type:
    """A subclass of a data set's class that seeds before it loads a sample; spawned workers make it anew."""

    def getitem(self: Any, index: int) -> Any:
        if isinstance(index, _SeededIndex):
            seed_all(*index.numbers, devices=False)
        return cls.__getitem__(self, int(index))  # type: ignore[attr-defined, index]

    def reduce(self: Any, protocol: Any) -> Any:
        function, args, *state = cls.__reduce_ex__(self, protocol)  # type: ignore[call-arg, str-unpack]
        function, *args = (cls if part is seeded else part for part in (function, *args))
        return _seeded_copy, (function, *args), *state

    # No slots, or the memory layout differs and Python refuses to change the class of an object.
    members = {'__getitem__': getitem, '__reduce_ex__': reduce, '__module__': cls.__module__, '__slots__': ()}
    seeded = type(cls.__name__, (cls,), members)
    return seeded


def _seeded_copy(function: Any, *args: Any) -> Any:
    """A data set that was pickled: made as its own class says, and seeded again."""
    dataset = function(*args)
    dataset.__class__ = _seeded_class(type(dataset))
    return dataset


def seed_dataloader(loader: DataLoader, seed: int) -> None:
    """Make what a data loader draws depend on seed, epoch and position only. Twice is the same as once."""
    if isinstance(loader.sampler, _SeededSampler):
        return
    batches: Any = loader.batch_sampler
    if hasattr(batches, 'sampler'):  # the loader's own is a placeholder if the config names a batch sampler
        sampler = batches.sampler = _SeededSampler(batches.sampler, seed)
    else:
        sampler = _SeededSampler(loader.sampler, seed)
    object.__setattr__(loader, 'sampler', sampler)  # DataLoader forbids plain assignment
    loader.dataset.__class__ = _seeded_class(type(loader.dataset))


def reseed_dataloader(loader: DataLoader, seed: int) -> None:
    """Draw by another seed, that of a checkpoint which is resumed."""
    if isinstance(loader.sampler, _SeededSampler):
        loader.sampler.seed = seed
        if hasattr(loader.sampler.sampler, 'seed'):
            loader.sampler.sampler.seed = seed


class _ResumedBatchSampler:
    """Yields the batches of a batch sampler, but leaves out the first ones once; everything else is the sampler's."""

    def __init__(self, batches: Any, done: int) -> None:
        self.batches, self.done = batches, done

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        done, self.done = self.done, 0
        yield from islice(self.batches, done, None)


def skip_batches(loader: DataLoader, done: int) -> None:
    """Start the next epoch of a data loader behind its first `done` batches, which a resumed run has seen."""
    object.__setattr__(loader, 'batch_sampler', _ResumedBatchSampler(loader.batch_sampler, done))


@HOOKS.register_module()
class SeedHook(Hook):
    """Seed each iteration of the main process. QuantRunner adds it by itself, and seeds the training data."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        seed_all(runner.seed, get_rank(), runner.iter)
