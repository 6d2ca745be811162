"""Stop when a job scheduler asks for it, so that --resume goes on from there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ...core.errors import Stopped
from ...core.files import write_whole
from ..checkpoints import POINTER

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What slurm sends before it takes the machine away: as `--signal=USR1@seconds` asks, or by itself."""
CHECKPOINT = 'stopped.pth'
"""One name, so that a run which is stopped often keeps one such file; tools/slurm_train.sh looks at its time."""


@HOOKS.register_module()
class StopHook(Hook):
    """On SIGUSR1 or SIGTERM save a checkpoint after the current iteration and end with errors.Stopped.

    A signal to one process stops all of them after the same iteration: each asks the others after every optimizer step.
    Between two steps of gradient accumulation nothing is saved, as the gradients so far would be lost. A signal during
    validation counts after the next step; one before training starts ends the process, as it does without this hook.

    Example:
        custom_hooks = [dict(type='StopHook')]   # QuantRunner adds it by itself
    """

    priority = 'LOWEST'  # when every other hook is done with the iteration

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def before_train(self, runner: Runner) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it there only
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_train(self, runner: Runner) -> None:
        """Give the signals back; QuantRunner calls it also where training fails."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update() or runner.iter + 1 == runner.max_iters:
            return
        received = torch.tensor(self.signal)
        all_reduce(received, 'max')
        if not received:
            return
        runner.save_checkpoint(runner.work_dir, CHECKPOINT, by_epoch=False)
        path = Path(runner.work_dir) / CHECKPOINT
        if is_main_process():
            write_whole(Path(runner.work_dir) / POINTER, str(path).encode())
        barrier()  # the launcher may kill all processes when the first has ended
        self.after_train(runner)
        name = signal.Signals(int(received)).name
        raise Stopped(f'{name} after iteration {runner.iter + 1}: saved {path}; --resume goes on from there')


def _listening() -> bool:
    return any(isinstance(getattr(signal.getsignal(number), '__self__', None), StopHook) for number in SIGNALS)


def _hold_signals() -> None:
    if _listening():
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _go_on() -> None:
    if _listening():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_at_signals() -> None:
    if _listening():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# A process that is forked during training would note the signal as well and live on; the pool of mmdet's VOCMetric ends
# its workers by SIGTERM and waits for them without limit.
os.register_at_fork(before=_hold_signals, after_in_parent=_go_on, after_in_child=_end_at_signals)


def shield_workers(loader: DataLoader) -> None:
    """Keep the processes that load data alive when a signal goes to all processes of a job, as slurm's does.

    The iteration may wait for what they load, and torch raises in the main process when one of them dies.
    """
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)


def _start_worker(init: Callable[[int], None] | None, number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()
    if init is not None:
        init(number)


def _obey_parent() -> None:
    """End at a signal of the main process only, which has to get rid of its workers."""
    while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)
