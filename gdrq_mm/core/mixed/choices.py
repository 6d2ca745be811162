"""What there is to choose in a model, and quantizers with each number of bits beside those that it has."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..config import Quantization, Side
from ..convert import Report
from ..errors import UserError
from ..layers import QuantLayer, make_activation_quantizer, make_weight_quantizer
from ..modules import hooked, modes_kept, mute_leaves, only, quant_layers
from ..pyramid import quantizers_of
from ..quantizers import Quantizer, Stage
from ..typed import FLOAT_BITS

BITS = (2, 3, 4, 8)
"""What is tried where nobody says what."""
SIDES: tuple[Literal['weight', 'activation'], ...] = ('weight', 'activation')


@dataclass(frozen=True)
class Choice:
    """Bits that are chosen once: those of a weight, or of an input for all layers that read it."""

    name: str
    """That of its first layer, with '.weight' or '.input'."""
    side: Literal['weight', 'activation']
    layers: tuple[str, ...]
    bits: tuple[int, ...]
    """What may be chosen; one if the bits are given."""
    why: str = ''
    """Why they are given; '' if they are not."""
    ours: bool = True
    """Whether a config has to say the bits; not if its author has said them already."""


def bits_to_try(config: Quantization, bits: Sequence[int] | None, inputs: bool) -> dict[str, tuple[int, ...]]:
    """Bits for 'weight' and 'activation': those asked for, else those of BITS that the method has.

    Raises:
        UserError: a method does not have them.
    """
    found: dict[str, tuple[int, ...]] = {}
    for side in SIDES if inputs else SIDES[:1]:
        settings: Side = getattr(config, side)
        allowed = settings.methods[settings.method].allowed_bits
        for b in bits or ():
            if type(b) is not int or b not in allowed:
                has = f'{allowed[0]} to {allowed[-1]}' if len(allowed) > 1 else str(allowed[0])
                raise UserError(f'bits {b}: method {settings.method!r} has {has} bits for the {side} of a layer')
        found[side] = tuple(sorted(set(bits or [b for b in BITS if b in allowed] or allowed)))
    return found


def choices_of(
    model: nn.Module, config: Quantization, report: Report, bits: Sequence[int] | None = None, inputs: bool = True
) -> list[Choice]:
    """The choices of a quantized and calibrated model, each layer's weight and input in exactly one.

    Layers that read the same tensor, as those of a head read a pyramid level, or that share a quantizer or a weight
    have one choice in common. What the config gives is respected: `first_last_bits`, overrides of bits, float layers.
    Layers that are not deployed are in none.

    Args:
        config: what the model was quantized by.
        report: what quantize_model returned.
        bits: to choose from; None: BITS.
        inputs: choose the bits of inputs too; else they stay those of the config.

    Raises:
        UserError: there is nothing to choose, or a method does not have the bits.
    """
    tried = bits_to_try(config, bits, inputs)
    layers = {name: layer for name, layer in quant_layers(model).items() if report.plan.deployed(name)}
    tensors = report.plan.inputs
    weights = _joined({name: [layer.weight_key] for name, layer in layers.items()})
    readers = _joined({n: [('tensor', tensors.get(n, n)), id(x.input_quant or n)] for n, x in layers.items()})
    found: list[Choice] = []
    for side, groups in zip(SIDES, (weights, readers)):
        for group in groups:
            given = {name: _given(side, name, layers[name], config, report, side in tried) for name in group}
            found += _choices(side, given, [_settings(side, name, config, report) for name in group], tried.get(side))
    if not any(len(choice.bits) > 1 for choice in found):
        raise UserError(
            'nothing is to be chosen: the config gives the bits of every layer, or there is one choice of bits'
        )
    return found


def _settings(side: str, name: str, config: Quantization, report: Report) -> Any:
    weight, activation = config.for_layer(name, name in report.edges)
    return weight if side == 'weight' else activation


def _given(
    side: str, name: str, layer: QuantLayer, config: Quantization, report: Report, chosen: bool
) -> tuple[int, str] | None:
    """Bits of one side of a layer that are not to be chosen, and why; None if they are."""
    bits = layer.bits[side != 'weight']
    if bits == FLOAT_BITS:
        return bits, 'float'
    if _overridden(config, name, side):
        return bits, 'override'
    if name in report.edges:
        return bits, report.edges[name]
    return None if chosen else (bits, 'by config')


def _overridden(config: Quantization, name: str, side: str) -> bool:
    """Whether an override gives the bits or the method of a layer's 'weight' or 'activation'."""
    matching = [override for pattern, override in config.overrides.items() if fnmatch.fnmatchcase(name, pattern)]
    return any(not {'bits', 'method'}.isdisjoint(override.get(side, {})) for override in matching)


