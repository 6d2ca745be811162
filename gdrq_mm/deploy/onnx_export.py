"""A merged model as ONNX: standard operators only, in the form that runtimes run as fused integer kernels.

    activations   QuantizeLinear (uint8) -> Clip on the codes -> DequantizeLinear
    weights       INT4 initializer -> Cast, Mul -> int8 -> DequantizeLinear, a scale a channel
    bias          float of a convolution; INT32 -> DequantizeLinear of a linear layer, else it runs in float

The integer kernels of ONNX Runtime add the bias to the sum, so they round it to a multiple of one unit of the sum,
scale of the input times that of the weight. A model trained with `deployable=True` has such biases from the start, see
core/integer_bias.py. Weights of few bits are spread over int8, times the largest factor that fits, which makes the unit
so much smaller.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import onnx
import torch
import torch.nn as nn
from onnxscript import opset21
from torch import Tensor

from ..core.attention import LINEAR
from ..core.compat import check_export
from ..core.errors import UserError
from ..core.integer_bias import LARGEST_BIAS
from ..core.modules import replace_modules
from .flat import Flat
from .merge import IntegerLayer, IntegerPyramid, OutputQuantizer, given, move_output
from .names import codes_of
from .onnx_graph import finish

OPSET = 21
"""The first with 4-bit initializers in QuantizeLinear and DequantizeLinear."""


def size_axes(x: Tensor) -> tuple[int, ...]:
    """The dimensions of an input that the size of a picture sets: of (N, C, H, W), and of sequences (N, L, ...)."""
    return (2, 3) if x.dim() == 4 else (1,)


def export_onnx(
    module: nn.Module, x: Tensor | Sequence[Tensor], outputs: Sequence[str], any_size: bool = False
) -> onnx.ModelProto:
    """Trace a module with merged layers into a checked ONNX model with a dynamic batch.

    Args:
        module: a model, or a part of one as a Flat; it is not changed.
        x: an example, or one for each input: x in the graph, or x0, x1, ...; the first dimension is the batch, of at
            least 2.
        outputs: names of the outputs.
        any_size: leave their :func:`size_axes` open too. A module that computes something from its
            example's size may keep that, as adaptive pooling does: verify the graph at another size.

    Raises:
        UserError: a layer has no form in standard integers; names it. Or torch is older than 2.8.
    """
    check_export()
    twin = _twin(module if isinstance(module, Flat) else Flat(module))
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    axes = tuple(
        dict.fromkeys((0, *(size_axes(each) if any_size else ())), torch.export.Dim.DYNAMIC) for each in inputs
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            twin,
            inputs,
            input_names=['x'] if len(inputs) == 1 else [f'x{i}' for i in range(len(inputs))],
            output_names=list(outputs),
            opset_version=OPSET,
            dynamic_shapes=(axes,),
            custom_translation_table=TRANSLATIONS,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    layers = {name: layer for name, layer in twin.model.named_modules() if isinstance(layer, OnnxLayer)}
    factors = {codes_of(name): layer.factor for name, layer in layers.items() if layer.in_4_bits}
    shared = {
        codes_of(f'{name}.{level}'): codes_of(f'{name}.0')
        for name, module in twin.model.named_modules()
        if isinstance(module, IntegerPyramid)
        for level in range(1, module.pyramid_levels)
    }
    model = finish(program.model, outputs, factors, shared)
    onnx.checker.check_model(model, full_check=True)
    return model


def _shape_alone(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


# One operator of torch for each quantizer and each weight, as the time of a trace grows with their number. They are
# traced, never computed.
_LIBRARY = torch.library.Library('gdrq_mm', 'FRAGMENT')
_LIBRARY.define('quantize(Tensor x, Tensor scale, int zero_point, int low, int high) -> Tensor')
_LIBRARY.define('dequantize(Tensor codes, Tensor scale, Tensor? zeros=None) -> Tensor')
for _name in ('quantize', 'dequantize'):
    _LIBRARY.impl(_name, _shape_alone, 'CompositeExplicitAutograd')


def _onnx_quantize(x: Any, scale: Any, zero_point: int, low: int, high: int) -> Any:
    zero = _code(zero_point)
    codes = opset21.QuantizeLinear(x, scale, zero)
    if (low, high) != (0, 255):
        codes = opset21.Clip(codes, _code(low), _code(high))
    return opset21.DequantizeLinear(codes, scale, zero)


def _code(value: int) -> Any:
    return opset21.Constant(value=onnx.helper.make_tensor('code', onnx.TensorProto.UINT8, [], [value]))


def _onnx_dequantize(codes: Any, scale: Any, zeros: Any = None) -> Any:
    return opset21.DequantizeLinear(codes, scale, zeros, axis=0)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.gdrq_mm.quantize.default: _onnx_quantize,
    torch.ops.gdrq_mm.dequantize.default: _onnx_dequantize,
}


class QuantizeDequantize(nn.Module):
    """An activation quantizer as QuantizeLinear, Clip and DequantizeLinear on uint8.

    Codes c in [lo, hi] become c + zero point: 2^(n-1) for a signed range, -lo for the others.
    """

    scale: Tensor

    def __init__(self, step: Tensor, lo: int, hi: int) -> None:
        super().__init__()
        zero_point = zero_point_of_codes(lo, hi)
        dead = not step > 0  # all values become 0
        low, high = (zero_point, zero_point) if dead else (lo + zero_point, hi + zero_point)
        self.codes = (zero_point, low, high)
        self.register_buffer('scale', torch.ones(()) if dead else step.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape, on the grid."""
        return torch.ops.gdrq_mm.quantize(x, self.scale, *self.codes)


