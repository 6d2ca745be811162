"""What the preparations share: say what is missing, and write a data folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


def require(name: str, paths: Iterable[Path]) -> None:
    """Raise UserError that names the first missing paths and their number."""
    paths = list(paths)
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        shown = ', '.join(missing[:3]) + (', ...' if len(missing) > 3 else '')
        raise UserError(f'{name}: {len(missing)} of {len(paths)} paths are missing: {shown}')


@contextmanager
def building(root: Path) -> Iterator[Path]:
    """A folder beside `root` to fill; it takes the place of `root` if nothing goes wrong.

    Raises:
        UserError: `root` is there already and not empty, or cannot be written.
    """
    try:
        if root.is_dir() and any(root.iterdir()):
            raise UserError(f'{root} is there already; remove it to prepare it again')
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
        raise UserError(f'{root} cannot be written: {error.strerror or error}') from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
