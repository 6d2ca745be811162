"""The parts of a model that are analyzed: what is quantized alone.

A layer with its weight and input, an input that several layers read through one quantizer, or an output that
`deployable` quantizes. Layers that are not deployed (auxiliary heads) are left out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn as nn

from ..core.config import near
from ..core.errors import UserError
from ..core.layers import QuantLayer
from ..core.modules import activation_quantizers, quant_layers
from ..core.pyramid import InputQuant, quantizers_of
from ..core.quantizers import ActivationQuantizer, Quantizer, Stage
from ..core.topology import Plan


@dataclass(frozen=True)
class Part:
    """What is quantized alone; see results.analysis.Row."""

    name: str
    kind: str
    readers: tuple[str, ...]
    layer: QuantLayer | None
    """The layer whose weight it has."""
    inputs: tuple[ActivationQuantizer, ...]
    """The quantizers of its input, one a pyramid level if the config says so."""

    @property
    def quantizers(self) -> list[Quantizer]:
        """All of them."""
        return [*([self.layer.weight_quant] if self.layer and self.layer.weight_quant else []), *self.inputs]


def parts_of(model: nn.Module, plan: Plan) -> list[Part]:
    """The parts of a quantized model; each quantizer that is deployed and in use is in one of them."""
    layers = {name: layer for name, layer in quant_layers(model).items() if plan.deployed(name)}
    readers: dict[InputQuant, list[str]] = {}
    for name, layer in layers.items():
        if layer.input_quant is not None:
            readers.setdefault(layer.input_quant, []).append(name)
    parts = []
    for name, layer in layers.items():
        weighty = layer.weight_quant is not None and layer.weight_quant.stage != Stage.FLOAT
        own = readers.get(layer.input_quant) == [name]
        inputs = _in_use(layer.input_quant) if own else ()
        if weighty or inputs:
            parts.append(Part(name, 'layer', (name,), layer if weighty else None, inputs))
    for quantizer, names in readers.items():
        if len(names) > 1 and _in_use(quantizer):
            title = f'{names[0]} (input of {len(names)})'
            parts.append(Part(title, 'shared input', tuple(names), None, _in_use(quantizer)))
    for name, quant in activation_quantizers(model).items():
        place = name.removesuffix('.output_quant')
        if place != name and plan.deployed(place) and _in_use(quant):
            parts.append(Part(f'{place} (output)', 'output', (place,), None, _in_use(quant)))
    return parts


def _in_use(quant: InputQuant | None) -> tuple[ActivationQuantizer, ...]:
    """The quantizers of an input but those that calibration did not reach."""
    return tuple(q for q in quantizers_of(quant) if q.stage != Stage.FLOAT)


def choose(parts: Sequence[Part], patterns: Iterable[str]) -> list[Part]:
    """The parts with a reader that matches one of the fnmatch patterns; all without patterns.

    Raises:
        UserError: nothing is quantized, or a pattern matches no layer.
    """
    if not parts:
        raise UserError('the config leaves every layer float: there is nothing to analyze')
    patterns, names = list(patterns), {name for part in parts for name in part.readers}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f'--layers: the pattern {pattern!r} matches no quantized layer{near(pattern, names)}')
    if not patterns:
        return list(parts)
    return [p for p in parts if any(fnmatch.filter(p.readers, pattern) for pattern in patterns)]


@contextmanager
def only(model: nn.Module, active: Iterable[Quantizer]) -> Iterator[None]:
    """Let only the `active` quantizers of a model quantize; the others pass values through.

    Stages are as before afterwards. The saved state of the quantizers does not change.
    """
    kept, stages = set(active), {m: m.stage for m in model.modules() if isinstance(m, Quantizer)}
    for quantizer in stages:
        if quantizer not in kept:
            quantizer.stage = Stage.FLOAT
    try:
        yield
    finally:
        for quantizer, stage in stages.items():
            quantizer.stage = stage
