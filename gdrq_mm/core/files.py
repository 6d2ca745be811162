"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_digest(path: str | Path) -> str | None:
    """SHA-256 of a local file; None for an address."""
    if not os.path.isfile(path):
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


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
