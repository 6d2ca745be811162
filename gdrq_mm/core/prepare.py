"""Quantize the weights of a whole model in a few operations when a forward of the model begins.

A layer that is called on its own, or whose method has levels or a gradient of its own, quantizes its weight itself; so
does one with a hook before its forward: there pruning, weight_norm and spectral_norm make the weight.
A layer whose weight the forward has changed meanwhile quantizes it anew, but for a change in place of its `.data`, of
which nothing tells. That is also why nothing is kept from one forward to the next, in evaluation neither: averages of
weights write so, and quantizing all weights takes 2 % of a forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from .compat import is_compiling
from .fused import codes_of
from .layers import QuantLayer, remove_hooks
from .modules import every_module
from .quantizers.weight import version_of


def prepare_weights(model: nn.Module) -> None:
    """Quantize the weights of a model's layers before each forward of the model, from now on."""
    if not hasattr(model, 'in_forward'):
        model.in_forward = False  # type: ignore[assignment]
        model.register_forward_pre_hook(_prepare)
        model.register_forward_hook(_end, always_call=True)


def leave_weights(model: Any) -> None:
    """The inverse of :func:`prepare_weights`."""
    if 'in_forward' in vars(model):
        del model.in_forward
        remove_hooks(model, _prepare, _end)


def _prepare(model: nn.Module, args: Any) -> None:
    if is_compiling():  # layers quantize their weights where they are traced
        return
    layers = [module for module in every_module(model) if isinstance(module, QuantLayer)]
    _forget(layers)
    layers = [layer for layer in layers if layer.weight_quant is not None and not _has_hook(layer)]
    layers = [layer for layer in layers if layer.weight_quant.is_uniform()]  # type: ignore[union-attr]
    for layer, codes in zip(layers, codes_of(layers) or ()):
        layer.weight_quant.prepared = version_of(layer.filters()), codes  # type: ignore[union-attr]
    model.in_forward = True  # type: ignore[assignment]


def _has_hook(layer: Any) -> bool:
    """Whether a hook runs before its forward, or before that of the attention whose weight it reads."""
    return any(module._forward_pre_hooks for module in (layer, *getattr(layer, 'attention', ())))


def _end(model: nn.Module, args: Any, out: Any) -> None:
    if is_compiling():
        return
    model.in_forward = False  # type: ignore[assignment]
    _forget(every_module(model))


def _forget(modules: Iterable[nn.Module]) -> None:
    for layer in modules:
        if isinstance(layer, QuantLayer) and layer.weight_quant is not None:
            layer.weight_quant.prepared = None
