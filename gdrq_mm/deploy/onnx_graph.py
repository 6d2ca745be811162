"""What is done to an ONNX graph after tracing: each tensor quantized once, before pooling, and weights in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PASSES = ('MaxPool', 'Reshape', 'Flatten', 'Squeeze', 'Unsqueeze', 'Transpose')
"""Operators that only pick or move values: rounding before them and after them is the same."""


def finish_graph(graph: Any, shared: Mapping[str, str] | None = None) -> None:
    """Change a traced graph in place. `shared`: name of an initializer -> one to read instead if both are equal."""
    _share(graph, shared or {})
    _merge_equal(graph)
    _quantize_before_pooling(graph)
    _clip_codes(graph)
    _pack_weights(graph)
    read = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)
    del graph.value_info[:]  # runtimes infer types and shapes
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField('metadata_props')  # stack traces of the export: half a megabyte for a ResNet-18


def initializers(graph: Any) -> dict[str, np.ndarray]:
    """Name -> value of each initializer."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def readers(graph: Any) -> dict[str, list[Any]]:
    """Name of a value -> the nodes that read it."""
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def makers(graph: Any) -> dict[str, Any]:
    """Name of a value -> the node that makes it."""
    return {name: node for node in graph.node for name in node.output}


def quantizations(graph: Any) -> Iterator[tuple[Any, Any, Any]]:
    """QuantizeLinear, the node that ends with its codes, and DequantizeLinear of each quantized tensor, in order.

    The node that ends with the codes is QuantizeLinear itself or a Clip. Pooling may stand behind it.
    """
    reading = readers(graph)
    for node in graph.node:
        if node.op_type == 'QuantizeLinear':
            last, after = node, reading[node.output[0]][0]
            if after.op_type == 'Clip':
                last, after = after, reading[after.output[0]][0]
            while after.op_type in PASSES:
                after = reading[after.output[0]][0]
            yield node, last, after


def _share(graph: Any, shared: Mapping[str, str]) -> None:
    values = initializers(graph)
    equal = {name: other for name, other in shared.items() if {name, other} <= values.keys()}
    equal = {name: other for name, other in equal.items() if np.array_equal(values[name], values[other])}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = equal.get(name, name)
    for tensor in [t for t in graph.initializer if t.name in equal]:
        graph.initializer.remove(tensor)


