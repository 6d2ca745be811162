"""Check an exported graph in a runtime against the trained model, one quantized tensor after the other.

The graph is cut at every quantized tensor. Each piece gets the codes of the trained model and must give its next codes,
so an error cannot hide behind an earlier one, and the first piece that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from ..core.modules import activation_quantizers, hooked, quant_layers
from .merge import given
from .names import Site
from .onnx_export import zero_point_of_codes
from .onnx_graph import cut, makers, quantizations
from .verify import TIE


@dataclass
class Piece:
    """What a runtime makes of one piece of the graph."""

    name: str
    """Layer whose input, or module whose output, is quantized at the end of the piece; or an output of the graph."""
    step: float
    """The step; 0 for an output of the graph."""
    values: int
    differing: int
    """Codes that are not those of the trained model; outputs that differ beyond float32 and the rounded bias."""
    undecided: int
    """Of them those whose value is a rounding tie as far as float32 tells, so that either code is right."""
    wrong: int
    """Of them those further from a rounding tie than float32 and the rounded bias explain."""
    largest: float
    """Largest distance from the trained model's value before rounding, in steps: 0.5 is exact rounding. Of an output:
    largest difference relative to the largest value."""


@dataclass
class Trained:
    """What one quantizer saw in the trained model."""

    value: np.ndarray
    """The input in steps."""
    lo: int
    hi: int

    def codes(self) -> np.ndarray:
        """Unsigned, as the graph has them."""
        codes = np.clip(np.round(self.value), self.lo, self.hi) + zero_point_of_codes(self.lo, self.hi)
        return codes.astype(np.uint8)


def aliases(model: Any) -> dict[str, list[str]]:
    """The first name of each module -> all its names: heads register a layer that they share under several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {each[0]: each for each in names.values()}


def record_codes(model: Any, predict: Callable[[], Any]) -> tuple[dict[Site, Trained], Any]:
    """Run `predict` and keep what each quantizer of `model` sees, under every name that a graph may have for it.

    Returns that, and what `predict` returned.
    """
    seen: dict[Site, Trained] = {}
    names = aliases(model)
    calls: dict[str, int] = {}

    def keep(name: str, quantizer: Any, x: Tensor, suffix: str = '') -> None:
        step = quantizer.step()
        value = x.detach().float() / step if step > 0 else torch.zeros_like(x)  # float32, as the quantizer divides
        call = calls[name + suffix] = calls.get(name + suffix, -1) + 1
        for other in names[name]:
            seen[Site(other + suffix, call)] = Trained(value.numpy(), quantizer.lo, quantizer.hi)

    handles = []
    for name, layer in quant_layers(model).items():

        def keep_input(layer: Any, args: Any, kwargs: Any, name: str = name) -> None:
            keep(name, layer.next_quant, given(*args, **kwargs)['input'], layer.next_level)

        if not layer.stays_float:
            handles.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
    for name, quantizer in activation_quantizers(model).items():
        if '.own_input_quant' not in name:
            handles.append(quantizer.register_forward_pre_hook(lambda m, args, name=name: keep(name, m, args[0])))
    with hooked(handles), torch.no_grad():
        return seen, predict()


