"""Checkpoints and pickles read as data: nothing in them runs, and nothing takes more memory than the file has bytes.

A pickle is a program that may call anything it names. Here the names of NumPy stand for classes of this module, which
check what they are given; of torch's own names those count that torch.load(weights_only=True) knows.
"""

from __future__ import annotations

import codecs
import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

DEPTH = 100
"""Containers inside each other that a file may have (ours)."""
SMALL = 1 << 20
"""Bytes or values that a file of any size may hold (ours)."""
_DTYPE = re.compile(r'[<>|=]?(b1|\?|[iu][1248]|f[248]|c8|c16|[US]\d{1,9})')
_REFUSED = re.compile(r'(GLOBAL [\w.]+|Unsupported (?:global|class|attribute|array|name)[^\n]*|Can only build[^\n]*)')


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
    if content is None and not Path(path).is_file():
        raise UserError(f'checkpoint {path} does not exist{_neighbours(Path(path))}')
    size = Path(path).stat().st_size if content is None else len(content)
    if size == 0:
        raise UserError(f'checkpoint {path} is empty')

    def source() -> Any:
        return str(path) if content is None else io.BytesIO(content)

    try:
        if zipfile.is_zipfile(source()):
            _check_archive(source(), size)
        if unsafe:
            return torch.load(source(), map_location='cpu', weights_only=False)
        with _only({**PLAIN, **(names or {})}):
            loaded = torch.load(source(), map_location='cpu', weights_only=True)
        return _Finisher(size).finish(loaded)
    except Exception as error:  # a damaged file can raise anything in the unpickler
        refused = _REFUSED.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f'checkpoint {path} holds more than tensors and plain data and was not loaded: {refused[1]}{hint}'
            ) from None
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        if 'Weights only load failed' in reason:  # followed by advice that is not ours
            reason = 'it cannot be read as tensors and plain data'
        raise UserError(f'checkpoint {path} is truncated or damaged: {reason}') from None


def read_pickle(content: bytes, name: str, encoding: str = 'ASCII', hint: str = '') -> Any:
    """The plain data and NumPy arrays in a pickle; messages call it `name`.

    Args:
        encoding: of the strings of Python 2, as for pickle.loads.
        hint: ends the message where a file is refused for what it holds.

    Raises:
        UserError: damaged, or with anything else in it.
    """
    try:
        return _Finisher(len(content)).finish(_PlainUnpickler(io.BytesIO(content), encoding=encoding).load())
    except Exception as error:  # a damaged file can raise anything in the unpickler
        reason = f'{type(error).__name__} {error}'.splitlines()[0]
        refused = _REFUSED.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(f'{name} holds more than plain data and was not loaded: {refused[1]}{hint}') from None
        raise UserError(f'{name} is no pickle of plain data: {reason}') from None


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
        if vars(value):
            value = Tensor.detach(value)  # its attributes could hide its methods
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized or value.is_nested:
            raise pickle.UnpicklingError(f'Unsupported class of tensor: {value.layout}, {value.device}')
        if value.numel() * value.element_size() > self.limit:
            raise ValueError(f'a tensor of shape {tuple(value.shape)} is larger than the file')
        return value


_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray),
    *(torch.dtype, torch.device),
)


# ---- names ----------------------------------------------------------------------------------------------------------


class Stand:
    """Stands for an object in a pickle until all is read."""

    def __init__(self, *args: Any) -> None:
        raise pickle.UnpicklingError(f'Unsupported class {type(self).__name__} with arguments')

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def finished(self, finish: Callable[[Any], Any]) -> Any:
        """What comes in its place.

        Args:
            finish: replaces the stands in a value, such as its state.

        Raises:
            pickle.UnpicklingError, ValueError: its state is not what it has to be.
        """
        raise NotImplementedError


