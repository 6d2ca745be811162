"""Mistakes in a config that show when mmengine builds something from it, told from bugs by where they were raised."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from types import FrameType
from typing import Any

import torch.nn as nn
from mmengine.registry import Registry, build_from_cfg
from mmengine.runner import Runner
from mmengine.visualization.vis_backend import BaseVisBackend

_RUNNERS = {Runner.__module__, BaseVisBackend.__module__}
_TRAINING = ('torch.utils.data.', 'torch.optim.', 'mmengine.optim.', 'mmengine.dataset.')
"""How the modules begin whose classes take values of the config as they are."""
_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")
_NOT_FOUND = re.compile(r'Cannot find \S+ in registry')


def config_mistake(error: BaseException) -> str:
    """What is wrong with the config, '' if the exception may as well be a bug.

    A mistake is a name that no registry has, arguments that what it names does not take, a value of the wrong type or a
    package that is missing where mmengine itself says so, heads of attention that do not divide its width, or a value
    that a data loader, an optimizer or a scheduler refuses. Any other class that raises something itself is not looked
    into: its traceback is wanted.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    known = (KeyError, TypeError, ValueError, RuntimeError, AssertionError, ImportError)
    if not frames or not isinstance(error, known):
        return ''
    message, last = str(error.args[0]) if error.args else '', frames[-1]
    if _refused_by_runner(error, last):
        return ' '.join(message.split())
    if isinstance(error, ValueError):
        return f'{type(last.f_locals["self"]).__name__}: {message}' if _refused_when_made(error, last) else ''
    if isinstance(error, AssertionError):
        return _of_heads(last)
    if last.f_code is Registry.get.__code__:
        return message
    module = last.f_globals.get('__name__', '')
    if module == build_from_cfg.__module__ and not isinstance(error, RuntimeError):
        return _of_registry(last, message)
    if isinstance(error, KeyError):
        if not (module.startswith('mmcv.') and _NOT_FOUND.match(message)):
            return ''
        kind = last.f_locals.get('layer_type', last.f_locals.get('padding_type'))  # the message has it as None
        return f'{kind!r} is not in the registry of layers ({module})'
    name = _UNEXPECTED.search(message)
    if isinstance(error, TypeError) and name and (module.startswith('mmengine.') or _handed_on(name[1], frames)):
        return message
    return ''


def _refused_by_runner(error: BaseException, frame: FrameType) -> bool:
    """Whether mmengine's runner or what writes logs raised an error on purpose, as it does for a value of the config.

    `call_hook` is left out: it raises anew what any hook did wrong.
    """
    module = frame.f_globals.get('__name__')
    return module in _RUNNERS and frame.f_code is not Runner.call_hook.__code__ and _on_purpose(error)


def _refused_when_made(error: BaseException, frame: FrameType) -> bool:
    """Whether a class of `_TRAINING` raised an error on purpose when it was made, as for batch_size=0."""
    module = frame.f_globals.get('__name__', '')
    return _on_purpose(error) and frame.f_code.co_name == '__init__' and module.startswith(_TRAINING)


def _on_purpose(error: BaseException) -> bool:
    """Whether the line that an error comes from raises it."""
    return (traceback.extract_tb(error.__traceback__)[-1].line or '').startswith('raise ')


def _of_heads(frame: FrameType) -> str:
    """The message where torch's attention refuses its number of heads; '' where something else was asserted."""
    if frame.f_code is not nn.MultiheadAttention.__init__.__code__:
        return ''
    width, heads = frame.f_locals['embed_dim'], frame.f_locals['num_heads']
    return f'nn.MultiheadAttention: {heads} heads do not divide the width {width}'


def _of_registry(frame: FrameType, message: str) -> str:
    """The message for what mmengine raised itself, before any code of the class ran."""
    registry, kind, cls = (frame.f_locals.get(key) for key in ('registry', 'obj_type', 'obj_cls'))
    if cls is not None:
        return f'{kind if isinstance(kind, str) else cls.__name__}: {message}'
    if not isinstance(registry, Registry) or not isinstance(kind, str):
        return message.partition('. Please check')[0]
    return not_found(kind, registry)


def not_found(kind: str, registry: Registry) -> str:
    """The message for a `type` that a registry does not have, with the nearest name."""
    near = difflib.get_close_matches(kind, _names(registry), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ' (a class of your own is imported by custom_imports)'
    return f'{kind!r} is not in the registry {registry.scope}::{registry.name}{hint}'


def registered(kind: Any, registry: Registry, scope: str | None = None) -> Any:
    """What a `type` stands for: itself if it is no name, else what a registry of mmengine has; None if it has nothing.

    Args:
        scope: the library whose registry is looked into first, as mmengine does where it builds something; by default
            that of the config in use.
    """
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(scope) as of_library:
        return of_library.get(kind)


def _names(registry: Registry) -> list[str]:
    """What can be written as `type`: the names of a registry and of those above it."""
    found = list(registry.module_dict)
    return found + _names(registry.parent) if registry.parent is not None else found


def _handed_on(name: str, frames: list[FrameType]) -> bool:
    """Whether a class took an argument of the config by **kwargs and handed it on to what does not take it."""
    for frame in reversed(frames):
        if frame.f_code is build_from_cfg.__code__:
            cls, given = frame.f_locals.get('obj_cls'), frame.f_locals.get('args', {})
            return name in given and callable(cls) and name not in inspect.signature(cls).parameters
    return False
