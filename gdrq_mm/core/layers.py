"""Convolution and linear layers with a quantized weight and input.

A layer is a direct child of its torch class and shares the Parameter objects of the layer it came from, so checkpoint
names, initializers and optimizers see an ordinary layer. Quantizers: `weight_quant` (None: float) and `input_quant`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .compat import after_state_dict
from .config import Activation, Quantization, Weight
from .errors import UserError
from .fused import fused
from .integer_bias import bias_in_use
from .pyramid import InputQuant, PyramidQuantizers, quantizers_of
from .quantizers import ACTIVATION_METHODS, WEIGHT_METHODS, ActivationQuantizer, ModeOfModel, WeightQuantizer
from .quantizers.base import in_backward
from .typed import FLOAT_BITS


def make_weight_quantizer(cfg: Weight, filters: Tensor) -> WeightQuantizer | None:
    """The quantizer of a layer's filters, (C_out, ...), or None for float."""
    if cfg.bits == FLOAT_BITS:
        return None
    return WEIGHT_METHODS[cfg.method](cfg.bits, filters.shape, cfg.groups, **cfg.options)


def make_activation_quantizer(cfg: Activation) -> ActivationQuantizer | None:
    """The quantizer of a layer's input, or None for float."""
    if cfg.bits == FLOAT_BITS:
        return None
    return ACTIVATION_METHODS[cfg.method](cfg.bits, cfg.range, **cfg.options)


COPIED = ('_parameters', '_buffers', '_modules', '_state_dict_hooks', '_state_dict_pre_hooks')
"""Attributes of a layer that the one in its place changes. Its hooks stay where they are: handles remove them there."""
_OWN = ('root', 'seen', 'pyramid_level', 'deployable', 'activation_settings', '_shared', '_norm')
_QUANTIZERS = ('weight_quant', 'own_input_quant')
"""What a quantized layer has and the float one has not: attributes, and modules or None."""


def remove_hooks(module: nn.Module, *hooks: Any) -> None:
    """Take functions that were registered as hooks off a module."""
    for registered in (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks):
        for key in [key for key, hook in registered.items() if hook in hooks]:
            del registered[key]
            module._forward_hooks_always_called.pop(key, None)


