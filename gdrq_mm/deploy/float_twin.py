"""The float model beside an exported graph: the same layers in float32, to compare latency, size and memory with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def float_twin(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The graph without quantizers, its weights and biases in float32; None if it quantizes nothing.

    Batch normalization stays merged, as in the exported graph. A clip of codes goes with its quantizer, also where it
    stands for a ReLU6. The values are those of rounded weights: a model to measure, not to predict with.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in twin.graph.initializer}
    nodes, codes = [], set[str]()
    for node in twin.graph.node:
        if node.op_type in FOLDS and all(name in known for name in node.input):
            known[node.output[0]] = FOLDS[node.op_type](node, *(known[name] for name in node.input))
            continue
        if node.op_type == 'QuantizeLinear' or (node.input[:1] and node.input[0] in codes):
            if node.op_type != 'DequantizeLinear':
                codes.update(node.output)
            if node.op_type in FORMS:
                node = helper.make_node('Identity', node.input[:1], node.output, node.name)
        elif node.op_type == 'Max' and len(node.input) == 1:  # what lets ONNX Runtime read dequantized values once
            node = helper.make_node('Identity', node.input, node.output, node.name)
        nodes.append(node)
    if not codes:
        return None
    read = {*_reads(nodes), *(value.name for value in twin.graph.output)}
    del twin.graph.node[:], twin.graph.initializer[:]
    twin.graph.node.extend(nodes)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in known.items():
        if name in read:
            twin.graph.initializer.append(kept.get(name) or numpy_helper.from_array(array, name))
    onnx.checker.check_model(twin)
    return twin


def _reads(nodes: Iterable[onnx.NodeProto]) -> Iterable[str]:
    """Names of all values that nodes read, in their subgraphs too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _reads(graph.node)


def _cast(node: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    return x.astype(helper.tensor_dtype_to_np_dtype(_attribute(node, 'to', None)))


def _dequantize(node: onnx.NodeProto, codes: np.ndarray, scale: np.ndarray, *zero: np.ndarray) -> np.ndarray:
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[_attribute(node, 'axis', 1)] = -1
    whole = codes.astype(np.float32)
    return (whole - zero[0].astype(np.float32).reshape(shape) if zero else whole) * scale.reshape(shape)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


FORMS = ('QuantizeLinear', 'Clip', 'DequantizeLinear')
"""Operators that make codes of values, clip them, and make values of them again."""
FOLDS: dict[str, Any] = {'Cast': _cast, 'Mul': lambda node, a, b: a * b, 'DequantizeLinear': _dequantize}
"""Operators between a stored weight and the layer that reads it -> what they compute."""
