"""Checkpoints and pickles read as data: nothing in them runs, and nothing takes more memory than the file has bytes."""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .unpickling import PLAIN, TENSORS, Stand, Storage, StorageType, Unpickler

DEPTH = 100
"""Containers inside each other that a file may have (ours)."""
SMALL = 1 << 20
"""Bytes or values that a file of any size may hold (ours)."""
_REFUSED = re.compile(r'(GLOBAL [\w.]+|Unsupported (?:global|class|attribute|array|name)[^\n]*|Can only build[^\n]*)')


OTHER_KINDS = {'.safetensors': 'a safetensors file, as a packed model is', '.onnx': 'an ONNX graph'}
"""How a file is named that is none of torch.save -> what it is."""


def read_torch(
    path: str | Path,
    names: Mapping[str, Any] | None = None,
    unsafe: bool = False,
    content: bytes | None = None,
    hint: str = '',
) -> Any:
    """What torch.save wrote, on the CPU; its tensors, arrays and plain data only.

    Args:
        names: full name of a class or function in the file -> what stands for it, a Stand or a function.
        unsafe: unpickle anything. That runs whatever code the file holds.
        content: the bytes of the file, if `path` is an address or a name.
        hint: ends the message where a file is refused for what it holds.

    Raises:
        UserError: missing, empty, truncated, compressed, or with anything in it but tensors and plain data.
    """
    if content is None and Path(path).is_dir():
        found = ', '.join(sorted(each.name for each in Path(path).glob('*.pth'))[:5]) or 'none'
        raise UserError(f'checkpoint {path} is a folder; the checkpoints in it: {found}')
    if content is None and not Path(path).is_file():
        raise UserError(f'checkpoint {path} does not exist{_neighbours(Path(path))}')
    size = Path(path).stat().st_size if content is None else len(content)
    if size == 0:
        raise UserError(f'checkpoint {path} is empty')

    try:
        with open(path, 'rb') if content is None else io.BytesIO(content) as file:
            zipped = file.read(4) == b'PK\3\4'
            if zipped:
                _check_archive(file, size)
            file.seek(0)
            if unsafe:
                return torch.load(file, map_location='cpu', weights_only=False)
            read = _read_archive if zipped else _read_old_format
            return _Finisher(size).finish(read(file, {**TENSORS, **(names or {})}, size))
    except Exception as error:  # a damaged file can raise anything in the unpickler
        refused = _REFUSED.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f'checkpoint {path} holds more than tensors and plain data and was not loaded: {refused[1]}{hint}'
            ) from None
        if (kind := OTHER_KINDS.get(Path(path).suffix)) is not None:
            raise UserError(f'{path} is {kind}, not a checkpoint as a training writes it') from None
        raise UserError(f'checkpoint {path} is truncated or damaged: {_reason(error)}') from None


def read_pickle(content: bytes, name: str, encoding: str = 'ASCII', hint: str = '') -> Any:
    """The plain data and NumPy arrays in a pickle; messages call it `name`.

    Args:
        encoding: of the strings of Python 2, as for pickle.loads.
        hint: ends the message where a file is refused for what it holds.

    Raises:
        UserError: damaged, or with anything else in it.
    """
    try:
        return _Finisher(len(content)).finish(Unpickler(io.BytesIO(content), PLAIN, encoding=encoding).load())
    except Exception as error:  # a damaged file can raise anything in the unpickler
        refused = _REFUSED.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(f'{name} holds more than plain data and was not loaded: {refused[1]}{hint}') from None
        raise UserError(f'{name} is no pickle of plain data: {_reason(error)}') from None


def _reason(error: Exception) -> str:
    text = str(error) if type(error) is ValueError else f'{type(error).__name__} {error}'
    return text.splitlines()[0]


# ---- the two formats of torch.save ----------------------------------------------------------------------------------

_MAGIC, _FORMAT = 0x1950A86A20F9469CFC6C, 1001
"""What a file in the format of before torch 1.6 begins with."""


def _read_archive(file: BinaryIO, names: Mapping[str, Any], size: int) -> Any:
    """The value in a zip file: `data.pkl`, and a part for each storage."""
    with zipfile.ZipFile(file) as archive:
        folder, parts = archive.namelist()[0].partition('/')[0], set(archive.namelist())
        if f'{folder}/byteorder' in parts and archive.read(f'{folder}/byteorder').decode() != sys.byteorder:
            raise ValueError('its numbers have the byte order of another kind of processor')
        read: dict[str, Tensor] = {}

        def storage(kind: Any, key: Any, location: Any, count: Any, *others: Any) -> Storage:
            dtype = _storage_dtype(kind, key, count)
            if key not in read:
                content = bytearray(archive.read(f'{folder}/data/{key}'))
                read[key] = (
                    torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
                )
            return Storage(read[key], dtype)

        return Unpickler(io.BytesIO(archive.read(f'{folder}/data.pkl')), names, storage, 'utf-8').load()