def zero_point_of_codes(lo: int, hi: int) -> int:
    """What is added to codes in [lo, hi] to make them unsigned: 2^(n-1) for signed ones, else -lo."""
    return (hi + 1 if -lo == hi else -lo) if lo < 0 else 0


class OnnxLayer(nn.Module):
    """An IntegerLayer in the form above."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor
    unit: Tensor
    bias_zeros: Tensor

    def __init__(self, layer: IntegerLayer, name: str) -> None:
        super().__init__()
        self.quantize = QuantizeDequantize(layer.step, layer.lo, layer.hi)
        self.bare = (layer.bare,)  # a tuple, so that it is no child
        codes, self.factor, scale, bias = _spread(layer, name)
        few = codes // self.factor
        self.in_4_bits = layer.weight_bits <= 4 and few.numel() > 0 and -8 <= int(few.min()) <= int(few.max()) <= 7
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale.float())
        self.register_buffer('zeros', torch.zeros(len(scale), dtype=torch.int8))
        # No integer kernel has a transposed convolution, and its channels are not one axis of the weight.
        self.transposed = isinstance(layer.bare, nn.ConvTranspose2d)
        self.linear = isinstance(layer.bare, LINEAR)
        if self.linear:
            unit = self.quantize.scale.double() * self.scale.double()
            bias = (bias / unit).round().to(torch.int32)
            self.register_buffer('unit', unit.float())
            self.register_buffer('bias_zeros', torch.zeros(len(scale), dtype=torch.int32))
        self.register_buffer('bias', bias if self.linear else bias.float())

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Any input of the layer to the output of its batch normalization."""
        options = given(input, *args, **kwargs)
        x, (bare,) = self.quantize(options.pop('input')), self.bare
        if self.transposed:
            one, zero = self.scale.new_ones(()), self.zeros.new_zeros(())
            weight = torch.ops.gdrq_mm.dequantize(self.codes, one, zero)
            out = bare.compute(x, weight, None, **options)
            return out * self.scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        # A zero point of one element would become that of other layers too, which onnxruntime 1.32 cannot make unsigned
        zeros = () if len(self.zeros) == 1 else (self.zeros,)
        weight = torch.ops.gdrq_mm.dequantize(self.codes, self.scale, *zeros)
        bias = torch.ops.gdrq_mm.dequantize(self.bias, self.unit, self.bias_zeros) if self.linear else self.bias
        return bare.compute(x, weight, bias)


def _spread(layer: IntegerLayer, name: str) -> tuple[Tensor, int, Tensor, Tensor]:
    """Codes of the weight spread over int8, by which factor, scale of each channel, bias, the last two as float64."""
    step = layer.step.double() if layer.step > 0 else torch.ones((), dtype=torch.float64)
    scale = layer.multiplier.double() / step
    if isinstance(layer.bare, nn.ConvTranspose2d):
        return layer.codes, 1, scale, layer.bias.double()
    shape = [-1] + [1] * (layer.codes.dim() - 1)
    codes = layer.codes.to(torch.int32) * torch.where(scale < 0, -1, 1).view(shape)
    factor = layer.spread
    if codes.numel() and int(codes.max()) > (127 // factor):
        lowest = -int(codes.max())
        raise UserError(f'layer {name} cannot be exported: a negative gamma turns the code {lowest} into {-lowest}')
    scale, bias = scale.abs() / factor, layer.bias.double()
    # A channel whose gamma is next to nothing, as a residual branch has it that began with zeros: int32 does not hold
    # its bias in units of its sum. Coarser codes have larger units; beside such a bias their rounding does not count.
    coarser = torch.where(scale > 0, bias.abs() / (LARGEST_BIAS * step * scale), 1).clamp(min=1)
    codes = torch.where((scale == 0).view(shape), 0, (codes / coarser.view(shape)).round()).to(torch.int32) * factor
    scale = torch.where(scale > 0, scale * coarser, bias.abs().clamp(min=1e-30) / (2**20 * step))
    return codes.to(torch.int8), factor, scale, bias


def _twin(module: Flat) -> Flat:
    """A copy in evaluation mode whose merged layers and quantizers are in the form of the export."""
    twin = copy.deepcopy(module).eval()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, old in twin.model.named_modules():
        if isinstance(old, IntegerLayer):
            replaced[old] = OnnxLayer(old, name)
        elif isinstance(old, OutputQuantizer):
            replaced[old] = QuantizeDequantize(old.step, old.lo, old.hi)
    replace_modules(twin, replaced)  # in the old layers too, whose output quantizers move
    for old, new in replaced.items():
        move_output(old, new)
    return twin
