"""Stop when a job scheduler asks for it, so that --resume goes on from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.errors import Stopped
from ...core.files import write_whole
from ..checkpoints import POINTER
from ..processes import Listener

CHECKPOINT = 'stopped.pth'
"""One name, so that a run which is stopped often keeps one such file; slurm_train.sh looks at its time."""


@HOOKS.register_module()
class StopHook(Hook):
    """On SIGUSR1 or SIGTERM save a checkpoint after the current iteration and end with errors.Stopped.

    A signal to one process stops all of them after the same iteration: each asks the others after every optimizer step.
    Between two steps of gradient accumulation nothing is saved: that checkpoint would hold the gradients too. A signal
    during validation counts after the next step; one before training starts ends the process, as it does without this
    hook.

    Example:
        custom_hooks = [dict(type='StopHook')]   # QuantRunner adds it by itself
    """

    priority = 'LOWEST'  # when every other hook is done with the iteration

    def __init__(self) -> None:
        self.listener = Listener()

    def before_train(self, runner: Runner) -> None:
        self.listener.start()

    def after_train(self, runner: Runner) -> None:
        """Give the signals back; QuantRunner calls it also where training fails."""
        self.listener.stop()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if not runner.optim_wrapper.should_update() or runner.iter + 1 == runner.max_iters:
            return
        received = torch.tensor(self.listener.signal)
        all_reduce(received, 'max')
        if not received:
            return
        runner.save_checkpoint(runner.work_dir, CHECKPOINT, by_epoch=False)
        path = Path(runner.work_dir) / CHECKPOINT
        if is_main_process():
            write_whole(Path(runner.work_dir) / POINTER, os.fsencode(path))
        barrier()  # the launcher may kill all processes when the first has ended
        self.after_train(runner)
        name = signal.Signals(int(received)).name
        raise Stopped(f'{name} after iteration {runner.iter + 1}: saved {path}; --resume goes on from there')
