"""The methods by the name that a config uses. `@register` puts a quantizer here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .activation import ActivationQuantizer
from .base import Quantizer
from .weight import WeightQuantizer

WEIGHT_METHODS: dict[str, type[WeightQuantizer]] = {}
"""`weight.method` -> quantizer."""
ACTIVATION_METHODS: dict[str, type[ActivationQuantizer]] = {}
"""`activation.method` -> quantizer."""
METHODS: dict[str, tuple[str, str]] = {}
"""`quantization.method` -> method of the weights and of the activations, as the paper combines them; where a paper
leaves one side in float, that side takes 'minmax' (ours)."""
TITLES: dict[str, str] = {}
"""Name of a method -> how its paper writes it."""

Class = TypeVar('Class', bound=type[Quantizer])


def register(
    name: str,
    title: str = '',
    weights: type[WeightQuantizer] | None = None,
    activations: type[ActivationQuantizer] | None = None,
) -> Callable[[Class], Class]:
    """Class decorator: make a weight or activation quantizer a method that a config can name.

    A method that has both sides registers each of its two classes under the one name.

    Args:
        name: of the method; its options stand under it.
        title: for tables; the name itself if it is left out. One of two classes says it.
        weights, activations: the registered class that `quantization.method=name` takes for the other side.

    Raises:
        ValueError: the name is taken on this side, or the other side is no registered quantizer of that side.
    """

    def add(cls: Class) -> Class:
        methods, others, other = _sides(cls, weights, activations)
        if name in methods:
            raise ValueError(f'method {name!r} is registered twice: {methods[name].__qualname__}, {cls.__qualname__}')
        if other is not None and other not in others.values():
            raise ValueError(f'method {name!r}: {other!r} is not registered as the other side of {cls.__qualname__}')
        partner = next((key for key, each in others.items() if each is other), name)
        methods[name] = cls
        if partner in others:
            METHODS[name] = (name, partner) if methods is WEIGHT_METHODS else (partner, name)
        if title or name not in TITLES:
            TITLES[name] = title or name
        return cls

    return add


def _sides(cls: type, weights: type | None, activations: type | None) -> tuple[dict, dict, type | None]:
    """The methods of this class' side, those of the other side, and the class that is named for that."""
    if issubclass(cls, WeightQuantizer) and weights is None:
        return WEIGHT_METHODS, ACTIVATION_METHODS, activations
    if issubclass(cls, ActivationQuantizer) and activations is None:
        return ACTIVATION_METHODS, WEIGHT_METHODS, weights
    raise ValueError(f'{cls.__qualname__} is no weight or activation quantizer, or names a quantizer for its own side')
