"""What may stand in a pickle: plain data, NumPy arrays, torch tensors; nothing in it runs.

A pickle is a program that may call anything it names. Here each name stands for a class or function of this module,
which checks what it is given. torch.load(weights_only=True) is not taken: before torch 2.6 it knows no names beside its
own, and it calls constructors that take as much memory as they are told to.
"""

from __future__ import annotations

import codecs
import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

MOST_OF_ONE = 1000
"""Largest number in a Counter."""
_DTYPE = re.compile(r'[<>|=]?(b1|\?|[iu][1248]|f[248]|c8|c16|[US]\d{1,9})')


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


def _collection(kind: type) -> Callable[..., Any]:
    """A function that makes a collection of a list: a tensor may repeat its one value without end."""

    def make(values: Any = ()) -> Any:
        if type(values) not in (list, tuple):
            raise pickle.UnpicklingError(f'Unsupported class {type(values).__name__} in a {kind.__name__}')
        return kind(values)

    return make


class _Counter(Stand):
    """How often the milestones of a learning rate stand in its list; `elements()` of large numbers would not end."""

    def __init__(self, counts: Any = None) -> None:
        self.counts = counts

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('Unsupported Counter with a state')

    def finished(self, finish: Callable[[Any], Any]) -> Counter[Any]:
        counts = {} if self.counts is None else finish(self.counts)
        if type(counts) is not dict or any(type(n) is not int or not 0 <= n <= MOST_OF_ONE for n in counts.values()):
            raise pickle.UnpicklingError('Unsupported counts of a Counter')
        return Counter(counts)


PLAIN: dict[str, Any] = {
    'numpy.ndarray': _Array,
    'numpy.dtype': _Dtype,
    'builtins.bytes': _no_bytes,
    'builtins.bytearray': _bytearray,
    'builtins.complex': complex,
    'builtins.set': _collection(set),
    'builtins.frozenset': _collection(frozenset),
    'collections.OrderedDict': _collection(OrderedDict),
    'collections.Counter': _Counter,
    '_codecs.encode': _encode,
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


# ---- tensors --------------------------------------------------------------------------------------------------------


class Storage:
    """The values of one or several tensors."""

    def __init__(self, content: Tensor, dtype: torch.dtype) -> None:
        """Args:
        content: the bytes, (N,) uint8.
        """
        self.flat = content.view(dtype)


class StorageType:
    """Stands for the type of a storage."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _TensorType(Stand):
    """Stands for torch.Tensor and torch.nn.Parameter where they are named."""


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, more: Any = None
) -> Tensor:
    """A tensor from its storage; stands for torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    if not isinstance(storage, Storage) or more:
        raise pickle.UnpicklingError('Unsupported class of tensor')
    flat, shapes = storage.flat, (tuple, torch.Size)
    if type(size) not in shapes or type(stride) not in shapes or len(size) != len(stride):
        raise ValueError(f'a tensor has the shape {size!r} and the strides {stride!r}')
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError(f'a tensor has the shape {size!r} and the strides {stride!r}')
    if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= flat.numel():
        raise ValueError(f'a tensor of shape {tuple(size)} is larger than its storage')
    found = torch.empty(0, dtype=flat.dtype).set_(flat.untyped_storage(), flat.storage_offset() + offset, size, stride)
    return found.requires_grad_(bool(requires_grad))


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, more: Any = None
) -> Tensor:
    """A tensor whose dtype has no storage type of its own; stands for torch._utils._rebuild_tensor_v3."""
    if not isinstance(storage, Storage) or type(dtype) is not torch.dtype:
        raise pickle.UnpicklingError('Unsupported class of tensor')
    return _tensor(Storage(storage.flat.view(torch.uint8), dtype), offset, size, stride, grad, hooks, more)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> torch.nn.Parameter:
    if type(data) is not Tensor:
        raise pickle.UnpicklingError(f'Unsupported class {type(data).__name__} of a parameter')
    return torch.nn.Parameter(data, bool(requires_grad))


def _with_attributes(function: Any, kind: Any, args: Any, state: Any) -> Tensor:
    """A tensor without its attributes, which could hide its methods."""
    if function not in (_tensor, _tensor_of_dtype, _parameter) or kind is not _TensorType or type(args) is not tuple:
        raise pickle.UnpicklingError('Unsupported class of tensor')
    return function(*args)


def _size(values: Any = ()) -> torch.Size:
    if type(values) not in (list, tuple):
        raise pickle.UnpicklingError('Unsupported class of a size')
    return torch.Size(values)


def _device(kind: Any, number: Any = None) -> torch.device:
    return torch.device(kind) if number is None else torch.device(kind, number)