def _read_old_format(file: Any, names: Mapping[str, Any], size: int) -> Any:
    """The value in a file of the format before torch 1.6, which published checkpoints have: pickles, then storages."""
    source: Any = _Clipped(file, size)
    try:
        known = Unpickler(source, {}).load() == _MAGIC and Unpickler(source, {}).load() == _FORMAT
    except Exception:
        known = False
    if not known:
        raise ValueError('it cannot be read as tensors and plain data')
    Unpickler(source, {}).load()  # about the machine that wrote it
    empty: dict[str, tuple[Tensor, int]] = {}

    def storage(kind: Any, key: Any, location: Any, count: Any, view: Any = None) -> Storage:
        dtype = _storage_dtype(kind, key, count)
        if key not in empty:
            if sum(len(content) for content, _ in empty.values()) + count * dtype.itemsize > size:
                raise ValueError('its storages claim more bytes than it has')
            empty[key] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8), count
        found = Storage(empty[key][0], dtype)
        if view is not None:
            _, start, length = view
            found.flat = found.flat[start : start + length]
        return found

    value = Unpickler(source, names, storage, 'utf-8').load()
    keys = Unpickler(source, {}).load()
    if type(keys) is not list or sorted(keys) != sorted(empty):
        raise ValueError('its storages are not those of its tensors')
    for key in keys:
        content, count = empty[key]
        if struct.unpack('<q', file.read(8)) != (count,) or file.readinto(content.numpy()) != len(content):
            raise ValueError(f'the storage {key} is not whole')
    return value


def _storage_dtype(kind: Any, key: Any, count: Any) -> torch.dtype:
    if not isinstance(kind, StorageType) or type(key) is not str or type(count) is not int or count < 0:
        raise pickle.UnpicklingError('Unsupported class of a storage')
    return kind.dtype


class _Clipped:
    """A file that takes memory for as many bytes as it has, however many are asked for."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _check_archive(source: Any, size: int) -> None:
    """Raise ValueError if the parts of a zip file are compressed, overlap, or do not fit their checksums.

    torch.save compresses nothing, so that the parts of a file have less bytes than the file.
    """
    with zipfile.ZipFile(source) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size for part in parts):
            raise ValueError('its parts are compressed, which torch.save never does')
        if sum(part.file_size for part in parts) > size or len({part.filename for part in parts}) != len(parts):
            raise ValueError('its parts claim more bytes than it has')
        _check_directory(archive, size)
        if archive.testzip() is not None:  # torch does not look at the checksums that it writes
            raise ValueError('a checksum does not fit')


def _check_directory(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError where torch's reader could find another table of contents than zipfile does."""
    assert archive.fp is not None
    archive.fp.seek(max(0, size - 98))
    tail = archive.fp.read().rjust(98, b'\0')
    start = struct.unpack_from('<I', tail, 92)[0]
    wide = tail[56:60] == b'PK\6\7'
    if wide:
        start = struct.unpack_from('<Q', tail, 48)[0]
        if struct.unpack_from('<Q', tail, 64)[0] != size - 98:
            raise ValueError('its table of contents is not at its end')
    if tail[76:80] != b'PK\5\6' or tail[96:] != b'\0\0' or start != archive.start_dir:  # type: ignore[attr-defined]
        raise ValueError('its table of contents is not at its end')


class _Finisher:
    """Checks what was unpickled, and puts what a Stand stands for in its place."""

    def __init__(self, size: int) -> None:
        self.limit = max(size, SMALL)
        self.open: set[int] = set()
        self.done: dict[int, tuple[Any, Any, int]] = {}
        """Id of a container -> the container, what comes in its place, and how many values it has."""

    def finish(self, value: Any) -> Any:
        """The value without stands.

        Raises:
            pickle.UnpicklingError, ValueError: it is more than data, or larger than the file.
        """
        return self._finish(value)[0]

    def _finish(self, value: Any) -> tuple[Any, int]:
        kind = type(value)
        if kind in _ATOMS or isinstance(value, np.generic):
            if kind in (bytes, bytearray, str) and len(value) > self.limit:
                raise ValueError('a string is longer than the file')
            return value, 1
        if kind in (Tensor, torch.nn.Parameter):
            return self._tensor(value), 1
        if kind is np.ndarray:
            if value.nbytes > self.limit:
                raise ValueError(f'an array of shape {value.shape} is larger than the file')
            return value, 1
        if id(value) in self.done:
            return self.done[id(value)][1:]
        if len(self.open) >= DEPTH or id(value) in self.open:
            raise ValueError(f'its data are nested more than {DEPTH} times')
        self.open.add(id(value))
        found, count = self._container(value)
        self.open.remove(id(value))
        if count > self.limit:
            raise ValueError('it claims more values than it has bytes')
        self.done[id(value)] = value, found, count
        return found, count

    def _container(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, Stand):
            return value.finished(self.finish), 1
        kind, count = type(value), 1
        if kind in (dict, OrderedDict):
            for key in value:
                count += self._key(key)
                value[key], more = self._finish(value[key])
                count += more
            if kind is OrderedDict and vars(value):
                value.__dict__, more = self._finish(vars(value))  # the versions of modules in a state dict
                count += more
            return value, count
        if kind in (list, tuple, torch.Size):
            items = [self._finish(item) for item in value]
            count += sum(more for _, more in items)
            if kind is list:
                value[:] = [item for item, _ in items]
                return value, count
            return kind(item for item, _ in items), count
        if kind in (set, frozenset):
            return value, count + sum(self._key(item) for item in value)
        raise pickle.UnpicklingError(f'Unsupported class {kind.__module__}.{kind.__qualname__}')

    def _key(self, key: Any) -> int:
        if type(key) not in (*_ATOMS, tuple, frozenset) and not isinstance(key, np.generic):
            raise pickle.UnpicklingError(f'Unsupported class {type(key).__name__} of a key')
        return self._finish(key)[1]

    def _tensor(self, value: Tensor) -> Tensor:
        if value.numel() * value.element_size() > self.limit:
            raise ValueError(f'a tensor of shape {tuple(value.shape)} is larger than the file')
        return value


_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.dtype, torch.device),
)


def _neighbours(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob('*.pth')) if path.parent.is_dir() else []
    return f'; {path.parent} has {", ".join(found[:5])}' if found else ''
