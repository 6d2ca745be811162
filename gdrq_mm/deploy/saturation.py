"""Which layers of a graph a CPU without VNNI gets wrong, and the graph in which they are computed in float.

Without VNNI integer kernels add two products in 16 bits. Codes and weights of 8 bits saturate these sums; those
of a layer with fewer bits fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .onnx_graph import MOVES, makers

LAYERS = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
"""Operators of layers, and of products of two activations."""
SUM_OF_TWO = 2**15 - 1
"""The largest sum of two products of codes where they are added in 16 bits."""
SAME_CODES = (*MOVES, 'SpaceToDepth', 'Resize', 'Cast', 'Mul', 'Clip', 'DequantizeLinear')
"""Operators behind which a tensor is made from the codes that they read."""


def has_vnni() -> bool:
    """Whether the CPU adds products of 8-bit integers without saturation; False where that cannot be known."""
    try:
        return 'vnni' in Path('/proc/cpuinfo').read_text()
    except OSError:
        return False


def saturating(model: onnx.ModelProto) -> list[Any]:
    """The nodes of layers whose sums of two products may be larger than 16 bits hold, by the codes the graph shows."""
    made = makers(model.graph)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in LAYERS]
    return [n for n in layers if 2 * math.prod(_largest_code(name, made, values) for name in n.input[:2]) > SUM_OF_TWO]


def saturating_inputs(model: onnx.ModelProto) -> list[str]:
    """The tensors that these layers read: what a program in another language has to know of them."""
    return list(dict.fromkeys(node.input[0] for node in saturating(model)))


def share_weights(model: onnx.ModelProto) -> bool:
    """Whether several layers read the same codes of weights, as those of an RPN do for its levels."""
    made = makers(model.graph)
    constants = {tensor.name for tensor in model.graph.initializer}
    codes = [_source(node.input[1], made) for node in model.graph.node if node.op_type in LAYERS]
    weights = [name for name in codes if name in constants]
    return len(set(weights)) < len(weights)


def _source(name: str, made: Mapping[str, Any]) -> str:
    """The tensor whose codes a tensor is made from: levels with thresholds of their own scale the same codes."""
    while name in made and made[name].op_type in SAME_CODES:
        name = made[name].input[0]
    return name


def without_saturation(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which such layers are computed in float: exact for sums up to 2^24.

    A maximum in front of a layer keeps runtimes from taking its input as integers. OpenVINO has no option for that;
    that of ONNX Runtime is `session.x64quantprecision`. The other operand of the maximum is the lowest float, made from
    the graph's first input: OpenVINO 2026.4 fails where it folds the maximum of two constants, as it would for layers
    that read learned queries.
    """
    safe = onnx.ModelProto()
    safe.CopyFrom(model)
    nodes, inputs = list(safe.graph.node), dict[str, str]()
    for node in saturating(safe):
        source = node.input[0]
        inputs.setdefault(source, f'{source}.float')
        node.input[0] = inputs[source]
    if not inputs:
        return safe
    del safe.graph.node[:]
    safe.graph.initializer.append(numpy_helper.from_array(np.array(np.finfo(np.float32).min), 'lowest'))
    safe.graph.node.append(helper.make_node('Cast', [safe.graph.input[0].name], ['first.float'], to=TensorProto.FLOAT))
    safe.graph.node.append(helper.make_node('ReduceMin', ['first.float'], ['first.min'], keepdims=0))
    safe.graph.node.append(helper.make_node('Min', ['first.min', 'lowest'], ['lowest.float']))
    for node in nodes:
        safe.graph.node.append(node)
        for name in node.output:
            if name in inputs:
                safe.graph.node.append(helper.make_node('Max', [name, 'lowest.float'], [inputs[name]]))
    return safe


def _largest_code(name: str, made: Mapping[str, Any], values: Mapping[str, TensorProto], unknown: int = 0) -> int:
    """The largest absolute value of the integers that a tensor is made from, as far as the graph shows it.

    Args:
        unknown: that of other tensors: 0 of floats, which no integer kernel reads, 255 behind a DequantizeLinear.
    """
    if name in values:
        if values[name].data_type == TensorProto.INT4:
            return 8
        array = numpy_helper.to_array(values[name])
        return int(np.abs(array.astype(np.int64)).max(initial=0)) if array.dtype.kind in 'iu' else unknown
    node = made.get(name)
    kind = node.op_type if node is not None else ''
    if node is None or kind not in SAME_CODES:
        return unknown
    if kind == 'DequantizeLinear':
        return _largest_code(node.input[0], made, values, 255)
    read = node.input if kind in ('Concat', 'Mul') else node.input[:1] if kind != 'Clip' else node.input[::2]
    found = [_largest_code(each, made, values, unknown) for each in read if each]
    # 4-bit weights are spread over 8 bits; codes are clipped to their bits
    return math.prod(found) if kind == 'Mul' else min(found) if kind == 'Clip' else max(found)
