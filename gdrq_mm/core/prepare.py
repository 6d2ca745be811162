"""Quantize the weights of a whole model in a few operations when a forward of the model begins.

A layer that is called on its own, or whose method has levels or a gradient of its own, quantizes its weight itself.
Nothing is kept from one forward to the next, in evaluation neither: nothing tells that somebody wrote to a weight's
`.data`, as averages of weights do, and quantizing all weights takes 2 % of a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from . import functional as F
from . import kernels
from .compat import is_compiling
from .layers import QuantLayer
from .modules import every_module
from .quantizers import WeightQuantizer


def prepare_weights(model: nn.Module) -> None:
    """Quantize the weights of a model's layers before each forward of the model, from now on."""
    if not hasattr(model, 'in_forward'):
        model.in_forward = False  # type: ignore[assignment]
        model.register_forward_pre_hook(_prepare)
        model.register_forward_hook(_end, always_call=True)


def _prepare(model: nn.Module, args: Any) -> None:
    if is_compiling():  # layers quantize their weights where they are traced
        return
    layers = [module for module in every_module(model) if isinstance(module, QuantLayer)]
    _forget(layers)
    quantize_weights(layers)
    model.in_forward = True  # type: ignore[assignment]


def _end(model: nn.Module, args: Any, out: Any) -> None:
    if is_compiling():
        return
    model.in_forward = False  # type: ignore[assignment]
    if not torch.is_grad_enabled():  # else a backward pass may run parts of the forward again
        _forget(every_module(model))


def _forget(modules: Iterable[nn.Module]) -> None:
    for layer in modules:
        if isinstance(layer, QuantLayer) and layer.weight_quant is not None:
            layer.weight_quant.prepared = None


@torch.no_grad()
def quantize_weights(layers: Sequence[QuantLayer]) -> None:
    """Quantize the weights of those layers that a kernel can quantize; nothing where there is no kernel."""
    layers = [each for each in layers if each.weight_quant is not None and each.weight_quant.is_uniform()]
    filters = [layer.filters() for layer in layers]
    operators = kernels.kernels_of(*filters) if layers else None
    if operators is None or not all(_has_rows(each) for each in filters):
        return
    quantizers: list[Any] = [layer.weight_quant for layer in layers]
    steps = _steps(quantizers, filters, operators)
    how = [quantizer.uniform(step) for quantizer, step in zip(quantizers, steps)]
    for quantizer, codes in zip(quantizers, kernels.codes_of(filters, how, operators)):
        quantizer.prepared = codes


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
