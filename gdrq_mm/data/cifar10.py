"""CIFAR-10 (Krizhevsky 2009), unpacked from an archive that the user has, one folder for each class.

{train,test}/<class>/*.{jpg,png}      32x32, 50,000 and 10,000 pictures     (mmpretrain: CustomDataset)
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from ..core.errors import UserError, of_machine
from ..core.reading import read_pickle
from .layout import building, tracked

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
        elif len(path.parts) >= 3 and path.parts[-3] in COUNTS and path.parts[-2] in CLASSES and _is_picture(path):
            yield '/'.join(path.parts[-3:-1]), path.name, data


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix.lower() in ('.png', '.jpg', '.jpeg') and not path.name.startswith('.')


def build(source: str | Path, root: str | Path, show_progress: bool = True) -> Path:
    """Unpack a CIFAR-10 archive with one folder for each class, or the official Python version.

    Raises:
        UserError: there is no archive, it is damaged, or it does not have the number of pictures that CIFAR-10 has; or
            `root` has something else in it.
    """
    source, root = Path(source), Path(root)
    if root.is_dir() and _is_complete(root):
        return root
    if source.is_dir():
        archives = sorted(source.glob('cifar*10*.tar.gz'))
        if not archives:
            raise UserError(f'{source} holds no CIFAR-10 archive (cifar*10*.tar.gz)')
        source = archives[0]
    with building(root) as folder:
        _unpack(source, folder, show_progress)
    return root


def _unpack(source: Path, folder: Path, show_progress: bool) -> None:
    """Write the pictures of an archive into a folder, which exists."""
    counts = {split: dict.fromkeys(CLASSES, 0) for split in COUNTS}
    try:
        bar = dict(total=sum(COUNTS.values()), disable=not show_progress)
        with tarfile.open(source) as archive, tracked(_pictures(archive), 'CIFAR-10', **bar) as pictures:
            for place, name, data in pictures:
                split, kind = place.split('/')
                if not counts[split][kind]:
                    (folder / place).mkdir(parents=True, exist_ok=True)
                counts[split][kind] += not (folder / place / name).exists()  # an archive may name a file twice
                (folder / place / name).write_bytes(data)
    except UserError:
        raise
    # What tarfile, zlib and NumPy raise on a damaged archive, and a batch that is none.
    except (tarfile.TarError, zlib.error, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and of_machine(error):
            raise
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{source} is not a readable CIFAR-10 archive: {reason}') from None
    for split, expected in COUNTS.items():
        if set(counts[split].values()) != {expected // len(CLASSES)}:
            raise UserError(f'{source} has {sum(counts[split].values())} {split} pictures, CIFAR-10 has {expected}')


def _is_complete(root: Path) -> bool:
    return all(
        (root / split / name).is_dir() and len(os.listdir(root / split / name)) == expected // len(CLASSES)
        for split, expected in COUNTS.items()
        for name in CLASSES
    )
