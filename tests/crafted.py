"""Files that are made to run code or to take memory when they are read; nothing here needs OpenMMLab."""

import io
import os
import pickle
import zipfile

import numpy as np
import torch

MULTIARRAY = (np.core if np.__version__ < '2' else np._core).multiarray


class Call:
    """Is what a function returns, and then gets a state, when it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def mark(path):
    """Creates a folder when it is unpickled."""
    return Call(os.mkdir, str(path))


def dtype(fields=None, size=8, order='|', name='V8'):
    """A NumPy dtype with a state of one's own."""
    names = tuple(fields) if fields else None
    return Call(np.dtype, name, False, True, state=(3, order, None, names, fields, size, 1, 0))


def array(kind, shape=(1,), values=bytes(8)):
    """A NumPy array with a dtype, shape and bytes of one's own."""
    return Call(MULTIARRAY._reconstruct, np.ndarray, (0,), b'b', state=(1, shape, kind, False, values))


FLOAT8 = np.dtype('f8')
ARRAYS = {
    'fields beyond the item': array(dtype({'a': (FLOAT8, 0), 'b': (FLOAT8, 1000)})),
    'fields before the item': array(dtype({'a': (FLOAT8, -1000)})),
    'fields': array(dtype({'a': (FLOAT8, 0)})),
    'objects': np.array([{}], object),
    'objects of bytes': array(Call(np.dtype, 'O8', False, True)),
    'more values than bytes': array(Call(np.dtype, 'f8', False, True), (1000,)),
    'a negative shape': array(Call(np.dtype, 'f8', False, True), (-1,)),
    'items of another size': array(dtype(size=8, order='<', name='f4')),
    'no values': Call(MULTIARRAY._reconstruct, np.ndarray, (0,), b'b'),
    'uninitialized memory': Call(np.ndarray, (1 << 40,)),
    'a scalar of another size': Call(MULTIARRAY.scalar, np.dtype('f8'), bytes(4)),
}
"""What is no array of numbers, although NumPy would make one of it."""


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A zip file with its parts changed by a function of name and content, and checksums made anew."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


def of_numpy_1(path):
    """Let a checkpoint look as if NumPy 1 had been there when it was written."""
    rewritten(path, lambda name, data: data.replace(b'numpy._core.', b'numpy.core.') if 'data.pkl' in name else data)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def shared(doublings):
    """A list that has 2^doublings values, of which most are the same."""
    value = [0]
    for _ in range(doublings):
        value = [value, value]
    return value


def cycle():
    value = []
    value.append(value)
    return value


LARGE = {
    'a bytearray of 64 GB': Call(bytearray, 1 << 36),
    'bytes of 64 GB': Call(bytes, 1 << 36),
    'a tensor of 64 GB': Call(torch.FloatTensor, 1 << 34),
    'a tensor that repeats a value': torch.zeros(1).expand(1 << 36),
    'a set of a tensor that repeats a value': Call(set, torch.zeros(1).expand(1 << 20)),
    'lists of lists': nested(300),
    'a list of itself': cycle(),
    'a list that is shared': shared(40),
}
"""What claims more than its file has."""


def deflated(path, size):
    """A checkpoint of zeros that is a thousandth of its size."""
    torch.save(dict(state_dict={'weight': torch.zeros(size // 4)}), path)
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)


def overlapping(path, times):
    """A checkpoint whose table of contents names the same bytes several times."""
    torch.save(dict(state_dict={'weight': torch.zeros(1 << 16)}), path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    with zipfile.ZipFile(path, 'a') as archive:
        part = next(part for part in archive.infolist() if part.filename.endswith('data/0'))
        for number in range(1, times):
            copy = zipfile.ZipInfo(names[0].replace('data.pkl', f'data/{number}'))
            for key in ('header_offset', 'CRC', 'compress_size', 'file_size'):
                setattr(copy, key, getattr(part, key))
            archive.filelist.append(copy)
        archive._didModify = True


def two_tables(path):
    """A checkpoint with a second one before it: torch's reader and zipfile may see different ones."""
    torch.save(dict(state_dict={'weight': torch.zeros(9)}), path)
    first = path.read_bytes()
    torch.save(dict(state_dict={'weight': torch.ones(9)}), path)
    path.write_bytes(first + path.read_bytes())


MEMO = pickle.PROTO + b'\x02' + pickle.NONE + pickle.LONG_BINPUT + (1 << 27).to_bytes(4, 'little') + pickle.STOP
"""A pickle for which CPython's unpickler takes 2 GB."""


def object_array(value):
    """A .npy file with an object."""
    file = io.BytesIO()
    np.save(file, np.array([value], object), allow_pickle=True)
    return file.getvalue()