class QuantLayer(ModeOfModel):
    """What quantized layers have in common; a mixin for a torch layer."""

    weight_quant: WeightQuantizer | None
    _shared: tuple[InputQuant, ...]
    deployable: bool
    """Whether evaluation uses the bias that the integer graph has, see core/integer_bias.py."""
    _norm: tuple[_BatchNorm, ...]
    seen: bool
    """Whether `forward` ran since this flag was cleared; calibration reads it."""
    pyramid_level: int
    """Number of calls since the forward of the head began: the pyramid level of the next call, see pyramid.py."""
    weight: Tensor
    bias: Any

    @property
    def input_quant(self) -> InputQuant | None:
        """The quantizer of the input: this layer's own, or that of the first reader of the same tensor."""
        return self._shared[0] if self._shared else self.own_input_quant  # type: ignore[attr-defined]

    @property
    def norm(self) -> _BatchNorm | None:
        """The batch normalization that is folded into a deployable layer; None if there is none."""
        return self._norm[0] if self._norm else None  # in a tuple, else torch would register it as a child

    @classmethod
    def from_float(cls, layer: nn.Module, weight: Weight, activation: Activation) -> Any:
        """A quantized layer that takes over the Parameters, hooks and attributes of `layer`."""
        new = cls.__new__(cls)  # type: ignore[type-var]
        new.__dict__.update({k: copy.copy(v) if k in COPIED else v for k, v in layer.__dict__.items()})
        new._attach(weight, activation)
        return new

    def to_float(self) -> nn.Module:
        """The inverse of :meth:`from_float`: a float layer with the same Parameters, hooks and attributes."""
        kind: Any = next(kind for kind, quantized in QUANTIZED.items() if quantized is type(self))
        new = kind.__new__(kind)
        kept = {k: v for k, v in self.__dict__.items() if k not in (*_OWN, *_QUANTIZERS)}
        new.__dict__.update({k: copy.copy(v) if k in COPIED else v for k, v in kept.items()})
        for name in _QUANTIZERS:
            new._modules.pop(name, None)
        remove_hooks(new, _settle)
        return new

    def _attach(self, weight: Weight, activation: Activation) -> None:
        self.seen, self.pyramid_level, self.deployable = False, 0, False
        self._shared, self._norm = (), ()
        self.activation_settings = activation
        self.weight_quant = make_weight_quantizer(weight, self.filters())
        self.own_input_quant: InputQuant | None = make_activation_quantizer(activation)
        after_state_dict(self, _settle)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> Any:
        raise UserError(
            'nn.DataParallel copies a model in each step, and quantizers that layers share would stay on the first '
            'device: use nn.parallel.DistributedDataParallel'
        )

    @property
    def pyramid_levels(self) -> int:
        """How many pyramid levels have an input quantizer of their own; 1 if there is one for all."""
        return max(1, len(quantizers_of(self.input_quant)))

    @property
    def next_quant(self) -> ActivationQuantizer | None:
        """The quantizer of the next call's input."""
        quantizers = quantizers_of(self.input_quant)
        if not quantizers:
            return None
        # If there are more calls than pyramid levels, the head reports it when its forward ends.
        return quantizers[min(self.pyramid_level, len(quantizers) - 1)]

    @property
    def next_level(self) -> str:
        """Suffix of the layer's name for its next call: '.0', '.1', ... by pyramid level; '' if all share one."""
        return f'.{self.pyramid_level}' if self.pyramid_levels > 1 else ''

    def split_pyramid(self, count: int) -> None:
        """Use `count` input quantizers, one for each call during one forward of the head."""
        quantizers: list[Any] = [make_activation_quantizer(self.activation_settings) for _ in range(count)]
        self.own_input_quant = PyramidQuantizers(quantizers)

    def share_input_quant(self, owner: QuantLayer) -> None:
        """Use the input quantizer of `owner`, which reads the same tensor. It is saved once, under the owner's name."""
        self.own_input_quant = None
        assert owner.input_quant is not None
        self._shared = (owner.input_quant,)  # a tuple, so that torch does not register it a second time

    def deploy_with(self, norm: _BatchNorm | None) -> None:
        """Evaluate with the bias of the integer graph; `norm` is folded into this layer."""
        self.deployable, self._norm = True, () if norm is None else (norm,)

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of the weight and of the input; 32 is float."""
        weight, activation = self.weight_quant, self.input_quant
        return weight.bits_in_use if weight else FLOAT_BITS, activation.bits_in_use if activation else FLOAT_BITS

    @property
    def stays_float(self) -> bool:
        """Whether it has no quantizer: 32 bits on both sides."""
        return self.weight_quant is None and self.input_quant is None

    @property
    def learns(self) -> bool:
        """Whether its weight takes a gradient."""
        with torch.enable_grad():  # else rows of a packed weight take none
            return self.weight.requires_grad

    @property
    def held(self) -> tuple[Any, slice]:
        """The Parameter that holds the weight, and which of its rows the weight is."""
        return self.weight, slice(None)

    @property
    def weight_key(self) -> tuple[int, int]:
        """The same for layers that share a weight, and for no others."""
        parameter, rows = self.held
        return id(parameter), rows.start or 0

    def filters(self) -> Tensor:
        """The weight as filters, (C_out, ...)."""
        return self.weight

    def set_filters(self, filters: Tensor) -> Tensor:
        """The inverse of :meth:`filters`: (C_out, ...) in the layout of the weight."""
        return filters

    def stored(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        """The weight in a state dict in which this layer is called `name`."""
        return state[f'{name}.weight']

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        raise NotImplementedError

    @property
    def geometry(self) -> tuple[Any, Any, Any, int] | None:
        """Stride, padding, dilation and groups, if the fused kernel computes such a layer; else None."""
        return None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Quantize the input and the weight, and compute; see the class of the layer for shapes."""
        quant = self._called()
        out = fused(self, input, quant)  # the same by one operator, where there is one
        return self.compute(*self._operands(input, quant), *args, **kwargs) if out is None else out

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Quantized input, quantized weight, and the bias to compute with."""
        return self._operands(x, self._called())

    def _called(self) -> ActivationQuantizer | None:
        """Note the call; the quantizer of its input."""
        self.seen = True
        quant = self.next_quant
        if self.pyramid_levels > 1:
            self._count_level()
        return quant

    def _operands(self, x: Tensor, quant: ActivationQuantizer | None) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = self.weight if self.weight_quant is None else self.set_filters(self.weight_quant(self.filters()))
        return (x if quant is None else quant(x)), weight, bias_in_use(self, quant)

    def _count_level(self) -> None:
        if in_backward():
            name = self.weight_quant.name if self.weight_quant else '?'
            raise UserError(
                f'layer {name} has thresholds for each pyramid level and is computed again in the backward pass; '
                'activation.per_level does not go with activation checkpointing (with_cp)'
            )
        self.pyramid_level += 1


def _settle(layer: Any, *_: Any) -> None:
    """A hook of state_dict(), whose tensors share their memory with the buffers: T of the weights as they are now."""
    if layer.weight_quant is not None:
        layer.weight_quant.settle(layer.filters())
        layer.weight_quant.set_state()


def _init(self: Any, torch_class: type, args: Any, quantization: Mapping[str, Any] | None, kwargs: Any) -> None:
    torch_class.__init__(self, *args, **kwargs)  # type: ignore[misc]
    cfg = Quantization.from_dict(quantization or {})
    self._attach(*cfg.for_layer(torch_class.__name__))


class QuantConv2d(QuantLayer, nn.Conv2d):
    """nn.Conv2d with quantized weight and input, (N, C_in, H, W) to (N, C_out, H', W').

    Any stride, dilation, groups (depthwise too), padding and bias.

    In a hand-written model: `conv_cfg=dict(type='GDRQConv2d', quantization=dict(weight=dict(bits=4)))`; the dict is
    explained in core/config.py. Outside QuantRunner thresholds start from the first training batch and follow only with
    `custom_hooks=[dict(type='ThresholdHook')]`; evaluating an uncalibrated layer is an error.
    """

    def __init__(self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        _init(self, nn.Conv2d, args, quantization, kwargs)

    @property
    def geometry(self) -> tuple[Any, Any, Any, int] | None:
        simple = self.padding_mode == 'zeros' and not isinstance(self.padding, str)
        return (self.stride, self.padding, self.dilation, self.groups) if simple else None

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        return self._conv_forward(x, weight, bias)


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with quantized weight and input, (N, C_in, H, W) to (N, C_out, H', W').

    Its weight is (C_in, C_out / groups, kH, kW).
    """

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

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        conv: Any = self  # torch annotates these attributes more narrowly than its own calls take them
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        extra = conv._output_padding(x, output_size, stride, padding, conv.kernel_size, 2, dilation)
        return nn.functional.conv_transpose2d(x, weight, bias, stride, padding, extra, self.groups, dilation)


class QuantLinear(QuantLayer, nn.Linear):
    """nn.Linear with quantized weight and input, (..., in_features) to (..., out_features)."""

    def __init__(self, *args: Any, quantization: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        _init(self, nn.Linear, args, quantization, kwargs)

    @property
    def geometry(self) -> tuple[Any, Any, Any, int] | None:
        return (), (), (), 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        return nn.functional.linear(x, weight, bias)


QUANTIZED: dict[type, type] = {nn.Conv2d: QuantConv2d, nn.ConvTranspose2d: QuantConvTranspose2d, nn.Linear: QuantLinear}
"""The exact float classes that are quantized; gdrq_mm/openmmlab adds those of mmcv."""
