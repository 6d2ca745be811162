"""What single layers cost in a runtime: each alone, in float and in the forms that an exported graph gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch.nn as nn
from onnx import TensorProto, helper, numpy_helper

from ..core.typed import FLOAT_BITS
from .measure import timed_rounds
from .onnx_export import OPSET
from .runtime import open_runtime

FORMS = ('float', 'clipped', 'whole')
"""In float32; in integers, with codes of the input that are clipped to less than 8 bits; the same with all 8 bits.
Weights of 2 to 8 bits are all int8 when a runtime has loaded them."""


@dataclass(frozen=True)
class TimedLayer:
    """A layer and the shape of its input; equal ones take equal time."""

    operator: str
    """'Conv', 'ConvTranspose' or 'MatMul'."""
    input: tuple[int, ...]
    weight: tuple[int, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


def timed_layer(layer: nn.Module, shape: Sequence[int]) -> TimedLayer | None:
    """A layer of a model with an input of this shape; None if its form in a graph is not known here."""
    if isinstance(layer, nn.Linear):
        return TimedLayer('MatMul', tuple(shape), tuple(layer.weight.shape))
    if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return None
    conv: Any = layer
    weight = tuple(conv.weight.shape)
    if conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
        return None
    found: dict[str, Any] = dict(strides=tuple(conv.stride), pads=tuple(conv.padding) * 2)
    found |= dict(dilations=tuple(conv.dilation), group=conv.groups)
    if isinstance(layer, nn.ConvTranspose2d):
        return TimedLayer('ConvTranspose', tuple(shape), weight, tuple(found.items()))
    return TimedLayer('Conv', tuple(shape), weight, tuple(found.items()))


def form_of(weight_bits: int, input_bits: int) -> str:
    """The form of a layer with these bits."""
    if FLOAT_BITS in (weight_bits, input_bits):
        return 'float'
    return 'whole' if input_bits == 8 else 'clipped'


def layer_graph(layer: TimedLayer, form: str) -> onnx.ModelProto:
    """A graph of one layer, with 8-bit codes in and out unless it is float; no integer kernel has ConvTranspose."""
    noise = np.random.default_rng(0)
    weight = noise.integers(-127, 128, layer.weight).astype(np.int8)
    if layer.operator == 'MatMul':
        weight = np.ascontiguousarray(weight.T)
    axis = 1 if layer.operator == 'MatMul' else 0
    integer = form != 'float' and layer.operator != 'ConvTranspose'
    nodes: list[Any] = []
    stored: list[Any] = []

    def store(name: str, value: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(value, name))
        return name

    def add(operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f'{operator}_{len(nodes)}'
        nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    x = 'x'
    if integer:
        scale, zero = store('scale', np.array(0.05, np.float32)), store('zero', np.array(0, np.uint8))
        if form == 'clipped':
            x = add('Clip', [x, zero, store('top', np.array(15, np.uint8))])
        x = add('DequantizeLinear', [x, scale, zero])
        count = weight.shape[axis]
        scales, zeros = np.full(count, 0.01, np.float32), np.zeros(count, np.int8)
        inputs = [store('codes', weight), store('scales', scales), store('zeros', zeros)]
        values = add('DequantizeLinear', inputs, axis=axis)
    else:
        values = store('weight', weight.astype(np.float32))
    out = add(layer.operator, [x, values], **dict(layer.attributes))
    out = add('QuantizeLinear', [out, scale, zero]) if integer else add('Relu', [out])
    kind = TensorProto.UINT8 if integer else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        'layer',
        [helper.make_tensor_value_info('x', kind, layer.input)],
        [helper.make_tensor_value_info(out, kind, None)],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=10)


def time_layers(
    layers: Iterable[TimedLayer], backend: str, threads: int | None = None, rounds: int = 10
) -> dict[tuple[TimedLayer, str], float]:
    """Median milliseconds of each layer in each of FORMS. All take turns, so that what else runs falls on all alike."""
    runs: dict[tuple[TimedLayer, str], Callable[[], Any]] = {}
    for layer in dict.fromkeys(layers):
        for form in FORMS:
            graph = layer_graph(layer, form)
            opened = open_runtime(backend, graph.SerializeToString(), threads)
            kind = graph.graph.input[0].type.tensor_type.elem_type
            x = np.ones(layer.input, np.float32 if kind == TensorProto.FLOAT else np.uint8)
            runs[layer, form] = lambda opened=opened, x=x: opened([x])  # type: ignore[misc]
    seconds = list(timed_rounds(runs, rounds))
    return {key: 1000 * float(np.median([each[key] for each in seconds])) for key in runs}


def costs_of(
    calls: Mapping[str, Sequence[TimedLayer]], times: Mapping[tuple[TimedLayer, str], float]
) -> dict[str, Callable[[Any], float]]:
    """Layer -> its milliseconds by the bits of its weight and input: the sum over its calls in one prediction."""

    def cost(name: str, pair: tuple[int, int]) -> float:
        return sum(times[layer, form_of(*pair)] for layer in calls[name])

    return {name: lambda pair, name=name: cost(name, pair) for name in calls}  # type: ignore[misc]
