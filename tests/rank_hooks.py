"""Hooks that a config names by path (type='tests.rank_hooks.Note'), for runs in processes of their own."""

import ctypes
import multiprocessing
import signal
import subprocess
import time
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from gdrq_mm.convert import bare_model
from gdrq_mm.hooks import StopHook


class Note(Hook):
    """Write the state of the model after each epoch, one file for each rank."""

    priority = 'LOWEST'

    def after_train_epoch(self, runner):
        state = bare_model(runner.model).state_dict()
        torch.save(state, Path(runner.work_dir) / f'state_{runner.epoch + 1}_{get_rank()}.pt')


class Kill(Hook):
    """In iteration `at`, on one rank or all, send a signal to the own process and its data workers, as slurm does."""

    def __init__(self, at, number, rank=None):
        self.at, self.number, self.rank = at, getattr(signal, number), rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and self.rank in (None, get_rank()):
            processes = (*multiprocessing.active_children(), multiprocessing.current_process())
            # Sent by another process: torch's data workers take a SIGTERM of their parent for the end of their work
            subprocess.run(['kill', f'-{self.number}', *(str(process.pid) for process in processes)], check=False)


class AbortAtExit(Hook):
    """Abort when the process ends, as C++ does when it destroys a thread that runs."""

    def after_run(self, runner):
        libc = ctypes.CDLL(None)
        getattr(libc, '__cxa_atexit')(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)


class Hold(Hook):
    """Once in a work directory wait for a signal: in iteration `at`, or before training for 'start'.

    Each rank says by a file `held_RANK` that it waits.
    """

    priority = 'VERY_HIGH'

    def __init__(self, at):
        self.at = at

    def before_run(self, runner):
        if self.at == 'start':
            self._wait(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            self._wait(runner)

    def _wait(self, runner):
        note = Path(runner.work_dir) / f'held_{get_rank()}'
        if note.exists():
            return
        note.touch()
        (stop,) = (hook for hook in runner.hooks if isinstance(hook, StopHook))
        end = time.monotonic() + 150
        while not stop.signal:
            assert time.monotonic() < end, 'no signal came'
            time.sleep(0.05)
