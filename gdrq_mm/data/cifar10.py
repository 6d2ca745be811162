"""CIFAR-10 (Krizhevsky 2009), unpacked from an archive that the user has, one folder for each class.

{train,test}/<class>/*.{jpg,png}      32x32, 50,000 and 10,000 pictures     (mmpretrain: CustomDataset)
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from rich.progress import track

from ..core.errors import UserError
from ..core.reading import read_pickle

CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
COUNTS = {'train': 50000, 'test': 10000}
LARGEST = 64 << 20
"""Bytes of a file in an archive; an official batch has half of it."""


def _official(name: str, data: bytes, source: str = 'CIFAR-10') -> Iterator[tuple[str, str, bytes]]:
    """The pictures of one official batch as ('split/class', file name, PNG bytes)."""
    batch = read_pickle(data, f'{source}: {name}', encoding='bytes')
    split = 'test' if name.startswith('test') else 'train'
    planes, labels = batch[b'data'], batch[b'labels']
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or not isinstance(labels, list):
        raise ValueError(f'{name} has no pixels or no labels')
    pictures = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)[..., ::-1]  # RGB planes to BGR pixels
    for number, (picture, label) in enumerate(zip(pictures, labels)):
        if type(label) is not int or label < 0:
            raise ValueError(f'{name} has the label {label!r}')
        ok, png = cv2.imencode('.png', np.ascontiguousarray(picture))
        assert ok
        yield f'{split}/{CLASSES[label]}', f'{name}_{number:05}.png', png.tobytes()


def _pictures(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    for member in archive:
        path = PurePosixPath(member.name)
        if not member.isfile():
            continue
        if member.size > LARGEST:
            raise ValueError(f'{member.name} claims {member.size} bytes')
        data = archive.extractfile(member).read()  # type: ignore[union-attr]
        if path.name.startswith(('data_batch_', 'test_batch')):
            yield from _official(path.name, data, str(archive.name))
        elif len(path.parts) >= 3 and path.parts[-3] in COUNTS and path.parts[-2] in CLASSES:
            yield '/'.join(path.parts[-3:-1]), path.name, data


def build(source: str | Path, root: str | Path, show_progress: bool = True) -> Path:
    """Unpack a CIFAR-10 archive with one folder for each class, or the official Python version.

    Raises:
        UserError: there is no archive, or it is damaged, or it does not have the number of pictures that CIFAR-10 has.
    """
    source, root = Path(source), Path(root)
    if root.is_dir() and _is_complete(root):
        return root
    if source.is_dir():
        archives = sorted(source.glob('cifar*10*.tar.gz'))
        if not archives:
            raise UserError(f'{source} holds no CIFAR-10 archive (cifar*10*.tar.gz)')
        source = archives[0]
    counts = {split: dict.fromkeys(CLASSES, 0) for split in COUNTS}
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(
        tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent)
    )  # nobody may take a half-filled folder for the data set
    try:
        with tarfile.open(source) as archive:
            for place, name, data in track(
                _pictures(archive), 'CIFAR-10', total=sum(COUNTS.values()), disable=not show_progress
            ):
                folder = unfinished / place
                if not counts[place.split('/')[0]][folder.name]:
                    folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
                counts[place.split('/')[0]][folder.name] += 1
        for split, expected in COUNTS.items():
            if set(counts[split].values()) != {expected // len(CLASSES)}:
                raise UserError(f'{source} has {sum(counts[split].values())} {split} pictures, CIFAR-10 has {expected}')
        for split in COUNTS:
            shutil.rmtree(root / split, ignore_errors=True)
            os.replace(unfinished / split, root / split)
    except UserError:
        raise
    # What tarfile, zlib and NumPy raise on a damaged archive, and a batch that is none.
    except (tarfile.TarError, zlib.error, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{source} is not a readable CIFAR-10 archive: {reason}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not any(root.iterdir()):
            root.rmdir()
    return root


def _is_complete(root: Path) -> bool:
    return all(
        (root / split / name).is_dir() and len(os.listdir(root / split / name)) == expected // len(CLASSES)
        for split, expected in COUNTS.items()
        for name in CLASSES
    )
