"""Convolution and linear layers with a quantized weight and input.

A layer is a direct child of its torch class and shares the Parameter objects of the layer it came from, so checkpoint
names, initializers and optimizers see an ordinary layer. Quantizers: `weight_quant` (None: float) and `input_quant`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .config import FLOAT_BITS, Activation, Quantization, Weight
from .quantizers import ACTIVATION_METHODS, WEIGHT_METHODS, ActivationQuantizer, Stage, WeightQuantizer


def make_weight_quantizer(cfg: Weight, filters: Tensor) -> WeightQuantizer | None:
    """The quantizer of a layer's filters, (C_out, ...), or None for float."""
    if cfg.bits == FLOAT_BITS:
        return None
    method: Any = WEIGHT_METHODS[cfg.method]
    place = dict(kernel=tuple(filters.shape[2:])) if method.by_place else {}
    return method(cfg.bits, len(filters), cfg.groups, **place, **cfg.options)


def make_activation_quantizer(cfg: Activation) -> ActivationQuantizer | None:
    """The quantizer of a layer's input, or None for float."""
    if cfg.bits == FLOAT_BITS:
        return None
    return ACTIVATION_METHODS[cfg.method](cfg.bits, cfg.range, **cfg.options)


LARGEST_BIAS = 2**30
"""In units of the sum; int32 holds it with room for the sum itself."""


