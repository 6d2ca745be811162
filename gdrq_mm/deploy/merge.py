"""Merge quantized layers with the batch normalization behind them (docs/method.md, section 4).

With integer weights W_int (step d_g of the channel's group) and integer inputs A_int (step s), and acc_c their sum:

    y_c = gamma_c * (d_g * s * acc_c + b_c - mu_c) / sqrt(var_c + eps) + beta_c = M_c * acc_c + B_c

one multiplier and one bias a channel, which batch normalization needs anyway: groups cost nothing. Input codes count
from zero, c = round(x / s) in [lo, hi]; with a zero point z the unsigned code of a runtime is c + z. Padding has c = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.attention import LINEAR, WrittenOut
from ..core.deployable import float_output, folded_norms
from ..core.errors import UserError
from ..core.functional import fake_quantize
from ..core.integer_bias import LARGEST_BIAS, integer_bias, multiplier_and_bias, spread
from ..core.layers import QUANTIZED, QuantLayer
from ..core.modules import detached_copy, quant_layers, replace_modules
from ..core.pyramid import PyramidQuantizers, move_pyramid, quantizers_of
from ..core.quantizers import ActivationQuantizer, Stage
from ..core.topology import Plan
from ..core.typed import FLOAT_BITS


class IntegerLayer(nn.Module):
    """A quantized layer and its batch normalization as integers: what an integer runtime computes, in plain torch.

    Sums are exact: codes are multiplied and added in float64, which holds integers up to 2^53.

    Args:
        layer: float or quantized; it gives stride, padding and the like, its tensors are not kept.
        codes: of the weight, int8, in the shape of the weight.
        step: of the input, a scalar.
        multiplier, bias: M and B, (C_out,).
        lo, hi: smallest and largest code of the input.
        weight_bits, input_bits: of the codes.
        spread: by what an integer graph multiplies the codes of the weight, see gdrq_mm/core/integer_bias.py.
    """

    codes: Tensor
    step: Tensor
    multiplier: Tensor
    bias: Tensor

    def __init__(
        self,
        layer: nn.Module,
        *,
        codes: Tensor,
        step: Tensor,
        multiplier: Tensor,
        bias: Tensor,
        lo: int,
        hi: int,
        weight_bits: int,
        input_bits: int,
        spread: int,
    ) -> None:
        super().__init__()
        self.lo, self.hi, self.weight_bits, self.input_bits, self.spread = lo, hi, weight_bits, input_bits, spread
        for name, value in dict(codes=codes, step=step, multiplier=multiplier, bias=bias).items():
            self.register_buffer(name, value)
        self.__dict__['bare'] = _bare(layer)  # not a child: it has no state

    bare: Any
    """The layer without its tensors."""
    norm: str | None = None
    """Name of the batch normalization that was folded into it."""

    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input, as floats in [lo, hi]."""
        step = self.step
        return (x.float() / torch.where(step > 0, step, 1)).round().clamp(self.lo, self.hi) * (step > 0)

    def accumulate(self, codes: Tensor, **options: Any) -> Tensor:
        """acc: the integer sums for integer input codes, as float64."""
        return self.bare.compute(codes.double(), self.codes.double(), None, **options)

    def scale(self, accumulated: Tensor) -> Tensor:
        """y = M * acc + B in float32."""
        shape = [1] * accumulated.dim()
        # An image may come without a batch.
        shape[-1 if isinstance(self.bare, LINEAR) else accumulated.dim() - self.codes.dim() + 1] = -1
        return accumulated.float() * self.multiplier.view(shape) + self.bias.view(shape)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Any input of the layer to the output of its batch normalization, or to its own if there is none."""
        options = given(input, *args, **kwargs)
        return self.scale(self.accumulate(self.input_codes(options.pop('input')), **options))


def given(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a layer's forward by their names; only a transposed convolution has a second one."""
    return {**dict(zip(('input', 'output_size'), args)), **kwargs}


class IntegerPyramid(nn.Module):
    """A layer with thresholds for pyramid levels: an IntegerLayer for each level, which share the weight's codes."""

    def __init__(self, levels: Sequence[IntegerLayer]) -> None:
        super().__init__()
        self.pyramid_level, self.pyramid_levels = 0, len(levels)
        for number, level in enumerate(levels):
            level.codes = levels[0].codes
            self.add_module(str(number), level)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The input of a level to its output; gdrq_mm/core/pyramid.py starts the count anew and checks it."""
        merged = self._modules[str(min(self.pyramid_level, self.pyramid_levels - 1))]
        self.pyramid_level += 1
        return merged(*args, **kwargs)  # type: ignore[misc]


class OutputQuantizer(nn.Module):
    """The quantizer of a module's output: fake quantization with a fixed step, a scalar."""

    step: Tensor

    def __init__(self, step: Tensor, lo: int, hi: int) -> None:
        super().__init__()
        self.lo, self.hi = lo, hi
        self.register_buffer('step', step)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return fake_quantize(x, self.step, self.lo, self.hi)


class Absent(nn.Module):
    """Stands for a module that is not deployed: an auxiliary head, or a layer that the plan's prediction missed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError."""
        raise UserError(f'{self.name} is not in the deployed model: it did not run when the model was recorded')


