"""One training at a time in a work directory, and what is in it belongs to that one."""

from __future__ import annotations

import errno
import fcntl
import uuid
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.errors import UserError
from ...core.files import write_whole
from ..checkpoints import MARKER, POINTER

LOCK = '.lock'
"""Locked while a training writes into the folder. A lock of the operating system ends with its process."""


@HOOKS.register_module()
class WorkDirHook(Hook):
    """Lock the work directory while training, and note which training its checkpoints belong to.

    A second training in it is refused. A new training leaves the checkpoints of an earlier one where they are, but
    `--resume` does not take them any more: until the new one has written its first, it would resume the old one.

    Example:
        custom_hooks = [dict(type='WorkDirHook')]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.lock: Any = None

    def before_train(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        self.lock = only_user(folder)
        if not is_main_process():
            return
        begins = not getattr(runner, 'resumed', False)
        if begins:
            runner.run_id = uuid.uuid4().hex
        if getattr(runner, 'run_id', ''):
            write_whole(folder / MARKER, runner.run_id.encode())
        else:  # goes on from a checkpoint that names no training
            (folder / MARKER).unlink(missing_ok=True)
        if begins:
            (folder / POINTER).unlink(missing_ok=True)

    def after_train(self, runner: Runner) -> None:
        """Unlock the folder; QuantRunner calls it also where training fails."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def only_user(folder: Path) -> Any:
    """Lock a folder for this training, in its main process; the lock lasts until what is returned is closed.

    Raises:
        UserError: in all processes, if another training has locked it.
    """
    lock, problem = None, ['']
    if is_main_process():
        lock = open(folder / LOCK, 'a')
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # else the file system knows no locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                problem = [f'another training is writing into {folder}; take another --work-dir, or wait for its end']
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return lock
