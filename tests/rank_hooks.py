"""Hooks that a config names by path (type='tests.rank_hooks.Note'), for runs in processes of their own."""

import ctypes
import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from gdrq_mm.openmmlab.hooks import StopHook
from gdrq_mm.openmmlab.models import bare_model


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


class Freeze(Hook):
    """In iteration `at` halt the data workers, as a file system that does not answer does."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGSTOP)


class FullDisk(Hook):
    """From iteration `at` on no file can grow beyond `size` bytes, as if a disk were full."""

    def __init__(self, at, size):
        self.at, self.size = at, size

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class ReadOnly(Hook):
    """From iteration `at` on nothing can be written below the work directory; a root needs a mount for that."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != self.at:
            return
        if os.geteuid():
            Path(runner.work_dir).chmod(0o500)
            return
        libc = ctypes.CDLL(None, use_errno=True)
        folder, new_namespace, read_only, remount, bind, recursive, private = (
            os.fsencode(runner.work_dir), 0x20000, 1, 32, 4096, 16384, 1 << 18
        )  # fmt: skip
        failed = (
            libc.unshare(new_namespace)
            or libc.mount(None, b'/', None, recursive | private, None)
            or libc.mount(folder, folder, None, bind, None)
            or libc.mount(None, folder, None, bind | remount | read_only, None)
        )
        if failed:
            number = ctypes.get_errno()
            raise OSError(number, 'no mount' if number == errno.EPERM else os.strerror(number))


def spoilt(value, by=torch.inf):
    """The same with one other value."""
    value = value.clone().float()
    value.view(-1)[0] = by
    return value


class Spoil(Hook):
    """In iteration `at`, on one rank or all, something becomes infinite: `what` is a method below."""

    def __init__(self, what, at=6, name='backbone.layer2.0.conv1', rank=None):
        self.what, self.at, self.name, self.rank = what, at, name, rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and self.rank in (None, get_rank()):
            getattr(self, self.what)(runner, bare_model(runner.model).get_submodule(self.name), data_batch)

    def input(self, runner, layer, data_batch):
        data_batch['inputs'] = [data_batch['inputs'][0].float(), *map(spoilt, data_batch['inputs'][1:])]

    def number(self, runner, layer, data_batch):
        data_batch['inputs'] = [spoilt(picture, torch.nan) for picture in data_batch['inputs']]

    def weight(self, runner, layer, data_batch):
        layer.weight.data.copy_(spoilt(layer.weight.data))

    def statistics(self, runner, layer, data_batch):
        layer.running_mean.copy_(spoilt(layer.running_mean))

    def output(self, runner, layer, data_batch):
        layer.register_forward_hook(lambda module, args, output: spoilt(output))

    def gradient(self, runner, layer, data_batch):
        layer.weight.register_hook(partial(spoilt, by=torch.nan))

    def rate(self, runner, layer, data_batch):
        layer.weight.register_hook(partial(spoilt, by=1e30))
        for group in runner.optim_wrapper.optimizer.param_groups:
            group['lr'] = 1e20


class Break(Hook):
    """In iteration `at` there is a bug."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            raise ZeroDivisionError('broken')


class AbortAtExit(Hook):
    """Abort when the process ends, as C++ does when it destroys a thread that runs."""

    def before_run(self, runner):
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
        while not stop.listener.signal:
            assert time.monotonic() < end, 'no signal came'
            time.sleep(0.05)
