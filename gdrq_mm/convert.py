"""Turn a float model into a quantized one, and tell what was done to each layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .config import FLOAT_BITS, Quantization
from .errors import UserError
from .heads import deployed, last_layers
from .layers import QUANTIZED, Levels, QuantLayer, make_activation_quantizer
from .levels import split_levels
from .quantizers import ActivationQuantizer, FollowingQuantizer, Stage, WeightQuantizer
from .topology import Topology

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.MultiheadAttention)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


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
    """What became of each layer."""

    layers: list[LayerReport]
    outputs: list[tuple[str, str, str]]
    """Module whose output is quantized, or a place with the reason why it is not; in front of what, 'addition' or
    'activation'; bits or reason."""


def bare_model(model: nn.Module) -> Any:
    """The model without a wrapper for several processes or for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module  # type: ignore[assignment]
    return model


def mute_leaves(model: nn.Module) -> None:
    """Evaluation mode for the modules without children, BN and dropout among them; the others keep theirs.

    Some models compute a loss in training mode only (Deformable DETR, PIDNet). A quantizer is no child here: BN has one
    where its output is quantized.
    """
    for module in model.modules():
        if all(isinstance(child, (ActivationQuantizer, WeightQuantizer)) for child in module.children()):
            module.eval()


def quant_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> quantized layer, each layer once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Name -> activation quantizer, each once: inputs of layers, and outputs that `deployable` quantizes."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


def moving_quantizers(model: nn.Module) -> dict[str, FollowingQuantizer]:
    """Those of them whose thresholds follow the inputs, and are not frozen."""
    quantizers = activation_quantizers(model)
    return {n: q for n, q in quantizers.items() if isinstance(q, FollowingQuantizer) and q.stage < Stage.FREEZE}


def mergeable_norms(model: nn.Module, topology: Topology) -> dict[str, str]:
    """Quantized layer -> the batch normalization that takes up into it: one that reads nothing else."""
    modules, layers = dict(model.named_modules()), quant_layers(model)
    readers: dict[str, int] = {}
    for conv, norm in topology.norms.items():
        alone = topology.reads.get(conv, 0) <= topology.calls[conv]  # nothing else reads the convolution
        if conv in layers and isinstance(modules[norm], _BatchNorm) and alone:
            readers[norm] = readers.get(norm, 0) + topology.calls[conv]
    whole = {norm for norm, calls in readers.items() if calls == topology.calls[norm]}
    return {conv: norm for conv, norm in topology.norms.items() if norm in whole and conv in layers}


def float_report(model: nn.Module, topology: Topology) -> Report:
    """The report of a model that stays float."""
    layers = {name: m for name, m in model.named_modules() if _has_filters(m)}
    rows = [LayerReport(n, type(m).__name__, _weights(m), topology.macs.get(n, 0)) for n, m in layers.items()]
    return Report(rows, [])


def quantize_model(model: nn.Module, config: Quantization, topology: Topology | None = None) -> Report:
    """Replace layers in place.

    Args:
        model: any module; its Parameters stay the same objects.
        config: see gdrq_mm/config.py.
        topology: record of a prediction (gdrq_mm/topology.py). Without it first and last layers are taken by the order
            of the modules, and nothing is shared or added for `deployable`.

    Raises:
        UserError: a pattern that matches no layer.
    """
    named = {name: m for name, m in model.named_modules() if _has_filters(m)}
    config.check_patterns(named)
    edges = _first_and_last(model, named, topology)
    rows, replaced = [], {}
    for name, layer in named.items():
        note = _reason_to_skip(name, layer, config)
        if not note:
            weight, activation = config.for_layer(name, name in edges)
            new = QUANTIZED[type(layer)].from_float(layer, weight, activation)  # type: ignore[attr-defined]
            replaced[layer] = new
            note = edges.get(name, '')
            if weight.bits == activation.bits == FLOAT_BITS:
                note = 'float by config'
        if not deployed(name):
            note = ', '.join(filter(None, [note, 'training only']))
        macs = topology.macs.get(name, 0) if topology else 0
        rows.append(LayerReport(name, type(layer).__name__, _weights(layer), macs, note))
    if model in replaced:
        raise UserError('the model is a single layer; put it into an nn.Sequential')
    for parent in list(model.modules()):  # every alias of a shared module
        for child_name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[child_name] = replaced[child]
    if topology is not None:
        split_levels(model, quant_layers(model), topology)
    outputs: list[tuple[str, str, str]] = []
    if config.deployable and topology is not None:
        _share_inputs(model, topology)
        outputs = _quantize_outputs(model, config, topology, edges)
        _round_biases(model, topology)
    for name, quantizer in activation_quantizers(model).items():
        quantizer.name = name.replace('.own_input_quant', '')
    for name, layer in quant_layers(model).items():
        if layer.weight_quant is not None:
            layer.weight_quant.name = name
    return Report(rows, outputs)


