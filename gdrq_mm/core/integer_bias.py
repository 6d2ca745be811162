"""The bias that an integer kernel adds: a whole multiple of one unit of the sum (docs/method.md, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .quantizers import ActivationQuantizer, Stage, WeightQuantizer

LARGEST_BIAS = 2**30
"""The largest bias in units of the sum: int32 holds it and leaves room for the sum itself."""


def spread(quantizer: WeightQuantizer) -> int:
    """The factor of a weight's codes in the integer graph, the largest that int8 holds: 18 for 4 bits (ours).

    An integer kernel adds its bias to the sum of products, so the bias is a multiple of one unit of that sum. With the
    factor the unit is smaller, and so is the rounding error of the bias.
    """
    return max(1, 127 // max(-quantizer.lo, quantizer.hi))


def integer_bias(multiplier: Tensor, bias: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """The bias B rounded to a multiple of the unit u = |M| / spread: round(B / u) * u, (C,) float64.

    A channel keeps its B where u is 0 (gamma is 0) or so small that int32 cannot hold B / u.
    """
    unit = multiplier.abs() / spread(quantizer)
    codes = (bias / torch.where(unit > 0, unit, 1)).round()
    return torch.where((unit > 0) & (codes.abs() <= LARGEST_BIAS), codes * unit, bias)


def multiplier_and_bias(
    layer: Any, norm: _BatchNorm | None, quant: ActivationQuantizer
) -> tuple[Tensor, Tensor, Tensor]:
    """gain, M and B of each channel, (C_out,) float64: the output is gain * (d s acc + b) + shift = M acc + B.

    acc is the integer sum, d the step of the weight, s the step of the input, b the layer's bias; gain and shift are
    those of the batch normalization.

    Args:
        layer: a quantized layer.
        norm: the batch normalization behind it, if there is one.
        quant: the quantizer of its input.
    """
    filters = layer.filters()
    gain, shift = _normalization(norm, len(filters), filters.device)
    step = layer.weight_quant.step(filters).detach().double().flatten()
    own = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach().double()
    return gain, gain * step * quant.step().detach().double(), gain * own + shift


def bias_in_use(layer: Any, quant: ActivationQuantizer | None) -> Tensor | None:
    """The bias that a layer computes with: its own, or in evaluation of a deployable layer that of the integer graph.

    Args:
        quant: the quantizer of this call's input.
    """
    bias, norm = layer.bias, layer.norm
    if layer.trains or not layer.deployable or layer.weight_quant is None or quant is None:
        return bias
    for quantizer in (layer.weight_quant, quant):
        if quantizer.uneven or quantizer.stage not in (Stage.QUANTIZE, Stage.FREEZE):
            return bias
    if norm is None and bias is None:
        return None  # nothing to round
    if norm is not None and norm.training:
        return bias  # BN will use the statistics of this batch, which are not known yet
    with torch.no_grad():
        gain, multiplier, before = multiplier_and_bias(layer, norm, quant)
        moved = integer_bias(multiplier, before, layer.weight_quant) - before
        moved = torch.where(gain == 0, 0, moved / torch.where(gain == 0, 1, gain)).to(layer.weight.dtype)
    return moved if bias is None else bias + moved


def _normalization(norm: _BatchNorm | None, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """gain and shift of each channel, (C,) float64: batch normalization computes gain * x + shift."""
    one = torch.ones(channels, dtype=torch.float64, device=device)
    if norm is None:
        return one, torch.zeros_like(one)
    assert norm.running_mean is not None and norm.running_var is not None
    gain = one if norm.weight is None else norm.weight.detach().double()
    gain = gain / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(one) if norm.bias is None else norm.bias.detach().double()
    return gain, shift - gain * norm.running_mean.double()