def verify_onnx(
    graph: onnx.ModelProto,
    seen: dict[Site, Trained],
    inputs: list[np.ndarray],
    outputs: list[np.ndarray],
    open_piece: Callable[[bytes], Callable[[list[np.ndarray]], list[np.ndarray]]],
) -> list[Piece]:
    """Run each piece of a graph on the trained model's codes.

    The whole graph runs at the end, for information: where a value at a rounding tie fell on the other side, its
    outputs are those of slightly other codes.

    Args:
        graph: of export_onnx().
        seen: of record_codes() on the same inputs.
        inputs, outputs: those of the trained part.
        open_piece: a runtime for the bytes of a model.
    """
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    sites: dict[str, Site] = {}
    steps: dict[str, float] = {}
    for site, dequantize in quantizations(ir.from_proto(graph).graph):
        code, scale = dequantize.inputs[:2]
        assert code is not None and code.name is not None and scale is not None and scale.name is not None
        sites[code.name] = site
        steps[code.name] = float(values[scale.name])
    known = {code: seen[site].codes() for code, site in sites.items()}
    known.update({value.name: x for value, x in zip(graph.graph.input, inputs, strict=True)})
    ends = [*sites, *(value.name for value in graph.graph.output)]
    expected = dict(zip((value.name for value in graph.graph.output), outputs, strict=True))
    pieces = []
    types = {name: _type_of(x) for name, x in {**known, **expected}.items()}
    for end in ends:
        start = {name: x for name, x in known.items() if name != end}
        part = cut(graph, {name: types[name] for name in start}, {end: types[end]})
        if not part.graph.node:
            continue
        run = open_piece(part.SerializeToString())
        (found,) = run([start[value.name] for value in part.graph.input])
        bias = _bias_error(part, values)
        if end in sites:
            pieces.append(_compare_codes(sites[end], seen[sites[end]], found, bias, steps[end]))
        else:
            pieces.append(_compare_output(end, expected[end], found, bias))
    for name, found in zip(expected, open_piece(graph.SerializeToString())(inputs), strict=True):
        whole = _compare_output(f'whole graph: {name}', expected[name], found, 0.0)
        pieces.append(replace(whole, differing=whole.wrong, wrong=0))  # a tie may grow on its way through few bits
    return pieces


def _type_of(x: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """Element type and shape of codes, of float values, or of the whole numbers that a model takes or gives."""
    return helper.np_dtype_to_tensor_dtype(x.dtype), x.shape


def _bias_error(part: onnx.ModelProto, values: dict[str, np.ndarray]) -> float:
    """How far rounding biases to integers can move a value: half a unit of the sum of each layer in the piece."""
    making, error = makers(part.graph), 0.0
    for node in part.graph.node:
        sources = [making.get(name) for name in node.input[:2]]
        if node.op_type in ('Conv', 'Gemm') and all(s is not None and s.op_type == 'DequantizeLinear' for s in sources):
            error += float(np.prod([values[s.input[1]].max() for s in sources])) / 2  # type: ignore[union-attr]
    return error


def _compare_codes(site: Site, trained: Trained, found: np.ndarray, bias: float, step: float) -> Piece:
    name = site.quantizer + (f' (call {site.call + 1})' if site.call else '')
    if found.shape != trained.value.shape:
        return _misshapen(name, step, found)
    codes = found.astype(np.float64) - zero_point_of_codes(trained.lo, trained.hi)
    distance = np.abs(codes - np.clip(trained.value, trained.lo, trained.hi))
    differing = found != trained.codes()
    largest = float(distance.max()) if distance.size else 0.0
    undecided = int((differing & (np.abs(distance - 0.5) < rounding(trained.lo, trained.hi))).sum())
    wrong = int((~(distance <= 0.5 + TIE + bias / step)).sum())  # NaN is wrong
    return Piece(name, step, found.size, int(differing.sum()), undecided, wrong, largest)


def rounding(lo: int, hi: int) -> float:
    """How far float32 may move a value that becomes a code in [lo, hi], in steps: a few last places of the largest.

    Runtimes put such a value on either side. One that is made of few codes, as LeakyReLU makes it, can be a tie, and
    then it is one wherever that code occurs.
    """
    return 4 * float(np.spacing(np.float32(max(-lo, hi))))


def _compare_output(name: str, expected: np.ndarray, found: np.ndarray, bias: float) -> Piece:
    if found.shape != expected.shape:
        return _misshapen(name, 0.0, found)
    finite = np.abs(expected[np.isfinite(expected)])  # a masked value may be -inf, in both
    top = float(finite.max()) if finite.size else 0.0
    with np.errstate(invalid='ignore'):
        difference = np.abs(found.astype(np.float64) - expected)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    off = ~same & ~(difference <= 1e-4 * top + bias)
    largest = (
        float(np.where(same, 0.0, np.nan_to_num(difference, nan=np.inf)).max() / max(top, 1e-12)) if found.size else 0.0
    )
    return Piece(name, 0.0, found.size, int(off.sum()), 0, int(off.sum()), largest)


def _misshapen(name: str, step: float, found: np.ndarray) -> Piece:
    """All values are wrong: a size of the example is fixed in the graph."""
    return Piece(name, step, found.size, found.size, 0, found.size, float('inf'))