def spread(quantizer: WeightQuantizer) -> int:
    """By what the codes of a weight are multiplied in the integer graph: as much as int8 holds, 18 for 4 bits (ours).

    An integer kernel adds its bias to the sum, so the bias is a multiple of one unit of the sum. The spread makes the
    unit, and the rounding of the bias, so much smaller.
    """
    return max(1, 127 // max(-quantizer.lo, quantizer.hi))


def integer_bias(multiplier: Tensor, bias: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """B as the integer graph has it: round(B / u) * u with the unit u = |M| / spread; (C,) float64.

    A channel without a unit keeps its bias: gamma is 0, or so small that int32 could not hold the bias.
    """
    unit = multiplier.abs() / spread(quantizer)
    codes = (bias / torch.where(unit > 0, unit, 1)).round()
    return torch.where((unit > 0) & (codes.abs() <= LARGEST_BIAS), codes * unit, bias)


def _normalization(norm: _BatchNorm | None, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """gain and shift of each channel, (C,) float64: gain * x + shift is the normalization of x."""
    one = torch.ones(channels, dtype=torch.float64, device=device)
    if norm is None:
        return one, torch.zeros_like(one)
    assert norm.running_mean is not None and norm.running_var is not None
    gain = one if norm.weight is None else norm.weight.detach().double()
    gain = gain / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(one) if norm.bias is None else norm.bias.detach().double()
    return gain, shift - gain * norm.running_mean.double()


class Levels(nn.ModuleList):
    """The input quantizers of a layer that a head calls once for each pyramid level."""

    @property
    def quantizers(self) -> list[Any]:
        """Those of the levels, in the order of the calls."""
        return list(self)

    @property
    def bits_in_use(self) -> int:
        """Bits of every level; 32 if calibration did not reach one."""
        return max(quant.bits_in_use for quant in self.quantizers)

    @property
    def calibrated(self) -> bool:
        """Whether every level has a threshold."""
        return all(quant.calibrated for quant in self.quantizers)

    @property
    def kind(self) -> str:
        """The ranges of the levels."""
        return '/'.join(dict.fromkeys(quant.kind for quant in self.quantizers)) + f', {len(self)} levels'


class QuantLayer:
    """What the quantized layers share; mixed into a torch layer."""

    weight_quant: WeightQuantizer | None
    _shared: tuple[ActivationQuantizer | Levels, ...]
    _norm: tuple[_BatchNorm, ...] | None
    """With `deployable`: the batch normalization that takes up into this layer, if there is one; a tuple, because it is
    no child of this layer."""
    seen: bool
    """Whether `forward` ran since this flag was cleared; calibration reads it."""
    level: int
    """With a quantizer a level: how often `forward` ran since that of the head began."""
    weight: Tensor

    @property
    def input_quant(self) -> ActivationQuantizer | Levels | None:
        """The quantizer of the input: this layer's own, or that of the first reader of the same tensor."""
        return self._shared[0] if self._shared else self.own_input_quant  # type: ignore[attr-defined]

    @classmethod
    def from_float(cls, layer: nn.Module, weight: Weight, activation: Activation) -> Any:
        """A quantized layer that takes over the Parameters, hooks and attributes of `layer`."""
        new = cls.__new__(cls)  # type: ignore[type-var]
        new.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        new._attach(weight, activation)
        return new

    def _attach(self, weight: Weight, activation: Activation) -> None:
        self.seen, self.level = False, 0
        self._shared, self._norm = (), None
        self.activation_settings = activation
        self.weight_quant = make_weight_quantizer(weight, self.filters())
        self.own_input_quant: ActivationQuantizer | Levels | None = make_activation_quantizer(activation)

    @property
    def levels(self) -> int:
        """How many pyramid levels have an input quantizer of their own; 1 if there is one for all."""
        return len(self.input_quant) if isinstance(self.input_quant, Levels) else 1

    @property
    def next_quant(self) -> ActivationQuantizer | None:
        """What the next call quantizes its input with."""
        quant = self.input_quant
        # Of too many levels the last: the head tells at its end that they were
        return quant.quantizers[min(self.level, len(quant) - 1)] if isinstance(quant, Levels) else quant

    @property
    def next_level(self) -> str:
        """What follows the layer's name in its next call: '.LEVEL', or '' with one quantizer for all levels."""
        return f'.{self.level}' if self.levels > 1 else ''

    def split_levels(self, count: int) -> None:
        """Use an input quantizer of its own for each of the calls during one forward of the head."""
        quantizers: list[Any] = [make_activation_quantizer(self.activation_settings) for _ in range(count)]
        self.own_input_quant = Levels(quantizers)

    def share_input_quant(self, owner: QuantLayer) -> None:
        """Use the input quantizer of another reader of the same tensor. It is saved under the owner's name only."""
        self.own_input_quant = None
        assert owner.input_quant is not None
        self._shared = (owner.input_quant,)  # a tuple, so that torch does not register it a second time

    def deploy_with(self, norm: _BatchNorm | None) -> None:
        """Evaluate with the bias that the integer graph has, see :func:`integer_bias`."""
        self._norm = () if norm is None else (norm,)

    @property
    def deployable(self) -> bool:
        """Whether :meth:`deploy_with` was called."""
        return self._norm is not None

    def merged(self, norm: _BatchNorm | None, quant: ActivationQuantizer) -> tuple[Tensor, Tensor, Tensor]:
        """gain, M and B of each channel, (C_out,) float64: the output is gain * (d s acc + b) + shift = M acc + B.

        Args:
            norm: what stands behind the layer.
            quant: what the input was quantized with.
        """
        layer: Any = self
        filters = self.filters()
        gain, shift = _normalization(norm, len(filters), filters.device)
        step = layer.weight_quant.step(filters).detach().double().flatten()
        own = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
        return gain, gain * step * quant.step().detach().double(), gain * own + shift

    def biased(self) -> Tensor | None:
        """The bias to compute with: in evaluation of a deployable layer that of the integer graph."""
        layer: Any = self
        quant: Any = self.input_quant
        if isinstance(quant, Levels):  # that of the call which `quantized` has counted
            quant = quant.quantizers[min(self.level, len(quant)) - 1]
        bias, quantizers = layer.bias, (layer.weight_quant, quant)
        if layer.training or self._norm is None or any(getattr(q, 'uneven', '-') for q in quantizers):  # or float
            return bias
        if any(q.stage not in (Stage.QUANTIZE, Stage.FREEZE) for q in quantizers):
            return bias
        norm = self._norm[0] if self._norm else None
        if norm.training if norm is not None else bias is None:
            return bias
        with torch.no_grad():
            gain, multiplier, before = self.merged(norm, quant)
            moved = integer_bias(multiplier, before, layer.weight_quant) - before
            moved = torch.where(gain == 0, 0, moved / torch.where(gain == 0, 1, gain)).to(self.weight.dtype)
        return moved if bias is None else bias + moved

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the weight and of the input; 32 is float."""
        weight, activation = self.weight_quant, self.input_quant
        return weight.bits_in_use if weight else FLOAT_BITS, activation.bits_in_use if activation else FLOAT_BITS

    def filters(self) -> Tensor:
        """The weight as filters, (C_out, ...)."""
        return self.weight

    def set_filters(self, filters: Tensor) -> Tensor:
        """The inverse of :meth:`filters`: (C_out, ...) in the layout of the weight."""
        return filters

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized input and weight."""
        self.seen = True
        quant = self.next_quant
        if self.levels > 1:
            self.level += 1
        weight = self.weight if self.weight_quant is None else self.set_filters(self.weight_quant(self.filters()))
        return (x if quant is None else quant(x)), weight


def _init(self: Any, torch_class: type, args: Any, quantization: Mapping[str, Any] | None, kwargs: Any) -> None:
    torch_class.__init__(self, *args, **kwargs)  # type: ignore[misc]
    cfg = Quantization.from_dict(quantization or {})
    self._attach(*cfg.for_layer(torch_class.__name__))


@MODELS.register_module(name='GDRQConv2d')
class QuantConv2d(QuantLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input: any stride, dilation, groups (depthwise too), padding, bias.

    In a hand-written model: `conv_cfg=dict(type='GDRQConv2d', quantization=dict(weight=dict(bits=4)))`; see
    gdrq_mm/config.py for the dict. Outside QuantRunner thresholds start from the first training batch and follow only
    with `custom_hooks=[dict(type='ThresholdHook')]`; evaluating an uncalibrated layer is an error.
    """

    def __init__(self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        _init(self, nn.Conv2d, args, quantization, kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W')."""
        return self.compute(*self.quantized(x), self.biased())

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        return self._conv_forward(x, weight, bias)


class QuantConv2dAdaptivePadding(QuantLayer, nn.Conv2d):
    """mmcv's convolution whose output is ceil(size / stride) pixels, as TensorFlow pads (EfficientNet)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W')."""
        return self.compute(*self.quantized(x), self.biased())

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        pads: list[int] = []  # left, right, top, bottom
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (math.ceil(size / stride) - 1) * stride + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max(reach - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return self._conv_forward(nn.functional.pad(x, pads), weight, bias)


@MODELS.register_module(name='GDRQConvTranspose2d')
class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with quantized weight and input; its weight is (C_in, C_out / groups, kH, kW)."""

    def __init__(self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        _init(self, nn.ConvTranspose2d, args, quantization, kwargs)

    def filters(self) -> Tensor:
        c_in, c_out, *kernel = self.weight.shape
        split = self.weight.view(self.groups, c_in // self.groups, c_out, *kernel)
        return split.transpose(1, 2).reshape(self.groups * c_out, c_in // self.groups, *kernel)

    def set_filters(self, filters: Tensor) -> Tensor:
        c_in, c_out, *kernel = self.weight.shape
        split = filters.view(self.groups, c_out, c_in // self.groups, *kernel)
        return split.transpose(1, 2).reshape(c_in, c_out, *kernel)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W')."""
        return self.compute(*self.quantized(x), self.bias, output_size)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        conv: Any = self  # torch annotates these attributes more narrowly than its own calls take them
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        extra = conv._output_padding(x, output_size, stride, padding, conv.kernel_size, 2, dilation)
        return nn.functional.conv_transpose2d(x, weight, bias, stride, padding, extra, self.groups, dilation)


@MODELS.register_module(name='GDRQLinear')
class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear with quantized weight and input."""

    def __init__(self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        _init(self, nn.Linear, args, quantization, kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.compute(*self.quantized(x), self.biased())

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        return nn.functional.linear(x, weight, bias)


QUANTIZED: dict[type, type] = {
    nn.Conv2d: QuantConv2d,
    wrappers.Conv2d: QuantConv2d,
    Conv2dAdaptivePadding: QuantConv2dAdaptivePadding,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    wrappers.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    wrappers.Linear: QuantLinear,
}
"""The exact float classes that are quantized. mmcv's wrappers differ from torch's only for very old torch."""
