"""What is done to a traced graph: each tensor quantized once and early, operators as runtimes want them, 4-bit weights.

The values of the graph stay what they are, to the last bit. The rest is done by the passes of onnx_ir. Nodes get the
names of their modules first, see names.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx_ir.passes import common

from .names import Site, quantizer_of, weight_node

MOVES = ('MaxPool', 'ReduceMax', 'Reshape', 'Flatten', 'Squeeze', 'Unsqueeze', 'Transpose', 'Concat')
"""Operators that only pick, move or join values: rounding before them and after them is the same."""
NORMALIZATIONS = ('LayerNormalization', 'InstanceNormalization', 'GroupNormalization')
"""Operators that divide by the root of the variance and an epsilon."""


def finish(
    model: ir.Model, outputs: Sequence[str], factors: Mapping[str, int], shared: Mapping[str, str]
) -> onnx.ModelProto:
    """Change a traced model in place and serialize it.

    Args:
        model: what torch.onnx.export made.
        outputs: their names.
        factors: codes of a weight that are stored in 4 bits -> what they have been multiplied by.
        shared: codes -> others to read instead if both are equal.
    """
    _name_nodes(model.graph)
    _name_outputs(model.graph, outputs)
    for name, other in shared.items():
        _share(model.graph.initializers, name, other)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=1)(model)  # scale, zero point and bounds of quantizers
    common.CommonSubexpressionEliminationPass()(model)  # readers of one tensor with one quantizer
    for step in (_space_to_depth, _quantize_in_front, _clip_codes, _read_once, _keep_epsilon):
        step(model.graph)
    common.CommonSubexpressionEliminationPass()(model)  # one tensor that is joined with others several times
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


def quantizations(graph: ir.Graph) -> Iterator[tuple[Site, ir.Node]]:
    """Each quantized tensor in order: by which quantizer, and the DequantizeLinear that reads its codes."""
    for node in graph:
        site = Site.parse(node.name or '') if node.op_type == 'DequantizeLinear' else None
        if site is not None:
            yield site, node


def _name_nodes(graph: ir.Graph) -> None:
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type != 'DequantizeLinear':
            continue
        if node.inputs[0] in graph.initializers.values():
            node.name = weight_node(_name(node.inputs[0]))
        else:
            quantizer = quantizer_of(_name(node.inputs[1]))
            node.name = str(Site(quantizer, calls[quantizer]))
            calls[quantizer] += 1


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give each output a value of its own with its name: a model may return one tensor several times."""
    known: set[ir.Value] = set()
    for place, (value, name) in enumerate(zip(graph.outputs, names, strict=True)):
        if value in known:
            node = ir.node('Identity', [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = value = node.outputs[0]
        known.add(value)
        value.name = name


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


def _corner(value: ir.Value | None) -> tuple[ir.Value | None, dict[int, int]]:
    """x and {axis: start} where a value is every second one of x along some axes, from a start on."""
    starts: dict[int, int] = {}
    while value is not None and (node := value.producer()) is not None and node.op_type == 'Slice':
        found = [_constant(each) for each in node.inputs[1:5]]
        numbers = [int(each.item()) for each in found if each is not None and each.size == 1]
        if len(numbers) < 4 or numbers[1] < 2**31 - 1:
            break
        start, _, axis, step = numbers
        if (start, step) != (0, 1):
            if step != 2 or axis in starts:
                break
            starts[axis] = start
        value = node.inputs[0]
    return value, starts


def _space_to_depth(graph: ir.Graph) -> None:
    """The focus layer of YOLOX, four strided slices that are joined, as SpaceToDepth.

    ONNX Runtime does this by itself; OpenVINO (2026.4) has no fast kernel for strided slices.
    """
    for node in list(graph):
        if node.op_type != 'Concat' or node.attributes['axis'].as_int() != 1:
            continue
        values, starts = zip(*map(_corner, node.inputs), strict=True)
        if any(value is not values[0] for value in values) or any(set(each) != {2, 3} for each in starts):
            continue
        x, blocks = values[0], [2 * each[2] + each[3] for each in starts]
        if sorted(blocks) != [0, 1, 2, 3] or x.shape is None or not isinstance(channels := x.shape[1], int):
            continue
        order = np.concatenate([np.arange(channels) + channels * block for block in blocks])
        moved = ir.node('SpaceToDepth', [x], dict(blocksize=2))
        taken = ir.node(
            'Gather', [moved.outputs[0], _initializer(graph, f'{node.name}.order', order)], dict(axis=1), name=node.name
        )
        graph.insert_before(node, [moved, taken])
        node.outputs[0].replace_all_uses_with(taken.outputs[0])
        graph.remove(node, safe=True)


def _moves(node: ir.Node) -> bool:
    if node.op_type == 'Resize':
        mode = node.attributes.get('mode')
        return mode is None or mode.as_string() == 'nearest'
    return node.op_type in MOVES


def _of_the_inputs(graph: ir.Graph) -> set[ir.Value]:
    """The tensors whose values, and not only their shapes, come from an input of the graph."""
    found = set(graph.inputs) - set(graph.initializers.values())
    for node in graph:
        if node.op_type != 'Shape' and not found.isdisjoint(node.inputs):
            found.update(node.outputs)
    return found


def _quantize_in_front(graph: ir.Graph) -> None:
    """Where a tensor is quantized once, right behind an operator that moves values, quantize what that one reads.

    There a convolution ends, or the values are fewer. Constants stay: OpenVINO 2026.4 does not compile the Transpose of
    the codes of one (`m_element_type.is_static()`), as DETR's queries would be.
    """
    todo = [node for node in graph if node.op_type == 'QuantizeLinear']
    varying = _of_the_inputs(graph)
    while todo:
        quantize = todo.pop()
        mover = _only_maker(quantize)
        if mover is None or not _moves(mover) or quantize.inputs[0] not in varying:
            continue
        sources = list(mover.inputs) if mover.op_type == 'Concat' else [mover.inputs[0]]
        if any(source is None or source.producer() is None for source in sources):
            continue  # an input of the graph
        last = _last_of_codes(quantize)
        last.outputs[0].replace_all_uses_with(mover.outputs[0])
        for place, source in enumerate(sources):
            inputs, name = [source, *quantize.inputs[1:]], f'{quantize.name}_{place}'
            each = ir.node('QuantizeLinear', inputs, quantize.attributes, name=name)
            nodes = [each]
            if last is not quantize:
                nodes.append(ir.node('Clip', [each.outputs[0], *last.inputs[1:]], name=f'{last.name}_{place}'))
            graph.insert_before(mover, nodes)
            mover.replace_input_with(place, nodes[-1].outputs[0])
            todo.append(each)
        graph.remove([quantize] if last is quantize else [last, quantize], safe=True)


def _last_of_codes(quantize: ir.Node) -> ir.Node:
    """The node that ends with the codes: a Clip, or QuantizeLinear itself."""
    readers = quantize.outputs[0].consumers()
    return readers[0] if len(readers) == 1 and readers[0].op_type == 'Clip' else quantize


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
    for quantize in [node for node in graph if node.op_type == 'QuantizeLinear']:
        clip, last = _only_maker(quantize), _last_of_codes(quantize)
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


def _read_once(graph: ir.Graph) -> None:
    """Let SiLU, x * sigmoid(x), read its dequantized x once, through the largest of one value, which is x.

    ONNX Runtime dequantizes for every reader anew, and does not see that both are one function, for which it has a
    kernel. OpenVINO leaves the Max out.
    """
    for product in list(graph):
        if product.op_type != 'Mul':
            continue
        for x, other in (product.inputs, product.inputs[::-1]):
            function = other.producer() if other is not None else None
            maker = x.producer() if x is not None else None
            if function is None or maker is None or maker.op_type != 'DequantizeLinear' or function.inputs[:1] != (x,):
                continue
            once = ir.node('Max', [x], name=f'{maker.name}.once')
            graph.insert_after(maker, once)
            for reader in {function: None, product: None}:
                for place, value in enumerate(reader.inputs):
                    if value is x:
                        reader.replace_input_with(place, once.outputs[0])
            break


def _keep_epsilon(graph: ir.Graph) -> None:
    """Let a normalization read the larger of x and x, which is x.

    OpenVINO (2026.4) normalizes codes instead of what they stand for, as the scale drops out, and adds the epsilon to
    the variance of the codes: it is lost, and small tensors get other values. It does not look through a Max.
    """
    for node in list(graph):
        if node.op_type in NORMALIZATIONS:
            kept = ir.node('Max', [node.inputs[0], node.inputs[0]], name=f'{node.name}.kept')
            graph.insert_before(node, kept)
            node.replace_input_with(0, kept.outputs[0])


def _constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of a Constant behind casts to the type of what is clipped, or made a vector for a Slice."""
    kept = ('Cast', 'CastLike', 'Reshape')
    while value is not None and (node := value.producer()) is not None and node.op_type in kept:
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
