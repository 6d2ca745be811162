"""Signals, forks, memory, and the ends of processes.

Importing this changes nothing. A training listens to signals from its start to its end; processes that it forks
meanwhile end at them, and its data workers outlive them.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What slurm sends before it takes the machine away: as `--signal=USR1@seconds` asks, or by itself."""
RUNTIMES = ('onnxruntime', 'openvino')
"""Packages with threads of their own, which are there as soon as the package is imported."""


# ---- signals --------------------------------------------------------------------------------------------------------


class Listener:
    """Notes the last of SIGNALS that came, and keeps it from ending the process, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def start(self) -> None:
        """Nothing is done outside the main thread: Python allows it there only."""
        if threading.current_thread() is threading.main_thread():
            _follow_forks()
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def stop(self) -> None:
        """Give the signals back. Twice is the same as once."""
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number


# ---- memory ---------------------------------------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of <malloc.h>."""


def keep_freed_memory() -> None:
    """Keep what tensors on a CPU free for the next ones; a C library other than glibc is left as it is.

    glibc gives large blocks back to the system, which fills them with zeros when they are taken anew: 12 % of a
    training step of ResNet-18, for 3 % more memory. MALLOC_ variables of the environment are followed instead.
    """
    if any(name.startswith('MALLOC_') for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---- forks ----------------------------------------------------------------------------------------------------------


@cache
def _follow_forks() -> None:
    """Let forked processes end at a signal while somebody listens.

    They inherit the handler, so they would note the signal and live on; the pool of mmdet's VOCMetric ends its workers
    by SIGTERM and waits for them without limit. Python cannot take a fork hook back, so each asks who listens.
    """
    os.register_at_fork(before=_hold_signals, after_in_parent=_go_on, after_in_child=_end_at_signals)


def _listening() -> bool:
    return any(isinstance(getattr(signal.getsignal(number), '__self__', None), Listener) for number in SIGNALS)


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
    parent = multiprocessing.parent_process()  # getppid() would be the fork server, where there is one
    assert parent is not None
    while signal.sigwaitinfo(SIGNALS).si_pid != parent.pid:
        pass
    os._exit(0)


# ---- ends -----------------------------------------------------------------------------------------------------------


def leave(end: str | int) -> NoReturn:
    """End this process as sys.exit does, with a last line or an exit code, and its data workers in any case.

    Data workers get no time to stop: they are shielded from signals, and one may hang. Where there were several
    processes, data workers or a runtime, the process ends without the clean-up of the interpreter and of C++. The
    threads of gloo, OpenMP or a runtime may still run then, and destroying them can abort a process that has done its
    work, or block it for ever.
    """
    workers = multiprocessing.active_children()
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (workers or several or any(name in sys.modules for name in RUNTIMES)):
        sys.exit(end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises when a data worker is killed
    for worker in workers:
        worker.kill()
    if isinstance(end, str):
        print(end, file=sys.stderr)
        end = 1
    if end == os.EX_OK and several:
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # loggers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)
