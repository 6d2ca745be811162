"""Read checkpoints without running code in them, and write them whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.fileio import get as fetch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from ..core.errors import UserError
from ..core.files import file_digest
from ..core.reading import read_torch
from ..core.unpickling import Stand

POINTER = 'last_checkpoint'
"""mmengine's file in a work directory that holds the path of the newest checkpoint."""
MARKER = '.training'
"""Our file in a work directory that says which training was begun there last; its checkpoints name it too."""


class _History(Stand):
    """Stands for mmengine's HistoryBuffer, which its message hub keeps in a training checkpoint."""

    def finished(self, finish: Callable[[Any], Any]) -> HistoryBuffer:
        state = finish(getattr(self, 'state', None))
        values: list[Any] = (
            [state.get(key) for key in ('_log_history', '_count_history')] if isinstance(state, dict) else []
        )
        if not values or any(not isinstance(v, np.ndarray) or v.ndim != 1 or v.dtype.kind not in 'iuf' for v in values):
            raise pickle.UnpicklingError('Unsupported class HistoryBuffer without its arrays')
        if len(values[0]) != len(values[1]):
            raise ValueError('a history has other lengths of its values and counts')
        limit = state.get('max_length')
        return HistoryBuffer(*values, **(dict(max_length=limit) if type(limit) is int and limit > 0 else {}))


class _OneCycle(Stand):
    """Stands for mmengine's OneCycleParamScheduler, of which its state dict names a function."""


_ATTRIBUTES: dict[Any, tuple[type, tuple[str, ...]]] = {
    _History: (HistoryBuffer, ('max', 'min', 'current', 'mean')),
    _OneCycle: (OneCycleParamScheduler, ('_annealing_cos', '_annealing_linear')),
}
"""Stand for a class -> the class, and its attributes that a checkpoint may name."""


class _Attribute(Stand):
    """Stands for a function of a class, such as a statistic of a HistoryBuffer."""

    def __init__(self, owner: Any, name: Any) -> None:
        known = _ATTRIBUTES.get(owner) if isinstance(owner, type) else None
        if known is None or type(name) is not str or name not in known[1]:
            raise pickle.UnpicklingError(f'Unsupported attribute {name!r} of {getattr(owner, "__name__", owner)!r}')
        self.owner, self.state = known[0], name

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('Unsupported attribute with a state')

    def finished(self, finish: Callable[[Any], Any]) -> Any:
        return getattr(self.owner, self.state)


NAMES: dict[str, Any] = {
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': _OneCycle,
    'builtins.getattr': _Attribute,
}
HINT = ' (--unsafe-load runs what it holds)'


def checkpoints_before(checkpoint: str, number: int) -> list[str]:
    """The checkpoints that a training wrote before this one, the newest first.

    Args:
        checkpoint: path of a file such as `epoch_20.pth`; those before it are in its folder.
        number: of files wanted, 0 or more.

    Raises:
        UserError: there are fewer, or the file's name has no number.
    """
    if number < 0:
        raise UserError(f'--last {number + 1}: at least 1')
    if number == 0:
        return []
    path = Path(checkpoint)
    named = re.fullmatch(r'(\D*)(\d+)(\.\w+)', path.name)
    if named is None:
        raise UserError(f'--last: {path.name} is not named like epoch_20.pth')
    found = {}
    for other in path.parent.glob(f'{named[1]}*{named[3]}'):
        count = re.fullmatch(rf'{re.escape(named[1])}(\d+){re.escape(named[3])}', other.name)
        if count and int(count[1]) < int(named[2]):
            found[int(count[1])] = str(other)
    if len(found) < number:
        raise UserError(
            f'--last {number + 1}: at most {len(found) + 1}, {path.parent} has {len(found)} checkpoints before '
            f'{path.name}; a training keeps default_hooks.checkpoint.max_keep_ckpts'
        )
    return [found[count] for count in sorted(found, reverse=True)[:number]]


_FETCHED: dict[str, str] = {}
"""Address -> SHA-256 of what was fetched from it."""


def checkpoint_digest(filename: str) -> str | None:
    """SHA-256 of a file, or of what this process has fetched from an address; None of another address."""
    return file_digest(filename) or _FETCHED.get(filename)


def read_checkpoint(filename: str, unsafe: bool = False) -> dict[str, Any]:
    """A checkpoint as a dict, on the CPU; its tensors and plain data only.

    Args:
        filename: a local path or an http(s) address.
        unsafe: unpickle anything. That runs whatever code the file holds.

    Raises:
        UserError: missing, empty, truncated, compressed, not a checkpoint, or with more than tensors and plain data.
    """
    content = None
    if '://' in filename:
        try:
            content = fetch(filename)
            _FETCHED[filename] = hashlib.sha256(content).hexdigest()
        except Exception as error:  # each storage backend has errors of its own
            reason = f'{type(error).__name__} {error}'.splitlines()[0]
            raise UserError(f'checkpoint {filename} cannot be fetched: {reason}') from None
    checkpoint = read_torch(filename, NAMES, unsafe, content, HINT)
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state, dict):
        raise UserError(f'checkpoint {filename} holds a {type(state).__name__}, not a dict of tensors')
    for name in state:
        if not isinstance(name, str):
            raise UserError(f'checkpoint {filename} has the name {name!r}, which is not a string')
    return checkpoint


