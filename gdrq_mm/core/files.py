"""Files and folders that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def file_digest(path: str | Path) -> str | None:
    """SHA-256 of a local file; None for an address."""
    if not os.path.isfile(path):
        return None
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def write_whole(path: str | Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, sync, and move into place."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Create a folder, or say why that is impossible.

    Raises:
        UserError: it cannot be created, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.{os.getpid()}.probe'
        probe.touch()
        probe.unlink(missing_ok=True)  # a process on another machine may have the same number
    except OSError as error:
        raise UserError(f'work directory {folder} cannot be written: {error.strerror}') from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name `out` at the end; if something fails before, nothing is left.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    unfinished = out.with_name(f'.{out.name}.{os.getpid()}')
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f'{out} cannot be written: {error.strerror}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