_STORAGES = {
    'Float': torch.float32,
    'Double': torch.float64,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
    'ComplexFloat': torch.complex64,
    'ComplexDouble': torch.complex128,
}
TENSORS: dict[str, Any] = {
    **PLAIN,
    'torch.Tensor': _TensorType,
    'torch.nn.parameter.Parameter': _TensorType,
    'torch.Size': _size,
    'torch.device': _device,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of_dtype,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._tensor._rebuild_from_type_v2': _with_attributes,
    'torch.storage.UntypedStorage': StorageType(torch.uint8),
    **{
        f'{module}.{name}Storage': StorageType(dtype)
        for name, dtype in _STORAGES.items()
        for module in ('torch', 'torch.cuda')
    },
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
"""Names in what torch.save wrote -> what stands for them."""


# ---- the unpickler --------------------------------------------------------------------------------------------------

_Opcode = Callable[[Any], None]
_ORIGINAL: dict[int, _Opcode] = pickle._Unpickler.dispatch  # type: ignore[attr-defined]


def _changing(opcode: bytes, kinds: tuple[type, ...], target: Callable[[Any], Any]) -> _Opcode:
    """An opcode that changes values of these kinds only; it finds them by `target`."""

    def load(unpickler: Any) -> None:
        kind = type(target(unpickler))
        if kind not in kinds:
            raise pickle.UnpicklingError(f'Unsupported class {kind.__name__} to be changed')
        _ORIGINAL[opcode[0]](unpickler)

    return load


def _calling(opcode: bytes) -> _Opcode:
    """An opcode that calls or creates: only what find_class found, and with a tuple."""

    def load(unpickler: Any) -> None:
        function, args = unpickler.stack[-2:]
        if id(function) not in unpickler.callable or type(args) is not tuple:
            raise pickle.UnpicklingError(f'Unsupported class {type(function).__name__} to be called')
        _ORIGINAL[opcode[0]](unpickler)

    return load


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's unpickler in Python: that in C takes memory for as many values as a file says it has."""

    stack: list[Any]

    def __init__(
        self,
        file: BinaryIO,
        names: Mapping[str, Any],
        storage: Callable[..., Storage] | None = None,
        encoding: str = 'ASCII',
    ) -> None:
        """Args:
        names: full name of a class or function in the file -> what stands for it, a Stand or a function.
        storage: finds a storage by what a file of torch.save says of it.
        encoding: of the strings of Python 2.
        """
        super().__init__(file, encoding=encoding)
        self.names, self.storage = names, storage
        self.callable = set(map(id, names.values()))

    def find_class(self, module: str, name: str) -> Any:
        full = f'{"builtins" if module == "__builtin__" else module}.{name}'  # Python 2
        if full not in self.names:
            raise pickle.UnpicklingError(f'Unsupported name: GLOBAL {full}')
        return self.names[full]

    def persistent_load(self, known_as: Any) -> Any:
        if self.storage is None or type(known_as) is not tuple or known_as[:1] not in (('storage',), (b'storage',)):
            raise pickle.UnpicklingError('Unsupported class of a value that is not in the pickle')
        return self.storage(*known_as[1:])

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f'Unsupported name of extension {code}')

    def build(self) -> None:
        state, found = self.stack.pop(), self.stack[-1]
        if type(found) is OrderedDict and type(state) is dict:
            vars(found).update(state)  # the versions of modules in a state dict
        elif isinstance(found, Stand):
            found.__setstate__(state)
        else:
            raise pickle.UnpicklingError(f'Can only build arrays, not {type(found).__name__}')

    dispatch: ClassVar[dict[int, _Opcode]] = {
        **_ORIGINAL,
        pickle.BUILD[0]: build,
        **{opcode[0]: _calling(opcode) for opcode in (pickle.REDUCE, pickle.NEWOBJ)},
        pickle.APPEND[0]: _changing(pickle.APPEND, (list,), lambda self: self.stack[-2]),
        pickle.APPENDS[0]: _changing(pickle.APPENDS, (list,), lambda self: self.metastack[-1][-1]),
        pickle.ADDITEMS[0]: _changing(pickle.ADDITEMS, (set,), lambda self: self.metastack[-1][-1]),
        pickle.SETITEM[0]: _changing(pickle.SETITEM, (dict, OrderedDict), lambda self: self.stack[-3]),
        pickle.SETITEMS[0]: _changing(pickle.SETITEMS, (dict, OrderedDict), lambda self: self.metastack[-1][-1]),
    }


for _opcode in (pickle.OBJ, pickle.INST, pickle.NEWOBJ_EX):
    del Unpickler.dispatch[_opcode[0]]  # they call, and nothing that is allowed needs them