def find_resumable(work_dir: str | Path, out_dir: str | Path | None = None, unsafe: bool = False) -> tuple[str, str]:
    """The checkpoint from which the training of a work directory goes on.

    The one that `last_checkpoint` names if it is whole; no other is read then. Else, of the whole ones in the work
    directory, the one after most iterations. Those of an earlier training than the last that was begun do not count.

    Args:
        out_dir: the folder of the checkpoints, if it is not the work directory.

    Returns:
        Its path, '' if there is nothing to resume; and why it is not that of `last_checkpoint`, '' if it is or if there
        is none.

    Raises:
        UserError: a training was begun here, but none of its checkpoints is whole.
    """
    pointer, run = Path(work_dir) / POINTER, _begun_last(work_dir)
    named = newest(work_dir)
    earlier: list[Any] = []
    if named:
        try:
            checkpoint = read_checkpoint(named, unsafe=unsafe)
            if iterations_of(checkpoint) is None:
                reason = f'{named} does not hold the state of a training'
            elif _is_of(checkpoint, run):
                return named, ''
            else:
                reason = f'{named} is of an earlier training'
        except UserError as error:
            reason = str(error)
    else:
        reason = f'{pointer} {"is empty" if pointer.exists() else "is missing"}'
    whole: list[Any] = []
    damaged = []
    for path in sorted({p for folder in {work_dir, out_dir or work_dir} for p in Path(folder).glob('*.pth')}):
        try:
            checkpoint = read_checkpoint(str(path), unsafe=unsafe)
        except UserError:
            damaged.append(path.name)
            continue
        iterations = iterations_of(checkpoint)
        if iterations is not None and 'optimizer' in checkpoint:  # those of the best score have none
            (whole if _is_of(checkpoint, run) else earlier).append((iterations, str(path)))
    if whole:
        return max(whole)[1], reason
    if not damaged and (earlier or not pointer.exists()):
        return '', f'the training that was begun last in {work_dir} has not written a checkpoint yet' if earlier else ''
    others = f', nor is {", ".join(damaged)}' if damaged else ''
    raise UserError(
        f'{work_dir} has no whole checkpoint to resume from: {reason}{others}; leave --resume out to start anew'
    )


def _begun_last(work_dir: str | Path) -> str:
    """The training that was begun last in a work directory; '' if nothing says so."""
    marker = Path(work_dir) / MARKER
    return marker.read_text(errors='replace').strip() if marker.is_file() else ''


def _is_of(checkpoint: Mapping[str, Any], run: str) -> bool:
    """Whether a training checkpoint is of this training, or may be."""
    theirs = checkpoint['meta'].get('run')
    return not run or (isinstance(theirs, str) and theirs == run)


def iterations_of(checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Iterations and epochs of the training whose state a checkpoint holds; None if it holds weights only."""
    meta = checkpoint.get('meta')
    found = tuple(meta.get(key) for key in ('iter', 'epoch')) if isinstance(meta, dict) else ()
    whole = 'message_hub' in checkpoint and len(found) == 2 and all(type(n) is int and n >= 0 for n in found)
    return found if whole else None  # type: ignore[return-value]


def newest(work_dir: str | Path) -> str:
    """The newest checkpoint of a work directory as `last_checkpoint` names it; '' if it names none."""
    pointer = Path(work_dir) / POINTER
    return os.fsdecode(pointer.read_bytes()).strip() if pointer.is_file() else ''


def last_written(work_dir: str | Path) -> str:
    """Says which checkpoint of a work directory is the last good one."""
    named = newest(work_dir)
    return f'the last good checkpoint is {named}' if named else 'no checkpoint had been written yet'


@contextmanager
def written_whole(out_dir: str, filename: str, work_dir: str | Path) -> Iterator[str]:
    """Gives a temporary file name for a checkpoint; what was written there is moved into place at the end.

    So the file is whole or not there. An address is written in place.

    Raises:
        UserError: it cannot be written, as on a full disk; older checkpoints are as they were.
    """
    if '://' in out_dir:
        yield filename
        return
    temporary, path = f'.{filename}.tmp', os.path.join(out_dir, filename)
    source = os.path.join(out_dir, temporary)
    try:
        yield temporary
        with open(source, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(source, path)
    except OSError as error:
        raise UserError(f'checkpoint {path} cannot be written: {error.strerror}; {last_written(work_dir)}') from error
    finally:
        with suppress(OSError):  # a folder may have become read-only
            Path(source).unlink(missing_ok=True)