def _has_filters(module: nn.Module) -> bool:
    """Convolutions, linear layers and attention, those of other packages too (mmcv's deformable convolutions)."""
    weight = getattr(module, 'weight', None)
    return isinstance(module, _KINDS) or (isinstance(weight, nn.Parameter) and weight.dim() > 2)


def _weights(layer: nn.Module) -> int:
    """Number of a layer's weights; nn.MultiheadAttention keeps those of its projections under other names."""
    return sum(parameter.numel() for parameter in layer.parameters(recurse=False) if parameter.dim() > 1)


def _reason_to_skip(name: str, layer: nn.Module, config: Quantization) -> str:
    if isinstance(layer, QuantLayer):
        return 'quantized by the model config'
    if config.skipped(name):
        return 'float: skipped by config'
    if type(layer) not in QUANTIZED:
        module = type(layer).__module__.split('.')[0]
        return f'float: {module} {type(layer).__name__} has a forward of its own'
    return ''


def _first_and_last(model: nn.Module, named: dict[str, nn.Module], topology: Topology | None) -> dict[str, str]:
    """First and last layers, among those that stay float too: name -> 'first' or 'last'."""
    if not any(type(layer) in QUANTIZED for layer in named.values()):
        raise UserError('the model has no convolution or linear layer to quantize')
    executed = [n for n in (topology.calls if topology else named) if n in named] or list(named)
    first = executed[0]
    edges = {first: 'first'}
    if topology is not None:
        image = topology.inputs[first]
        edges.update({n: 'first' for n in executed if topology.inputs.get(n) == image})
    last = set(last_layers(model, list(named))) or {executed[-1]}
    edges.update(dict.fromkeys(last, 'last'))
    return edges


def _share_inputs(model: nn.Module, topology: Topology) -> None:
    """Readers of one tensor with equal settings share the quantizer of the first reader."""
    owners: dict[Any, QuantLayer] = {}
    layers = quant_layers(model)
    for name in topology.calls:
        layer = layers.get(name)
        if layer is None or layer.input_quant is None or name not in topology.inputs:
            continue
        levels = len(layer.input_quant) if isinstance(layer.input_quant, Levels) else 1
        owner = owners.setdefault((topology.inputs[name], repr(layer.activation_settings), levels), layer)
        if owner is not layer:
            layer.share_input_quant(owner)


def _round_biases(model: nn.Module, topology: Topology) -> None:
    """Evaluate with the biases of the integer graph wherever an integer kernel computes the layer."""
    modules, norms = dict(model.named_modules()), mergeable_norms(model, topology)
    for name, layer in quant_layers(model).items():
        norm: Any = modules[norms[name]] if name in norms else None
        if not isinstance(layer, nn.ConvTranspose2d) and (norm is None or norm.running_mean is not None):
            layer.deploy_with(norm)


def quantize_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Forward hook of a module whose output is quantized."""
    return module.output_quant(out)  # type: ignore[operator]


def _quantize_outputs(
    model: nn.Module, config: Quantization, topology: Topology, edges: dict[str, str]
) -> list[tuple[str, str, str]]:
    """Put an 8-bit quantizer behind what is added, and behind convolutions in front of an activation function."""
    if config.activation.bits == FLOAT_BITS:
        return []
    settings = dataclasses.replace(config.activation.with_bits(8), range='auto')
    modules = dict(model.named_modules())
    rows: list[tuple[str, str, str]] = []
    done: set[str] = set()

    def quantize(name: str, before: str) -> None:
        done.add(name)
        modules[name].add_module('output_quant', make_activation_quantizer(settings))
        modules[name].register_forward_hook(quantize_output)
        rows.append((name, before, '8 bits'))

    for addition in topology.additions:
        for side, producers in enumerate(addition.operands):
            usable = [p for p in producers if topology.calls[p] == 1 and not isinstance(modules[p], _CONTAINERS)]
            if not usable:
                why = 'made by a function' if not producers else 'made by a module that is called several times'
                rows.append((f'{addition.module or "model"}, operand {side}', 'addition', f'float: {why}'))
            elif not done.intersection(producers):
                quantize(usable[0], 'addition')
    for name in _before_activations(model, topology, edges):
        if name not in done:
            quantize(name, 'activation')
    return rows


def _before_activations(model: nn.Module, topology: Topology, edges: dict[str, str]) -> list[str]:
    """Convolutions, or their batch normalization, all of whose results an activation function other than ReLU reads.

    The integer kernel of a convolution needs a quantized output; behind ReLU the quantizer of the next layer is one.
    Linear layers do not need it, and the last layers are left: their output is that of the model.
    """
    norms = mergeable_norms(model, topology)
    ends = {
        norms.get(name, name): None
        for name, layer in quant_layers(model).items()
        if FLOAT_BITS not in layer.bits and isinstance(layer, nn.Conv2d) and edges.get(name) != 'last'
    }
    return [name for name in ends if len(topology.activated.get(name, ())) == topology.calls.get(name)]
