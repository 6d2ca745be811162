"""Compare a merged model with the trained one, layer by layer, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core.deployable import folded_norms
from ..core.modules import activation_quantizers, hooked, quant_layers
from ..core.quantizers import ActivationQuantizer
from ..core.topology import Plan
from .merge import IntegerLayer, IntegerPyramid, given

TIE = 1e-3
"""How near to a rounding tie, in steps, a value is whose code may be one off (ours): float32 sums differ in order."""
TIES = 1e-4
"""Share of all codes that may be one off at ties, see `too_many`."""


def too_many(differing: int, codes: int) -> bool:
    """Whether more codes differ than rounding ties explain: more than TIES of them, and more than one."""
    return differing > 1 + TIES * codes


@dataclass
class Comparison:
    """One layer: the merged one on the inputs that the trained one saw."""

    name: str
    outputs: int
    accumulator_errors: int
    """Sums that are not exactly those of the trained layer's codes."""
    largest: float
    """Largest difference of the output, relative to the largest output, or to one unit of the sum if that is more."""
    codes: int = 0
    """Codes that quantizers make of this output, itself or after a ReLU."""
    ties: int = 0
    """Of them those that differ by one at a rounding tie."""
    wrong: int = 0
    """Of them those that differ otherwise."""


def compare(model: nn.Module, merged: nn.Module, plan: Plan, predict: Callable[[nn.Module], Any]) -> list[Comparison]:
    """Give each merged layer the trained layer's input; compare sums, outputs, and the codes that readers make of them.

    Args:
        model: the trained model, in evaluation mode.
        merged: what merge_model() made of it.
        predict: runs one batch through a model.

    Returns:
        A Comparison for each call of a layer, in the order of the prediction.
    """
    norms, layers = folded_norms(model, plan), quant_layers(model)
    modules, ours = dict(model.named_modules()), dict(merged.named_modules())
    inputs: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {}
    calls: list[tuple[str, Any, Any, dict[str, Any], Tensor]] = []
    read: list[tuple[ActivationQuantizer, Tensor]] = []
    handles = []
    for name, layer in layers.items():
        if isinstance(ours.get(name), (IntegerLayer, IntegerPyramid)):

            def remember(layer: Any, args: Any, kwargs: Any, name: str = name) -> None:
                options = given(*args, **kwargs)
                options['input'] = options['input'].clone()
                inputs[name] = name + layer.next_level, layer, layer.next_quant, options

            def finish(module: Any, args: Any, out: Tensor, name: str = name) -> None:
                if name in inputs:  # a shared norm sees the outputs of all its layers
                    calls.append((*inputs.pop(name), out.clone()))

            handles.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
            end = modules[norms[name]] if name in norms else layer
            handles.append(end.register_forward_hook(finish, prepend=True))
    for quantizer in activation_quantizers(model).values():
        handles.append(quantizer.register_forward_pre_hook(lambda q, args: read.append((q, args[0].clone()))))
    with hooked(handles), torch.no_grad():
        predict(model)
    with torch.no_grad():
        return [_compare_layer(ours[call[0]], *call, read) for call in calls]


def first_difference(results: list[Comparison]) -> str:
    """How the merged model differs from the trained one by more than rounding ties; '' if it does not."""
    for each in results:
        if each.accumulator_errors or each.wrong or not each.largest <= 1e-4:
            return f'the merged model differs from the trained one, first in layer {each.name}'
    ties, codes = sum(each.ties for each in results), sum(each.codes for each in results)
    return f'{ties} of {codes} codes differ, more than rounding ties explain' if too_many(ties, codes) else ''


def _compare_layer(
    merged: Any,
    name: str,
    layer: Any,
    quant: ActivationQuantizer,
    options: dict[str, Any],
    out: Tensor,
    read: list[tuple[ActivationQuantizer, Tensor]],
) -> Comparison:
    x = options.pop('input')
    exact = merged.accumulate(merged.input_codes(x), **options)
    step = quant.step()
    codes = (quant(x) / torch.where(step > 0, step, 1)).round()
    weight = layer.set_filters(layer.weight_quant.codes(layer.filters()))
    trained = layer.compute(codes.double(), weight.double(), None, **options)
    ours = merged.scale(exact)
    # Where the sums are all 0, what is left of the output is the rounding of its bias.
    top = max(float(out.abs().amax()) if out.numel() else 0.0, float(merged.multiplier.abs().amax()))
    difference = float((ours - out).abs().amax()) if out.numel() else 0.0
    result = Comparison(name, out.numel(), int((exact != trained).sum()), difference / max(top, 1e-12))
    for quantizer, seen in read:
        if seen.shape == out.shape:
            for function in (lambda v: v, torch.relu):
                if torch.equal(seen, function(out)):
                    _compare_codes(result, quantizer, function(ours), seen)
                    break
    return result


def _compare_codes(result: Comparison, quantizer: ActivationQuantizer, ours: Tensor, theirs: Tensor) -> None:
    step = quantizer.step()
    if not step > 0:
        return
    one, other = ours / step, theirs / step
    lo, hi = quantizer.lo, quantizer.hi
    difference = (one.round().clamp(lo, hi) - other.round().clamp(lo, hi)).abs()
    tie = ((other - other.floor()) - 0.5).abs() < TIE
    result.codes += difference.numel()
    result.ties += int(((difference == 1) & tie).sum())
    result.wrong += int(((difference > 1) | ((difference == 1) & ~tie)).sum())