def _choices(
    side: Literal['weight', 'activation'],
    given: Mapping[str, tuple[int, str] | None],
    settings: Sequence[Side],
    tried: Sequence[int] | None,
) -> Iterator[Choice]:
    """The choices of a group of layers: each that is given alone, and all others together."""
    end = 'weight' if side == 'weight' else 'input'
    known = {name: each for name, each in given.items() if each is not None}
    for name, (bits, why) in known.items():
        yield Choice(f'{name}.{end}', side, (name,), (bits,), why, ours=False)
    free = tuple(name for name in given if name not in known)
    quantized = {name: bits for name, (bits, _) in known.items() if bits != FLOAT_BITS}
    if free and quantized:
        leader = max(quantized, key=lambda name: quantized[name])
        yield Choice(f'{free[0]}.{end}', side, free, (quantized[leader],), f'as {leader}')
    elif free:
        allowed = [each.methods[each.method].allowed_bits for each in settings]
        common = tuple(b for b in tried or () if all(b in each for each in allowed))
        yield Choice(f'{free[0]}.{end}', side, free, common or (settings[0].bits,), '' if common else 'its method')


def _joined(keys: Mapping[str, Iterable[Hashable]]) -> list[list[str]]:
    """Names in groups: those with a key in common are in one, over several steps too."""
    groups: list[tuple[set[Hashable], list[str]]] = []
    for name, own in keys.items():
        new = set(own), [name]
        for group in [group for group in groups if group[0] & new[0]]:
            groups.remove(group)
            new = group[0] | new[0], group[1] + new[1]
        groups.append(new)
    return [names for _, names in groups]


class Place(NamedTuple):
    """A quantizer of the model, and others in its place."""

    choice: Choice
    layer: QuantLayer
    own: Quantizer
    others: Mapping[int, Any]
    """Bits -> quantizer."""


class Candidates:
    """Quantizers with the bits of every choice that is open, beside those of a model.

    They are no modules of the model; :meth:`replacing` puts them in the place of its own by a hook. They behave as in
    evaluation: thresholds of inputs are those of the calibration, weights are all rounded.
    """

    def __init__(self, model: nn.Module, choices: Sequence[Choice], config: Quantization, report: Report) -> None:
        self.model, self.choices = model, [choice for choice in choices if len(choice.bits) > 1]
        self.places: list[Place] = []
        layers = quant_layers(model)
        for choice in self.choices:
            known: set[Quantizer] = set()
            for name in choice.layers:
                layer, settings = layers[name], _settings(choice.side, name, config, report)
                own: list[Any] = (
                    [layer.weight_quant] if choice.side == 'weight' else list(quantizers_of(layer.input_quant))
                )
                for quantizer in own:
                    if quantizer not in known:
                        others = {b: _other(layer, choice.side, settings.with_bits(b)) for b in choice.bits}
                        self.places.append(Place(choice, layer, quantizer, others))
                known.update(own)

    def places_of(self, choice: Choice) -> list[Place]:
        """Those of one choice, in the order of its layers."""
        return [place for place in self.places if place.choice is choice]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Any], run: Callable[[Any], Any]) -> None:
        """Start their thresholds from one float run over `batches`; modules without children are in evaluation mode.

        Args:
            run: computes a prediction or a loss of a batch.
        """
        inputs = [place for place in self.places if place.choice.side != 'weight']
        watched = {place.own: next(iter(place.others.values())) for place in inputs}
        for each in watched.values():
            each.set_state(stage=Stage.OBSERVE)
        handles = (
            own.register_forward_hook(lambda module, args, out, first=first: _observe(first, args[0]))
            for own, first in watched.items()
        )
        with only(self.model, []), hooked(handles), modes_kept(self.model):
            mute_leaves(self.model.train())  # some models compute a loss in training mode only
            for batch in batches:
                run(batch)
        for place in self.places:
            first = watched.get(place.own)
            seen, samples = (first.observed(), first.samples) if first is not None else (None, None)
            for each in place.others.values():
                if seen is None:
                    each.start(place.layer.filters())
                else:
                    each.samples = samples
                    each.start(seen)
                each.set_state(stage=Stage.QUANTIZE)

    def replacing(self, bits: Mapping[str, int]) -> Iterator[Any]:
        """Handles of hooks that quantize with these bits, choice -> bits; for :func:`hooked`, within :func:`only`."""
        for place in self.places:
            if place.choice.name in bits:
                other = place.others[bits[place.choice.name]]
                yield place.own.register_forward_hook(lambda module, args, out, other=other: other(args[0]))

    @contextmanager
    def alone(self, choice: str, bits: int) -> Iterator[None]:
        """Quantize only this, with these bits; all else in the model is float meanwhile."""
        with only(self.model, []), hooked(self.replacing({choice: bits})):
            yield


def _other(layer: QuantLayer, side: str, settings: Any) -> Any:
    weight = side == 'weight'
    made = make_weight_quantizer(settings, layer.filters()) if weight else make_activation_quantizer(settings)
    assert made is not None
    return made.to(layer.weight.device).eval()


def _observe(quantizer: Any, x: Tensor) -> None:
    if x.numel():
        quantizer.observe(x)
