"""What `deployable` adds to a model, so that training computes what the integer graph computes.

- All readers of a tensor share one quantizer.
- The operands of additions are quantized to 8 bits.
- So are the outputs of convolutions in front of an activation function other than ReLU and ReLU6.
- The factors of products of two activations are quantized too, to the bits of `attention`.
- In evaluation, biases are rounded as integer kernels round them (integer_bias.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .config import Quantization
from .layers import QuantLayer, make_activation_quantizer, remove_hooks
from .modules import quant_layers
from .products import attach
from .quantizers import ActivationQuantizer
from .quantizers.minmax import AttentionWeights
from .topology import Plan
from .typed import FLOAT_BITS

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_KEEP_NOTHING = (_BatchNorm, QuantLayer)
_NEVER_CALLED = (NonDynamicallyQuantizableLinear, type(None))
"""What a plan may name in an nn.MultiheadAttention that is not written out, as where the config skips it."""


class QuantizedOutput(NamedTuple):
    """A module whose output is quantized, or an operand of an addition that stays float."""

    name: str
    """The module; or the addition and its operand, where no module made it."""
    before: str
    """What reads it: 'addition' or 'activation'."""
    note: str
    """Bits, or why it stays float."""


def simulate_integers(
    model: nn.Module, config: Quantization, plan: Plan, edges: dict[str, str], deployable: bool
) -> tuple[list[QuantizedOutput], dict[str, str]]:
    """Do all of the above if `deployable`; returns what became of outputs, and why products stay float, by name."""
    if not deployable:
        return [], quantize_products(model, config, plan, False)
    share_inputs(model, plan)
    outputs = quantize_outputs(model, config, plan, edges)
    round_biases(model, plan)
    return outputs, quantize_products(model, config, plan, True)


def folded_norms(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Quantized layer -> the batch normalization that is folded into it.

    A normalization that a float layer uses too is folded into none.
    """
    layers = [name for name, layer in quant_layers(model).items() if not layer.stays_float]
    float_ = {norm for layer, norm in plan.norms.items() if layer not in layers}
    return {layer: norm for layer, norm in plan.norms.items() if norm not in float_}


def share_inputs(model: nn.Module, plan: Plan) -> None:
    """Let all readers of a tensor that have the same settings use the quantizer of the first of them."""
    owners: dict[int, list[QuantLayer]] = {}
    layers = quant_layers(model)
    for name in plan.calls:
        layer = layers.get(name)
        if layer is None or layer.input_quant is None or name not in plan.inputs:
            continue
        settings, levels = layer.activation_settings, layer.pyramid_levels
        same = next(
            (
                each
                for each in owners.get(plan.inputs[name], ())
                if each.activation_settings == settings and each.pyramid_levels == levels
            ),
            None,
        )
        if same is None:
            owners.setdefault(plan.inputs[name], []).append(layer)
        else:
            layer.share_input_quant(same)


def round_biases(model: nn.Module, plan: Plan) -> None:
    """Let each layer that an integer kernel can compute evaluate with the bias that the kernel will have."""
    modules, norms = dict(model.named_modules()), folded_norms(model, plan)
    for name, layer in quant_layers(model).items():
        norm: Any = modules[norms[name]] if name in norms else None
        if not isinstance(layer, nn.ConvTranspose2d) and (norm is None or norm.running_mean is not None):
            layer.deploy_with(norm)


def quantize_output(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Forward hook of a module whose output is quantized."""
    quant: Any = module.output_quant
    if not isinstance(quant, ActivationQuantizer) or not isinstance(module, _KEEP_NOTHING):
        return quant(out)
    # These modules keep no reference to their output; another hook may.
    return quant(out, overwrite=len(module._forward_hooks) == 1 and not quant._forward_pre_hooks)


def activated_outputs(model: nn.Module, plan: Plan) -> list[str]:
    """Modules with a quantized output that only an activation function such as SiLU reads."""
    modules = dict(model.named_modules())
    return [name for name in plan.activated if 'output_quant' in modules[name]._modules]


def float_output(module: nn.Module) -> None:
    """Take away the quantizer of a module's output."""
    del module.output_quant
    remove_hooks(module, quantize_output)


def quantize_outputs(
    model: nn.Module, config: Quantization, plan: Plan, edges: dict[str, str]
) -> list[QuantizedOutput]:
    """Quantize to 8 bits what is added, and what convolutions pass to an activation function such as SiLU."""
    if config.activation.bits == FLOAT_BITS:
        return []
    settings = dataclasses.replace(config.activation.with_bits(8), range='auto')
    modules = dict(model.named_modules())
    rows: list[QuantizedOutput] = []
    done: set[str] = set()

    def quantize(name: str, before: str) -> None:
        done.add(name)
        modules[name].add_module('output_quant', make_activation_quantizer(settings))
        modules[name].register_forward_hook(quantize_output)
        rows.append(QuantizedOutput(name, before, '8 bits'))

    for addition in plan.additions:
        for side, made_by in enumerate(addition.operands):
            producers = [p for p in made_by if not isinstance(modules.get(p), _NEVER_CALLED)]
            usable = [p for p in producers if plan.calls[p] == 1 and not isinstance(modules[p], _CONTAINERS)]
            if not usable:
                why = 'made by a function' if not producers else 'made by a module that is called several times'
                place = f'{addition.module or "model"}, operand {side}'
                rows.append(QuantizedOutput(place, 'addition', f'float: {why}'))
            elif not done.intersection(producers):
                quantize(usable[0], 'addition')
    for name in _before_activations(model, plan, edges):
        if name not in done:
            quantize(name, 'activation')
    return rows


def quantize_products(model: nn.Module, config: Quantization, plan: Plan, deployable: bool) -> dict[str, str]:
    """Quantize the factors of products, each by its own quantizer; returns why products stay float, by name.

    What softmax makes lies between 0 and 1, most of it near 0: see AttentionWeights.
    """
    bits, modules = config.attention.bits, dict(model.named_modules())
    settings = dataclasses.replace(config.activation.with_bits(bits), range='auto')
    off = 'by config' if FLOAT_BITS in (bits, config.activation.bits) or not deployable else ''
    notes: dict[str, str] = {}
    for product in plan.products:
        module, note = modules[product.module], product.note or off
        note = 'skipped by config' if config.skipped(product.module) else note
        if note:
            notes[product.name] = f'float: {note}'
        if not off and type(module) is not nn.MultiheadAttention:
            makers: list[Any] = [
                AttentionWeights(bits) if mark else make_activation_quantizer(settings) for mark in product.softmax
            ]
            attach(module, product.number, [] if note else makers)  # one that stays float counts too
            module.products_recorded = product.module, product.number + 1
    return notes


def _before_activations(model: nn.Module, plan: Plan, edges: dict[str, str]) -> list[str]:
    """The convolutions whose results only an activation function such as SiLU reads; or the BN that follows them.

    The integer kernel of a convolution needs a quantized output. Behind ReLU the input quantizer of the next layer
    serves. Linear layers do not need one, and the outputs of the last layers are those of the model.
    """
    norms = folded_norms(model, plan)
    ends = {
        norms.get(name, name): None
        for name, layer in quant_layers(model).items()
        if FLOAT_BITS not in layer.bits and isinstance(layer, nn.Conv2d) and edges.get(name) != 'last'
    }
    return [name for name in ends if name in plan.activated]