def _merge_equal(graph: Any) -> None:
    """Readers of one tensor with one quantizer: keep the first of nodes that compute the same."""
    renamed: dict[str, str] = {}
    seen: dict[Any, str] = {}
    values = {t.name: (t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in graph.initializer}
    for node in list(graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type in ('QuantizeLinear', 'Clip', 'DequantizeLinear') and len(node.output) == 1:
            key = (node.op_type, *(values.get(name, name) if i else name for i, name in enumerate(node.input)))
            if key in seen:
                renamed[node.output[0]] = seen[key]
                graph.node.remove(node)
            seen.setdefault(key, node.output[0])
    for output in graph.output:
        if output.name in renamed:  # an output keeps its name
            graph.node.append(helper.make_node('Identity', [renamed[output.name]], [output.name]))


def _quantize_before_pooling(graph: Any) -> None:
    """Where a tensor is quantized once, right behind max pooling, quantize it in front, where a convolution ends."""
    moved = True
    while moved:
        moved = False
        making, reading = makers(graph), readers(graph)
        outputs = {output.name for output in graph.output}
        for quantize, last, _ in quantizations(graph):
            pool = making.get(quantize.input[0])
            if pool is None or pool.op_type not in PASSES or len(reading[pool.output[0]]) > 1:
                continue
            if pool.output[0] in outputs or len(pool.output) > 1 or pool.input[0] not in making:
                continue
            source, codes = pool.input[0], last.output[0]
            quantize.input[0] = source
            pool.input[0] = codes
            for node in reading[codes]:
                node.input[0] = pool.output[0]
            graph.node.remove(pool)
            nodes = list(graph.node)
            nodes.insert(nodes.index(last) + 1, pool)
            del graph.node[:]
            graph.node.extend(nodes)
            moved = True
            break


def _clip_codes(graph: Any) -> None:
    """Where ReLU6 stands in front of a quantizer, clip the codes instead: rounding keeps the order, so it is the same.

    A convolution in front of a float Clip is no integer kernel.
    """
    making, reading, values = makers(graph), readers(graph), initializers(graph)
    kept = {output.name for output in graph.output}
    for quantize, last, _ in list(quantizations(graph)):
        clip = making.get(quantize.input[0])
        if clip is None or clip.op_type != 'Clip' or len(reading[clip.output[0]]) > 1 or clip.output[0] in kept:
            continue
        bounds = [_constant(name, making) for name in clip.input[1:]]
        if len(bounds) < 2 or any(bound is None for bound in bounds):
            continue
        scale, zero_point = values[quantize.input[1]], values[quantize.input[2]]
        codes = [np.clip(np.round(bound / scale) + zero_point, 0, 255) for bound in bounds]
        if last is not quantize:
            codes = [np.maximum(codes[0], values[last.input[1]]), np.minimum(codes[1], values[last.input[2]])]
            graph.node.remove(last)
        name = last.output[0]
        unclipped, ends = f'{name}.unclipped', [f'{name}.low', f'{name}.high']
        for code, end in zip(codes, ends):
            graph.initializer.append(numpy_helper.from_array(np.array(code, np.uint8), end))
        place = list(graph.node).index(quantize)
        quantize.input[0], quantize.output[0] = clip.input[0], unclipped
        graph.node.insert(place + 1, helper.make_node('Clip', [unclipped, *ends], [name]))
    _remove_unread(graph)


def _constant(name: str, making: dict[str, Any]) -> np.ndarray | None:
    """The value of a Constant behind casts to the type of what is clipped."""
    node = making.get(name)
    while node is not None and node.op_type in ('Cast', 'CastLike'):
        node = making.get(node.input[0])
    if node is None or node.op_type != 'Constant':
        return None
    value = helper.get_attribute_value(node.attribute[0])
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.array(value, np.float32)


def _remove_unread(graph: Any) -> None:
    kept = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if not kept.intersection(node.output):
            graph.node.remove(node)
        else:
            kept.update(node.input)


def _pack_weights(graph: Any) -> None:
    """Store the codes of a weight that are a multiple of a few levels as INT4: Cast, Mul by the factor, Cast."""
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]:
        spread = numpy_helper.to_array(tensor).astype(np.int32)
        factor = int(np.gcd.reduce(np.abs(spread), axis=None)) or 1
        codes = spread // factor
        if codes.size == 0 or codes.min() < -8 or codes.max() > 7:
            continue
        name = tensor.name
        packed = helper.make_tensor(f'{name}.int4', TensorProto.INT4, tensor.dims, codes.ravel())
        if packed.int32_data:  # as bytes, two codes each
            raw = _nibbles(codes)
            packed.ClearField('int32_data')
            packed.raw_data = raw
        times = numpy_helper.from_array(np.array(factor, np.int32), f'{name}.factor')
        graph.initializer.remove(tensor)
        graph.initializer.extend([packed, times])
        steps = [
            helper.make_node('Cast', [packed.name], [f'{name}.int32'], to=TensorProto.INT32),
            helper.make_node('Mul', [f'{name}.int32', times.name], [f'{name}.times'], name=f'{name}.mul'),
            helper.make_node('Cast', [f'{name}.times'], [name], to=TensorProto.INT8),
        ]
        for place, node in enumerate(steps):
            graph.node.insert(place, node)


def _nibbles(codes: np.ndarray) -> bytes:
    flat = (codes.ravel() & 15).astype(np.uint8)
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return (flat[::2] | flat[1::2] << 4).tobytes()


def cut(model: onnx.ModelProto, inputs: dict[str, Any], outputs: dict[str, Any]) -> onnx.ModelProto:
    """The part of a model between values: name -> (element type, shape) of what goes in and comes out."""
    making, needed, todo = makers(model.graph), set(), list(outputs)
    while todo:
        name = todo.pop()
        node = making.get(name)
        if name not in inputs and node is not None and id(node) not in needed:
            needed.add(id(node))
            todo.extend(node.input)
    nodes = [node for node in model.graph.node if id(node) in needed]
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        'cut',
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items() if name in read],
        [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
