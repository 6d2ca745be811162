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
    """Write to a temporary name beside `path`, sync, and move into place.

    A link stays, and so does what is no file, such as /dev/null or a pipe: it is written to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path, name: str = 'work directory') -> None:
    """Create a folder, or say why that is impossible.

    Args:
        name: what a message calls it.

    Raises:
        UserError: it cannot be created, or nothing can be written into it.
    """
    try:
        _create(folder)
    except OSError as error:
        raise UserError(f'{name} {folder} cannot be written: {error.strerror}') from None


def check_file(path: str | Path, option: str) -> None:
    """Create the folder of a file that is to be written, or say why that is impossible.

    Args:
        option: what names the file on the command line.

    Raises:
        UserError: it is a folder, or its folder cannot be created or written into.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise UserError(f'{option} {path} is a folder, and cannot be written as a file')
    try:
        if real.is_file() or not real.exists():  # else it is no file, see write_whole
            _create(real.parent)
    except OSError as error:
        raise UserError(f'{option} {path} cannot be written: {error.strerror}') from None


def _create(folder: Path) -> None:
    """Create a folder and write into it, or raise OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.{os.getpid()}.probe'
    probe.touch()
    probe.unlink(missing_ok=True)  # a process on another machine may have the same number


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