def merge_model(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in evaluation mode in which every quantized layer is an IntegerLayer; the others stay float.

    Args:
        model: quantized and trained; it is not changed.
        plan: of a prediction, see gdrq_mm/core/topology.py.

    Raises:
        UserError: a layer cannot be expressed with one multiplier and one bias a channel; names it and says why. Or no
            layer is quantized.
    """
    merged = detached_copy(model).eval()
    modules = dict(merged.named_modules())
    norms = folded_norms(merged, plan)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in quant_layers(merged).items():
        if plan.calls.get(name) and not layer.stays_float:
            replaced[layer] = _merged(layer, norms.get(name), modules, name)
    if not replaced:
        raise UserError('the model has no quantized layer: there are no integers to export')
    replaced.update({modules[name]: nn.Identity() for name in norms.values()})
    replaced.update({modules[name]: Absent(name) for name in plan.training_only if name in modules})
    for old, new in replaced.items():
        move_output(old, new)
    replace_modules(merged, replaced)
    move_pyramid(merged, replaced)
    for name, module in merged.named_modules():
        if isinstance(module._modules.get('output_quant'), ActivationQuantizer):
            _fix_output(module, name)
        if 'product_quant' in module._modules:
            _fix_products(module, name)
        if isinstance(module, WrittenOut):
            module.forget_weights()
    return merged


def _merged(layer: Any, norm: str | None, modules: dict[str, Any], name: str) -> IntegerLayer | IntegerPyramid:
    if not isinstance(layer.input_quant, PyramidQuantizers):
        return _integer_layer(layer, layer.input_quant, norm, modules, name)
    return IntegerPyramid(
        [
            _integer_layer(layer, quant, norm, modules, f'{name}.{level}')
            for level, quant in enumerate(quantizers_of(layer.input_quant))
        ]
    )


@torch.no_grad()
def _integer_layer(
    layer: Any, quant: ActivationQuantizer | None, norm: str | None, modules: dict[str, Any], name: str
) -> IntegerLayer:
    """A trained layer as integers.

    Its sums are refused if the largest possible one, weights spread over int8, does not fit into int32 beside the bias.
    """
    batch_norm: _BatchNorm | None = None if norm is None else modules[norm]
    _check(layer, quant, batch_norm, name)
    assert quant is not None
    weight = layer.weight_quant
    _, multiplier, bias = multiplier_and_bias(layer, batch_norm, quant)
    if layer.deployable:
        bias = integer_bias(multiplier, bias, weight)
    codes = weight.codes(layer.filters())
    largest = int(codes.double().abs().flatten(1).sum(1).amax()) * spread(weight) * max(-quant.lo, quant.hi)
    if largest > 2**31 - 1 - LARGEST_BIAS:
        raise UserError(f'layer {name} cannot be merged: its sums, up to {largest:,}, may not fit into 32 bits')
    merged = IntegerLayer(
        layer,
        codes=layer.set_filters(codes),
        step=quant.step().detach().float(),
        multiplier=multiplier.float(),
        bias=bias.float(),
        lo=quant.lo,
        hi=quant.hi,
        weight_bits=weight.bits,
        input_bits=quant.bits,
        spread=spread(weight),
    )
    merged.norm = norm
    return merged


def _check(layer: QuantLayer, activation: ActivationQuantizer | None, norm: _BatchNorm | None, name: str) -> None:
    """Raise UserError if the layer is not a sum of integers times a multiplier a channel."""
    weight = layer.weight_quant
    if weight is None or activation is None or FLOAT_BITS in layer.bits:
        raise UserError(
            f'layer {name} cannot be merged: its {"weight" if layer.bits[0] == FLOAT_BITS else "input"} is float'
        )
    for quantizer in (weight, activation):
        if quantizer.uneven:
            raise UserError(f'layer {name} cannot be merged: {quantizer.uneven}')
        if not quantizer.calibrated:
            raise UserError(
                f'layer {name} cannot be merged: it has no threshold, which training or calibration finds; '
                'a float checkpoint has none'
            )
        if quantizer.stage not in (Stage.QUANTIZE, Stage.FREEZE):
            raise UserError(f'layer {name} cannot be merged: it has not been trained to its end')
    if norm is not None and (norm.running_mean is None or norm.running_var is None):
        raise UserError(f'layer {name} cannot be merged: its batch normalization keeps no statistics')


def _fix_output(module: nn.Module, name: str) -> None:
    """Fix the quantizer of an output; one that calibration did not reach passes its values and is taken away."""
    fixed = _fixed(module.output_quant, f'the output of {name}')
    if fixed is None:
        float_output(module)
    else:
        module.output_quant = fixed


def _fix_products(module: Any, name: str) -> None:
    """Fix the quantizers of a module's products; a product that calibration did not reach becomes float."""
    for number, quantizers in enumerate(module.product_quant):
        fixed: list[Any] = [_fixed(quant, f'product {number} of {name}') for quant in quantizers]
        module.product_quant[number] = nn.ModuleList([] if None in fixed else fixed)


def _fixed(quant: Any, where: str) -> OutputQuantizer | None:
    if quant.uneven:
        raise UserError(f'{where} cannot be merged: {quant.uneven}')
    return None if quant.stage == Stage.FLOAT else OutputQuantizer(quant.step().detach().float(), quant.lo, quant.hi)


def _bare(layer: nn.Module) -> Any:
    """A layer of the quantized class without tensors, quantizers and hooks: it knows stride, padding and the like."""
    kind: Any = type(layer) if isinstance(layer, QuantLayer) else QUANTIZED[type(layer)]
    bare = kind.__new__(kind)
    bare.__dict__.update(layer.__dict__)
    bare._parameters, bare._buffers, bare._modules, bare._shared, bare._norm = {}, {}, {}, (), ()
    bare.__dict__.pop('attention', None)
    return bare


def move_output(old: nn.Module, new: nn.Module) -> None:
    """Attach what is attached to the output of a module to another one: hooks, and the quantizer."""
    new._forward_hooks.update(old._forward_hooks)
    if 'output_quant' in old._modules:
        new.add_module('output_quant', old._modules['output_quant'])
