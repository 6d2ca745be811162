"""Used by all data sets: name missing files, and write a data folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from rich.progress import track

from ..core.errors import UserError

T = TypeVar('T')


@contextmanager
def tracked(items: Iterable[T], text: str, **options: Any) -> Iterator[Iterable[T]]:
    """rich.progress.track, with a bar that ends with the block, by an error too: rich before 14.1 allows only one."""
    found: Any = track(items, text, **options)
    try:
        yield found
    finally:
        found.close()


def source_folder(source: str | Path, name: str = '') -> Path:
    """The folder `name` in the source if there is one, else the source.

    Raises:
        UserError: there is no such folder.
    """
    if not Path(source).is_dir():
        raise UserError(f'--source {source} is not a folder')
    inner = Path(source, name)
    return inner if inner.is_dir() else Path(source)


def require(name: str, paths: Iterable[Path]) -> None:
    """Raise UserError if paths do not exist."""
    refuse_missing(name, [p for p in paths if not p.exists()])


def read_list(path: Path, lines: bool = False) -> list[str]:
    """The words of a text file, or its lines.

    Raises:
        UserError: it is empty, or no text.
    """
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is no text: {error}') from None
    found = text.splitlines() if lines else text.split()
    if not found:
        raise UserError(f'{path} is empty')
    return found


def refuse_missing(name: str, missing: Sequence[str | Path]) -> None:
    """Raise UserError with the number of missing paths and the first of them, if there are any."""
    if missing:
        shown = ', '.join(map(str, missing[:3])) + (', ...' if len(missing) > 3 else '')
        what = '1 path is' if len(missing) == 1 else f'{len(missing)} paths are'
        raise UserError(f'{name}: {what} missing: {shown}')


def write_picture(path: Path, picture: np.ndarray, options: Sequence[int] = ()) -> None:
    """Write a picture, or raise OSError: OpenCV only returns False if the disk is full."""
    if not cv2.imwrite(str(path), picture, options):
        raise OSError(f'cannot write {path}')


@contextmanager
def building(root: Path) -> Iterator[Path]:
    """Yield a new folder beside `root` to fill; it becomes `root` if nothing goes wrong.

    Raises:
        UserError: `root` exists and is no empty folder, or cannot be written.
    """
    try:
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise UserError(f'{root} is there already; give another --out, or remove it to prepare it again')
        root.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    except OSError as error:
        raise UserError(f'{root} cannot be written: {error.strerror}') from None
    try:
        yield folder
        folder.chmod(0o755)
        if root.is_dir():
            root.rmdir()
        os.replace(folder, root)
    except OSError as error:
        raise UserError(f'{root} cannot be prepared: {error}') from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link(source: Path, root: Path, names: Iterable[str]) -> Path:
    """Fill `root` with links to folders of the source; does nothing if the source is `root`."""
    if source.resolve() != root.resolve():
        with building(root) as folder:
            for name in names:
                (folder / name).symlink_to((source / name).resolve())
    return root