class _Dtype(Stand):
    """A dtype of numbers or strings."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f'Unsupported array of dtype {str(name)[:40]!r}')
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) not in (8, 9) or state[2:5] != (None, None, None):
            raise pickle.UnpicklingError('Unsupported array of a dtype with fields')
        order = state[1].decode('ascii') if isinstance(state[1], bytes) else state[1]
        if order not in ('<', '>', '|', '=') or state[5] not in (-1, self.dtype.itemsize):
            raise pickle.UnpicklingError(f'Unsupported array of a dtype with {state[5]} bytes')
        self.dtype = self.dtype.newbyteorder(order)  # type: ignore[arg-type]

    def finished(self, finish: Callable[[Any], Any]) -> np.dtype:
        return self.dtype


class _Array(Stand):
    """An array of numbers or strings."""

    def finished(self, finish: Callable[[Any], Any]) -> np.ndarray:
        if not isinstance(getattr(self, 'state', None), tuple) or len(self.state) != 5:
            raise pickle.UnpicklingError('Unsupported array without values')
        _, shape, dtype, fortran, values = self.state
        return _array(values, dtype, shape, 'F' if fortran else 'C')


def _array(values: Any, dtype: Any, shape: Any, order: str = 'C', axes: Any = None) -> np.ndarray:
    """An array from its bytes; stands for numpy._core.numeric._frombuffer too."""
    if isinstance(values, str):  # Python 2, encoding latin1
        values = values.encode('latin1')
    if not isinstance(dtype, _Dtype) or not isinstance(values, (bytes, bytearray)) or axes is not None:
        raise pickle.UnpicklingError('Unsupported array of objects')
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape) or order not in ('C', 'F'):
        raise ValueError(f'an array has the shape {shape!r}')
    if math.prod(shape) * dtype.dtype.itemsize != len(values):
        raise ValueError(f'an array of shape {shape} has {len(values)} bytes')
    return np.ndarray(shape, dtype.dtype, bytearray(values), order=order)  # type: ignore[arg-type]


def _new_array(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError('Unsupported class of an array')
    return _Array.__new__(_Array)


def _scalar(dtype: Any, value: Any = b'') -> Any:
    return _array(value, dtype, ())[()]


def _no_bytes(*args: Any) -> bytes:
    """Stands for `bytes`, which Python 2's protocol calls for an empty one; `bytes(n)` would take n bytes."""
    if args:
        raise pickle.UnpicklingError('Unsupported name bytes with arguments')
    return b''


def _bytearray(values: Any = b'', encoding: str = 'latin1') -> bytearray:
    return bytearray(_encode(values, encoding) if isinstance(values, str) else memoryview(values))


def _encode(text: str, encoding: str = 'latin1') -> bytes:
    if encoding not in ('latin1', 'latin-1', 'utf-8', 'utf8', 'ascii'):
        raise pickle.UnpicklingError(f'Unsupported name of an encoding {encoding!r}')
    return codecs.encode(text, encoding)


PLAIN: dict[str, Any] = {
    'numpy.ndarray': _Array,
    'numpy.dtype': _Dtype,
    'builtins.bytes': _no_bytes,
    'collections.OrderedDict': OrderedDict,
    **{
        f'numpy.{core}.{name}': stand
        for core in ('core', '_core')  # NumPy 1 and 2
        for name, stand in {
            'multiarray._reconstruct': _new_array,
            'multiarray.scalar': _scalar,
            'numeric._frombuffer': _array,
        }.items()
    },
}
"""Names in pickles -> what stands for them."""
_PICKLES = {
    **PLAIN,
    **{f'{module}.{kind.__name__}': kind for module in ('builtins', '__builtin__') for kind in (set, frozenset)},
    **{f'{module}.bytearray': _bytearray for module in ('builtins', '__builtin__')},
    **{'__builtin__.bytes': _no_bytes, 'builtins.complex': complex, '__builtin__.complex': complex},
    '_codecs.encode': _encode,
}


@contextmanager
def _only(names: Mapping[str, Any]) -> Iterator[None]:
    """Let torch.load know these names beside its own, and no other that this process has added."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(stand, name) for name, stand in names.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(added)


class _PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's unpickler in Python: that in C takes memory for as many values as a file says it has."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        found = _PICKLES.get(f'{module}.{name}')
        if found is None:
            raise pickle.UnpicklingError(f'Unsupported name: GLOBAL {module}.{name}')
        return found

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f'Unsupported name of extension {code}')

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Stand):
            raise pickle.UnpicklingError(f'Can only build arrays, not {type(self.stack[-1]).__name__}')
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = build


def _neighbours(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob('*.pth')) if path.parent.is_dir() else []
    return f'; {path.parent} has {", ".join(found[:5])}' if found else ''
