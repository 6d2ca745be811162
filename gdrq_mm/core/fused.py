"""A quantized layer as one operator in training, where there is a kernel for it: what layers.py says, at more speed.

The operator quantizes its input, computes, and saves one byte a value for its backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernels

if TYPE_CHECKING:
    from .layers import QuantLayer
    from .quantizers import ActivationQuantizer


def fused(layer: QuantLayer, x: Tensor, quant: ActivationQuantizer | None) -> Tensor | None:
    """The output of a layer by one operator, in training; None where there is none for it, its methods or its device.

    Args:
        quant: the quantizer of this input.
    """
    geometry, weight_quant = layer.geometry, layer.weight_quant
    if geometry is None or quant is None or weight_quant is None:
        return None
    codes = weight_quant.codes_in_use()
    if codes is None or not (layer.trains and torch.is_grad_enabled() and quant.rounds() and x.numel()):
        return None
    if any(each._forward_hooks or each._forward_pre_hooks for each in (quant, weight_quant)):
        return None  # somebody looks at what goes through them
    operators = kernels.kernels_of(x, layer.weight)
    how = quant.uniform() if operators is not None else None
    if how is None:
        return None
    return kernels.layer(x, how, layer.weight, codes, layer.bias, geometry, operators)
