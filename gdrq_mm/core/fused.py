"""A quantized layer as one operator in training, where there is a kernel for it: what layers.py says, at more speed.

The operator quantizes its input, computes, and saves one byte a value for its backward pass. It takes the weight as
codes: those of prepare.py in a forward of the model, else the layer makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import functional as F
from . import kernels
from .compat import autocast_to_half

if TYPE_CHECKING:
    from .layers import QuantLayer
    from .quantizers import ActivationQuantizer, WeightQuantizer


def fused(layer: QuantLayer, x: Tensor, quant: ActivationQuantizer | None) -> Tensor | None:
    """The output of a layer by one operator, in training; None where there is none for it, its methods or its device.

    A segment that is computed again in a backward pass, of a checkpoint, finds the same operator as before.

    Args:
        quant: the quantizer of this input.
    """
    geometry, weight_quant = layer.geometry, layer.weight_quant
    if geometry is None or quant is None or weight_quant is None or not weight_quant.is_uniform():
        return None
    if not (layer.trains and torch.is_grad_enabled() and quant.rounds() and x.numel()):
        return None
    if geometry[0] and x.dim() != layer.weight.dim():  # an image without a batch
        return None
    if any(each._forward_hooks or each._forward_pre_hooks for each in (quant, weight_quant)):
        return None  # somebody looks at what goes through them
    operators = kernels.kernels_of(x, layer.weight)
    how = quant.uniform() if operators is not None and not autocast_to_half() else None
    if how is None:
        return None
    codes = weight_quant.codes_in_use(layer.filters())
    if codes is None:
        found = codes_of([layer])
        if found is None:
            return None
        codes = found[0]
    return kernels.layer(x, how, layer.weight, codes, layer.bias, geometry, operators)


@torch.no_grad()
def codes_of(layers: Sequence[QuantLayer]) -> list[kernels.Codes] | None:
    """The weights of layers whose rounding is uniform, in a few operations; None where there is no kernel for them."""
    filters = [layer.filters() for layer in layers]
    operators = kernels.kernels_of(*filters) if layers else None
    if operators is None or not all(_has_rows(each) for each in filters):
        return None
    quantizers: list[Any] = [layer.weight_quant for layer in layers]
    steps = _steps(quantizers, filters, operators)
    how = [quantizer.uniform(step) for quantizer, step in zip(quantizers, steps)]
    return kernels.codes_of(filters, how, operators)


def _has_rows(filters: Tensor) -> bool:
    """Whether each filter is a row of float32 in memory."""
    return filters.dtype == torch.float32 and filters.stride(0) * len(filters) == filters.numel() > 0


def _steps(quantizers: Sequence[WeightQuantizer], filters: Sequence[Tensor], operators: Any) -> list[Tensor]:
    """The step of each filter, (C,), for each layer; those of Scale-Clip for all layers together."""
    factors = [quantizer.factor_of_mean() for quantizer in quantizers]
    chosen = [i for i, factor in enumerate(factors) if factor is not None]
    steps = [q.step(w).flatten() if k is None else None for q, w, k in zip(quantizers, filters, factors)]
    if chosen:
        sizes = torch.cat([quantizers[i].sizes for i in chosen])
        rows: list[Any] = []
        for i in chosen:
            row = filters[i].stride(0), factors[i], max(-quantizers[i].lo, quantizers[i].hi)
            rows += [row] * quantizers[i].groups
        inner, k, top = torch.tensor(rows, dtype=torch.float64).unbind(1)
        total = F.per_group(operators.sums_of_filters([filters[i] for i in chosen]), sizes)
        threshold = F.scaled_mean((total / (sizes * inner)).float(), k.float())
        spread = torch.repeat_interleave(threshold / top.float(), sizes)
        for i, each in zip(chosen, spread.split([len(filters[i]) for i in chosen])):
            steps[i] = each
    return steps  # type: ignore[return-value]
