"""Turn a float model into a quantized one, and tell what was done to each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn as nn

from .attention import Projection, attention_to_quantize, write_back, write_out
from .config import Quantization
from .deployable import QuantizedOutput, float_output, simulate_integers
from .errors import UserError
from .layers import QUANTIZED, QuantLayer, remove_hooks
from .modules import quant_layers, replace_modules, settle_in
from .prepare import leave_weights, prepare_weights
from .products import detach
from .pyramid import check_pyramid, split_pyramid, start_pyramid
from .topology import Plan
from .typed import FLOAT_BITS

_KINDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention, Projection),
    *(nn.RNNBase, nn.RNNCellBase),
)


@dataclass(frozen=True)
class LayerReport:
    """A row of the layer table."""

    name: str
    kind: str
    weights: int
    """Number of weights."""
    macs: int
    """Multiply-accumulates for one image; 0 if it was not recorded."""
    note: str = ''
    """Why the layer stayed float, or what is special about it."""


@dataclass
class Report:
    """What was done to each layer and output, and the plan it was done by."""

    layers: list[LayerReport]
    outputs: list[QuantizedOutput]
    plan: Plan
    edges: dict[str, str] = field(default_factory=dict)
    """Name of each first and last layer -> 'first' or 'last'."""
    notes: dict[str, str] = field(default_factory=dict)
    """Product of the plan -> why it stays float."""

    @property
    def products(self) -> list[LayerReport]:
        """A row for each product of two activations, as in attention."""
        macs, notes = self.plan.macs, self.notes
        return [LayerReport(p.name, p.kind, 0, macs.get(p.name, 0), notes.get(p.name, '')) for p in self.plan.products]


def to_float(model: nn.Module) -> None:
    """The inverse of :func:`quantize_model`, in place: float layers with the same Parameters, as they are now."""
    layers = {layer: layer.to_float() for layer in quant_layers(model).values()}
    replace_modules(model, layers)
    for module in list(model.modules()):
        detach(module)
        if 'output_quant' in module._modules:
            float_output(module)
        if 'pyramid_layers' in vars(module):
            del module.pyramid_layers
            remove_hooks(module, start_pyramid, check_pyramid)
    leave_weights(model)
    write_back(model)


def float_report(model: nn.Module, plan: Plan) -> Report:
    """The report of a model that stays float."""
    layers = {name: m for name, m in model.named_modules() if has_filters(m)}
    rows = [LayerReport(n, type(m).__name__, _weights(m), plan.macs.get(n, 0)) for n, m in layers.items()]
    return Report(rows, [], plan)


def quantize_model(model: nn.Module, config: Quantization, plan: Plan | None = None) -> Report:
    """Replace the layers of a model by quantized ones, in place.

    Args:
        model: any module; its Parameters stay the same objects.
        plan: what :func:`topology.record` returns. Without it the order of the modules tells the first and the last
            layer, and `deployable` has no effect.

    Raises:
        UserError: a pattern matches no layer, or the plan is of another model.
    """
    recorded, plan = plan is not None, plan or Plan()
    if (unknown := plan.unknown_to(model)) is not None:
        raise UserError(f'the plan is that of another model: this one has no {unknown}')
    write_out(model, attention_to_quantize(model, config.skipped, plan))
    named = {name: m for name, m in model.named_modules() if has_filters(m)}
    config.check_patterns(named, [product.module for product in plan.products])
    edges = _first_and_last(named, plan)
    rows, replaced = [], {}
    for name, layer in named.items():
        note = _reason_to_skip(name, layer, config, plan)
        if not note:
            weight, activation = config.for_layer(name, name in edges)
            replaced[layer] = QUANTIZED[type(layer)].from_float(layer, weight, activation)  # type: ignore[attr-defined]
            note = edges.get(name, '')
            if weight.bits == activation.bits == FLOAT_BITS:
                note = 'float by config'
        if not plan.deployed(name):
            note = ', '.join(filter(None, [note, 'training only']))
        rows.append(LayerReport(name, type(layer).__name__, _weights(layer), plan.macs.get(name, 0), note))
    if model in replaced:
        raise UserError('the model is a single layer; put it into an nn.Sequential')
    replace_modules(model, replaced)
    split_pyramid(model, quant_layers(model), plan)
    outputs, notes = simulate_integers(model, config, plan, edges, config.deployable and recorded)
    settle_in(model)
    prepare_weights(model)
    return Report(rows, outputs, plan, edges, notes)


def has_filters(module: nn.Module) -> bool:
    """Whether it is a convolution, a linear or recurrent layer or attention, of torch or of another package."""
    weight = getattr(module, 'weight', None)
    return isinstance(module, _KINDS) or (isinstance(weight, nn.Parameter) and weight.dim() > 2)


def _weights(layer: nn.Module) -> int:
    """Number of a layer's weights, under any name: nn.MultiheadAttention has `in_proj_weight`."""
    found = [layer.weight] if isinstance(layer, Projection) else layer.parameters(recurse=False)
    return sum(parameter.numel() for parameter in found if parameter.dim() > 1)


def _reason_to_skip(name: str, layer: nn.Module, config: Quantization, plan: Plan) -> str:
    if isinstance(layer, QuantLayer):
        return 'quantized by the model config'
    if config.skipped(name):
        return 'float: skipped by config'
    if name in plan.by_function:
        return 'float: its weight is read outside of a call of the layer'
    if type(layer) not in QUANTIZED:
        module = type(layer).__module__.split('.')[0]
        return f'float: {module} {type(layer).__name__} has no quantized form'
    return ''


def _first_and_last(named: dict[str, nn.Module], plan: Plan) -> dict[str, str]:
    """Name of each first and last layer, quantized or not -> 'first' or 'last'."""
    if not any(type(layer) in QUANTIZED for layer in named.values()):
        raise UserError('the model has no convolution or linear layer to quantize')
    executed = [n for n in (plan.calls or named) if n in named] or list(named)
    first = executed[0]
    edges = {first: 'first'}
    if first in plan.inputs:
        edges.update({n: 'first' for n in executed if plan.inputs.get(n) == plan.inputs[first]})
    last = [name for name in plan.last if name in named]
    edges.update(dict.fromkeys(last or [executed[-1]], 'last'))
    return edges
