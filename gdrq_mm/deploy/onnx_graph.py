"""What is done to a traced graph: each tensor quantized once, before pooling, and weights in 4 bits.

The rest is done by the passes of onnx_ir. Nodes get the names of their modules first, see names.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common

from .names import Site, quantizer_of, weight_node

PASSES = ('MaxPool', 'Reshape', 'Flatten', 'Squeeze', 'Unsqueeze', 'Transpose')
"""Operators that only pick or move values: rounding before them and after them is the same."""


def finish(model: ir.Model, factors: Mapping[str, int], shared: Mapping[str, str]) -> onnx.ModelProto:
    """Change a traced model in place and serialize it.

    Args:
        model: what torch.onnx.export made.
        factors: codes of a weight that are stored in 4 bits -> what they have been multiplied by.
        shared: codes -> others to read instead if both are equal.
    """
    _name_nodes(model.graph, factors)
    for name, other in shared.items():
        _share(model.graph.initializers, name, other)
    common.DeduplicateInitializersPass(size_limit=1)(model)  # scale, zero point and bounds of quantizers
    common.CommonSubexpressionEliminationPass()(model)  # readers of one tensor with one quantizer
    for step in (_quantize_before_pooling, _clip_codes):
        step(model.graph)
    for name, factor in factors.items():
        if name in model.graph.initializers:
            _store_in_4_bits(model.graph, name, factor)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces of the export: half a megabyte for a ResNet-18
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # runtimes infer types and shapes
    return proto


def quantizations(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Node]]:
    """QuantizeLinear, the node that ends with its codes, and DequantizeLinear of each quantized tensor, in order.

    The node that ends with the codes is QuantizeLinear itself or a Clip. Pooling may stand behind it.
    """
    for node in list(graph):
        if node.op_type == 'QuantizeLinear':
            last, after = node, _reader(node)
            if after.op_type == 'Clip':
                last, after = after, _reader(after)
            while after.op_type in PASSES:
                after = _reader(after)
            yield node, last, after


def _reader(node: ir.Node) -> ir.Node:
    """One of those that read a node's output."""
    return node.outputs[0].consumers()[0]


def _name_nodes(graph: ir.Graph, weights: Any) -> None:
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type == 'QuantizeLinear':
            quantizer = quantizer_of(_name(node.inputs[1]))
            node.name = str(Site(quantizer, calls[quantizer]))
            calls[quantizer] += 1
        elif node.op_type == 'DequantizeLinear' and node.inputs[0] in graph.initializers.values():
            node.name = weight_node(_name(node.inputs[0]))


def _name(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _share(initializers: Any, name: str, other: str) -> None:
    if {name, other} <= initializers.keys():
        one, another = initializers[name], initializers[other]
        if np.array_equal(_array(one), _array(another)):
            one.replace_all_uses_with(another)
            del initializers[name]


def _quantize_before_pooling(graph: ir.Graph) -> None:
    """Where a tensor is quantized once, right behind max pooling, quantize it in front, where a convolution ends."""
    for quantize, last, _ in quantizations(graph):
        while (pool := _only_maker(quantize)) is not None and pool.op_type in PASSES:
            source = pool.inputs[0]
            if source is None or source.producer() is None:
                break  # an input of the graph
            quantize.replace_input_with(0, source)
            last.outputs[0].replace_all_uses_with(pool.outputs[0])
            pool.replace_input_with(0, last.outputs[0])
            graph.remove(pool)
            graph.insert_after(last, pool)


def _only_maker(quantize: ir.Node) -> ir.Node | None:
    """The node that makes what is quantized, if nothing else reads that."""
    value = quantize.inputs[0]
    assert value is not None
    maker = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return maker if maker is not None and alone and len(maker.outputs) == 1 else None


def _clip_codes(graph: ir.Graph) -> None:
    """Where ReLU6 stands in front of a quantizer, clip the codes instead: rounding keeps the order, so it is the same.

    A convolution in front of a float Clip is no integer kernel.
    """
    for quantize, last, _ in quantizations(graph):
        clip = _only_maker(quantize)
        if clip is None or clip.op_type != 'Clip':
            continue
        bounds = [_constant(value) for value in clip.inputs[1:]]
        if len(bounds) < 2 or any(bound is None for bound in bounds):
            continue
        scale, zero_point = (_array(value) for value in quantize.inputs[1:])
        low, high = (np.clip(np.round(bound / scale) + zero_point, 0, 255) for bound in bounds)
        codes = quantize.outputs[0]
        if last is not quantize:
            low, high = np.maximum(low, _array(last.inputs[1])), np.minimum(high, _array(last.inputs[2]))
            codes = last.outputs[0]
        ends = [
            _initializer(graph, f'{codes.name}.{k}', np.array(v, np.uint8))
            for k, v in zip(('low', 'high'), (low, high))
        ]
        if last is quantize:
            last = ir.node('Clip', [quantize.outputs[0], *ends])
            graph.insert_after(quantize, last)
            codes.replace_all_uses_with(last.outputs[0])
            last.replace_input_with(0, codes)
        else:
            for place, end in enumerate(ends, 1):
                last.replace_input_with(place, end)
        quantize.replace_input_with(0, clip.inputs[0])


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of a Constant behind casts to the type of what is clipped."""
    while value is not None and (node := value.producer()) is not None and node.op_type in ('Cast', 'CastLike'):
        value = node.inputs[0]
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _store_in_4_bits(graph: ir.Graph, name: str, factor: int) -> None:
    """Replace spread codes by INT4, Cast to INT32, Mul by the factor, Cast to INT8."""
    spread = graph.initializers[name]
    codes = _initializer(graph, f'{name}.int4', (_array(spread) // factor).astype(ir.DataType.INT4.numpy()))
    times = _initializer(graph, f'{name}.factor', np.array(factor, np.int32))
    wide = ir.node('Cast', [codes], dict(to=ir.DataType.INT32))
    product = ir.node('Mul', [wide.outputs[0], times])
    narrow = ir.node('Cast', [product.outputs[0]], dict(to=ir.DataType.INT8))
    graph.insert_before(graph[0], [wide, product, narrow])
    spread.replace_all_uses_with(narrow.outputs[0])
    del graph.initializers[name]


# ---- parts of a finished graph --------------------------------------------------------------------------------------


def makers(graph: Any) -> dict[str, Any]:
    """Name of a value -> the node of an onnx.GraphProto that makes it."""
    return {name: node for node in graph.node for name in node.output}


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
