"""What the OpenMMLab libraries read while they build and run is data: nothing in a file runs.

onedl-mmengine 0.10.12 unpickles a checkpoint without limits where it holds more than weights
(https://github.com/open-mmlab/mmengine/pull/1650 asks for limits). Its file handlers, used for annotations, proposals
and class weights, run what .pkl and .yml files hold; mmdet allows objects in .npy files.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import yaml

from ..core.errors import UserError
from ..core.reading import read_pickle, read_torch
from .checkpoints import HINT, NAMES

LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
TRUSTED = {
    *('mmengine.dist.dist', 'mmdet.utils.dist_utils', 'mmdet.evaluation.metrics.base_video_metric'),
    'mmengine.dataset.base_dataset',
}
"""Modules that unpickle what another process of the same run, or the data set itself, has pickled."""
_active = False


@contextmanager
def data_only(unsafe: bool = False) -> Iterator[None]:
    """While it lasts, checkpoints, pickles, YAML and arrays are read as data, whatever part of a library reads them.

    Processes that are forked meanwhile, such as data workers, do so too. A file that holds more ends in a UserError.

    Args:
        unsafe: leave everything as it is.
    """
    global _active
    if unsafe or _active:
        yield
        return
    before = [(module, name, getattr(module, name)) for module, name, _ in _READERS]
    _active = True
    try:
        for module, name, reader in _READERS:
            setattr(module, name, reader(getattr(module, name)))
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
        _active = False


def _caller() -> str:
    """Name of the module that called the function that calls this one."""
    return sys._getframe(2).f_globals.get('__name__', '')


def _from_library(module: str) -> bool:
    return module.split('.')[0] in LIBRARIES and module not in TRUSTED


def _name_of(file: Any) -> str:
    return str(getattr(file, 'name', 'a file')) if hasattr(file, 'read') else str(file)


def _torch_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        # torch copies storages between processes in this way, and reading.py has set its limits
        if _caller() in ('torch.storage', read_torch.__module__):
            return original(f, *args, **kwargs)
        if hasattr(f, 'read'):
            return read_torch(_name_of(f), NAMES, content=f.read(), hint=HINT)
        return read_torch(os.fspath(f), NAMES, hint=HINT)

    return load


def _numpy_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not _from_library(_caller()):
            return original(file, *args, **kwargs)
        try:
            return original(file)
        except (ValueError, EOFError, MemoryError) as error:
            if 'pickle' in str(error):
                raise UserError(f'{_name_of(file)} holds objects, not numbers, and was not loaded{HINT}') from None
            raise UserError(f'{_name_of(file)} is damaged: {str(error).splitlines()[0]}') from None

    return load


def _pickle_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not _from_library(_caller()):
            return original(file, *args, **kwargs)
        return read_pickle(file.read(), _opened(file), kwargs.get('encoding', 'ASCII'), HINT)

    return load


def _pickle_loads(original: Callable[..., Any]) -> Callable[..., Any]:
    def loads(content: Any, *args: Any, **kwargs: Any) -> Any:
        if not _from_library(_caller()):
            return original(content, *args, **kwargs)
        return read_pickle(bytes(content), _opened(None), kwargs.get('encoding', 'ASCII'), HINT)

    return loads


def _yaml_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(stream: Any, Loader: Any = None, **kwargs: Any) -> Any:
        if not _from_library(_caller()):
            return original(stream, Loader, **kwargs)
        try:
            return original(stream, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
        except yaml.YAMLError as error:
            reason = ' '.join(str(error).split())[:100]
            raise UserError(f'{_opened(stream)} cannot be read as plain YAML: {reason}{HINT}') from None

    return load


def _opened(file: Any) -> str:
    """Name of the file that a library is reading, from its callers: what it hands on are often the bytes alone."""
    if isinstance(getattr(file, 'name', None), str):
        return file.name
    frame = sys._getframe(2)
    for _ in range(6):
        for key in ('file', 'file_path', 'path', 'filename', 'filepath'):
            if isinstance(frame.f_locals.get(key), (str, os.PathLike)):
                return str(frame.f_locals[key])
        if frame.f_back is None:
            break
        frame = frame.f_back
    return 'a pickle'


_READERS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch, 'load', _torch_load),
    (np, 'load', _numpy_load),
    (pickle, 'load', _pickle_load),
    (pickle, 'loads', _pickle_loads),
    (yaml, 'load', _yaml_load),
)
"""Module, name of its function, and what makes the function that takes its place."""
