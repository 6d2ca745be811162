"""Merge quantized layers with the batch normalization behind them (docs/method.md, section 4).

With integer weights W_int (step d_g of the channel's group) and integer inputs A_int (step s), and acc_c their sum:

    y_c = gamma_c * (d_g * s * acc_c + b_c - mu_c) / sqrt(var_c + eps) + beta_c = M_c * acc_c + B_c

one multiplier and one bias a channel, which batch normalization needs anyway: groups cost nothing. Input codes count
from zero, c = round(x / s) in [lo, hi]; with a zero point z the unsigned code of a runtime is c + z. Padding has c = 0.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.deployable import folded_norms
from ..core.errors import UserError
from ..core.integer_bias import LARGEST_BIAS, integer_bias, multiplier_and_bias, spread
from ..core.layers import QuantLayer
from ..core.modules import quant_layers, replace_modules
from ..core.pyramid import PyramidQuantizers, move_pyramid, quantizers_of
from ..core.quantizers import ActivationQuantizer, Stage
from ..core.topology import Plan


class IntegerLayer(nn.Module):
    """A quantized layer and its batch normalization as integers: what an integer runtime computes, in plain torch.

    Sums are exact: codes are multiplied and added in float64, which holds integers up to 2^53. They are those of int32
    as well: a layer is refused whose largest possible sum, weights spread over int8, does not fit beside the bias.
    """

    codes: Tensor
    step: Tensor
    multiplier: Tensor
    bias: Tensor

    def __init__(self, layer: Any, quant: ActivationQuantizer | None, norm: _BatchNorm | None, name: str) -> None:
        super().__init__()
        _check(layer, quant, norm, name)
        assert quant is not None
        self.lo, self.hi, self.weight_bits, self.input_bits = quant.lo, quant.hi, layer.weight_quant.bits, quant.bits
        self.spread = spread(layer.weight_quant)
        with torch.no_grad():
            _, multiplier, bias = multiplier_and_bias(layer, norm, quant)
            if layer.deployable:
                bias = integer_bias(multiplier, bias, layer.weight_quant)
            codes = layer.weight_quant.codes(layer.filters())
            largest = int(codes.double().abs().flatten(1).sum(1).amax()) * self.spread * max(-self.lo, self.hi)
            if largest > 2**31 - 1 - LARGEST_BIAS:
                raise UserError(f'layer {name} cannot be merged: its sums, up to {largest:,}, may not fit into 32 bits')
            self.register_buffer('codes', layer.set_filters(codes))
            self.register_buffer('step', quant.step().detach().float())
            self.register_buffer('multiplier', multiplier.float())
            self.register_buffer('bias', bias.float())
        # The layer without its tensors: it knows stride, padding and the like.
        bare = copy.copy(layer)
        bare._parameters, bare._buffers, bare._modules, bare._shared, bare._norm = {}, {}, {}, (), ()
        self.__dict__['bare'] = bare  # not a child: it has no state

    bare: Any
    norm: str | None = None
    """Name of the batch normalization that was folded into it."""

    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input, as floats in [lo, hi]."""
        step = self.step
        return (x.float() / torch.where(step > 0, step, 1)).round().clamp(self.lo, self.hi) * (step > 0)

    def accumulate(self, codes: Tensor) -> Tensor:
        """acc: the integer sums for integer input codes, as float64."""
        return self.bare.compute(codes.double(), self.codes.double(), None)

    def scale(self, accumulated: Tensor) -> Tensor:
        """y = M * acc + B in float32."""
        shape = [1] * accumulated.dim()
        shape[-1 if isinstance(self.bare, nn.Linear) else 1] = -1
        return accumulated.float() * self.multiplier.view(shape) + self.bias.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Any input of the layer to the output of its batch normalization, or to its own if there is none."""
        return self.scale(self.accumulate(self.input_codes(x)))


class IntegerPyramid(nn.Module):
    """A layer with thresholds for pyramid levels: an IntegerLayer for each level, which share the weight's codes."""

    def __init__(self, layer: Any, norm: _BatchNorm | None, name: str) -> None:
        super().__init__()
        self.pyramid_level, self.pyramid_levels = 0, layer.pyramid_levels
        for level, quant in enumerate(quantizers_of(layer.input_quant)):
            merged = IntegerLayer(layer, quant, norm, f'{name}.{level}')
            if level:
                merged.codes = self.get_submodule('0').codes  # type: ignore[assignment]
            self.add_module(str(level), merged)

    def forward(self, x: Tensor) -> Tensor:
        """The input of a level to its output; gdrq_mm/core/pyramid.py starts the count anew and checks it."""
        merged = self._modules[str(min(self.pyramid_level, self.pyramid_levels - 1))]
        self.pyramid_level += 1
        return merged(x)  # type: ignore[misc]


def shared_codes(merged: nn.Module) -> dict[str, str]:
    """Name of the codes of a layer's second and later pyramid levels -> that of the first level's, the same tensor."""
    levels = {
        name: module.pyramid_levels for name, module in merged.named_modules() if isinstance(module, IntegerPyramid)
    }
    return {f'{name}.{i}.codes': f'{name}.0.codes' for name, count in levels.items() for i in range(1, count)}


def merge_model(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in evaluation mode in which every quantized layer is an IntegerLayer.

    Args:
        model: quantized and trained; it is not changed.
        plan: of a prediction, see gdrq_mm/core/topology.py.

    Raises:
        UserError: a layer cannot be expressed with one multiplier and one bias a channel; names it and says why.
    """
    merged = copy.deepcopy(model).eval()
    modules = dict(merged.named_modules())
    layers = quant_layers(merged)
    norms = folded_norms(merged, plan)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        if plan.calls.get(name):
            norm: Any = modules[norms[name]] if name in norms else None
            if isinstance(layer.input_quant, PyramidQuantizers):
                replaced[layer] = IntegerPyramid(layer, norm, name)
            else:
                replaced[layer] = IntegerLayer(layer, layer.input_quant, norm, name)
            for part in replaced[layer].modules():
                if isinstance(part, IntegerLayer):
                    part.norm = norms.get(name)
    replaced.update({modules[name]: nn.Identity() for name in norms.values()})
    replaced.update({modules[name]: nn.Identity() for name in plan.training_only if name in modules})
    for old, new in replaced.items():
        _move_hooks(old, new)
    replace_modules(merged, replaced)
    move_pyramid(merged, replaced)
    return merged


def _check(layer: QuantLayer, activation: ActivationQuantizer | None, norm: _BatchNorm | None, name: str) -> None:
    """Raise UserError if the layer is not a sum of integers times a multiplier a channel."""
    weight = layer.weight_quant
    if weight is None or activation is None or 32 in layer.bits:
        raise UserError(f'layer {name} cannot be merged: its {"weight" if layer.bits[0] == 32 else "input"} is float')
    for quantizer in (weight, activation):
        if quantizer.uneven:
            raise UserError(f'layer {name} cannot be merged: {quantizer.uneven}')
        if not quantizer.calibrated or quantizer.stage not in (Stage.QUANTIZE, Stage.FREEZE):
            raise UserError(f'layer {name} cannot be merged: it has not been trained or calibrated to its end')
    if norm is not None and (norm.running_mean is None or norm.running_var is None):
        raise UserError(f'layer {name} cannot be merged: its batch normalization keeps no statistics')


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """What is attached to the output of a module, such as its quantizer."""
    new._forward_hooks.update(old._forward_hooks)
    if 'output_quant' in old._modules:
        new.add_module('output_quant', old._modules['output_quant'])
