"""Checks a dict of a config against the fields of a dataclass: the type of a field is also its error message."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError

FLOAT_BITS = 32
"""Bits of what is not quantized."""


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, `Annotated[float, Bounds(0, 1)]`: above `low`, or from it if `closed`, up to `high`."""

    low: float
    high: float = math.inf
    closed: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low <= value if self.closed else self.low < value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f' of at least {self.low:g}' if self.closed else f' above {self.low:g}'
        return (f' from {self.low:g} to ' if self.closed else f' above {self.low:g} and at most ') + f'{self.high:g}'


def check_fields(
    cls: Any, given: Any, path: str, layer: str = '', also: Iterable[str] = (), hidden: Iterable[str] = ()
) -> Mapping[str, Any]:
    """`given`, if it is a dict whose keys are fields of a dataclass, with values of their types; else a UserError.

    Args:
        cls: the dataclass; a field that is a dataclass itself takes a dict, whose keys are not looked at.
        path, layer: what leads to the dict in a message, and what follows one, such as ' (layer backbone.conv1)'.
        also: keys that are allowed, whatever their values; and `hidden` are fields that no key may name.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = [f.name for f in dataclasses.fields(cls) if f.name not in hidden]
    also = list(also)
    if not isinstance(given, Mapping):
        raise UserError(f'{path}={given!r} is not a dict')
    for key, value in given.items():
        if key not in fields and key not in also:
            raise UserError(f"{path} has no key '{key}'{near(key, [*fields, *also])}")
        if key not in also and not fits(hints[key], value):
            raise UserError(f'{path}.{key}={value!r} is not {describe(hints[key])}{layer}')
    return given


def near(word: Any, choices: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest of the choices, else the list of them."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(str(word), choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else f'; choices: {", ".join(choices)}'


def fits(hint: Any, value: Any) -> bool:
    """Whether a value has a type. 1 is no bool and True is no number, but an int is a float."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return fits(args[0], value) and all(value in extra for extra in args[1:] if isinstance(extra, Bounds))
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if kind in (Union, types.UnionType):
        return any(fits(each, value) for each in args)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and all(fits(args[0], each) for each in value)
    if kind is Mapping or dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    allowed = (int, float) if hint is float else hint
    return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))


def describe(hint: Any) -> str:
    """What a value of a type is, for a message."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        words = [extra for extra in args[1:] if isinstance(extra, str)]
        return words[0] if words else describe(args[0]) + ''.join(str(e) for e in args[1:] if isinstance(e, Bounds))
    if kind is Literal:
        return ('one of ' if len(args) > 1 else '') + ', '.join(repr(choice) for choice in args)
    if kind in (Union, types.UnionType):
        return ' or '.join(describe(each) for each in args)
    names = {bool: 'one of True, False', int: 'an integer', float: 'a number', str: 'a string', types.NoneType: 'None'}
    return names.get(hint, 'a dict' if kind is Mapping or dataclasses.is_dataclass(hint) else str(hint))
