"""The units of a model for the analysis: what is quantized alone, while the rest stays float.

A unit is a layer with its weight and input, an input that several layers read through one quantizer, an output that
`deployable` quantizes, or a product with both factors. Layers that are not deployed (auxiliary heads) are in none.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
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
class Unit:
    """What is quantized alone; name, kind and readers are those of its :class:`gdrq_mm.report.analysis.Row`."""

    name: str
    kind: str
    readers: tuple[str, ...]
    layer: QuantLayer | None
    """The layer whose weight belongs to the unit; None if the unit has no weight."""
    inputs: tuple[ActivationQuantizer, ...]
    """The quantizers of what the readers read, or what the module returns; several if each pyramid level has one."""

    @property
    def quantizers(self) -> list[Quantizer]:
        """All of them."""
        return [*([self.layer.weight_quant] if self.layer and self.layer.weight_quant else []), *self.inputs]


def units_of(model: nn.Module, plan: Plan) -> list[Unit]:
    """The units of a quantized model: each quantizer that is deployed and in use is in exactly one of them."""
    layers = {name: layer for name, layer in quant_layers(model).items() if plan.deployed(name)}
    readers: dict[InputQuant, list[str]] = {}
    for name, layer in layers.items():
        if layer.input_quant is not None:
            readers.setdefault(layer.input_quant, []).append(name)
    units = []
    for name, layer in layers.items():
        has_weight = layer.weight_quant is not None and layer.weight_quant.stage != Stage.FLOAT
        only_reader = readers.get(layer.input_quant) == [name]
        inputs = _in_use(layer.input_quant) if only_reader else ()
        if has_weight or inputs:
            units.append(Unit(name, 'layer', (name,), layer if has_weight else None, inputs))
    for quantizer, names in readers.items():
        if len(names) > 1 and _in_use(quantizer):
            title = f'{names[0]} (input of {len(names)})'
            units.append(Unit(title, 'shared input', tuple(names), None, _in_use(quantizer)))
    for name, quant in activation_quantizers(model).items():
        module = name.removesuffix('.output_quant')
        if module != name and plan.deployed(module) and _in_use(quant):
            units.append(Unit(f'{module} (output)', 'output', (module,), None, _in_use(quant)))
    quantizers = activation_quantizers(model)
    for product in plan.products:
        factors = (quantizers.get(f'{product.name}.{factor}') for factor in range(2))
        inputs = tuple(q for quant in factors for q in _in_use(quant))
        if inputs and plan.deployed(product.module):
            title = f'{product.module or "model"} (product {product.number})'
            units.append(Unit(title, 'product', (product.module,), None, inputs))
    return units


def _in_use(quant: InputQuant | None) -> tuple[ActivationQuantizer, ...]:
    """The quantizers of an input, without those that calibration did not reach."""
    return tuple(q for q in quantizers_of(quant) if q.stage != Stage.FLOAT)


def choose(units: Sequence[Unit], patterns: Iterable[str]) -> list[Unit]:
    """The units with a reader that matches one of the fnmatch patterns; all units if there are no patterns.

    Raises:
        UserError: nothing is quantized, or a pattern matches no layer.
    """
    if not units:
        raise UserError('the config leaves every layer float: there is nothing to analyze')
    patterns, names = list(patterns), {name for unit in units for name in unit.readers}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f'--layers: the pattern {pattern!r} matches no quantized layer{near(pattern, names)}')
    if not patterns:
        return list(units)
    return [unit for unit in units if any(fnmatch.filter(unit.readers, pattern) for pattern in patterns)]
