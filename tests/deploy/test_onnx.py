"""Graphs of generated layers and of networks in both runtimes, and broken ones that must be seen."""

import copy
import functools

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import METHODS, Stage
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.onnx_export import export_onnx
from gdrq_mm.deploy.runtime import RUNTIMES, float_layers, integer_layers, kernels, open_runtime
from tests.deploy.builders import (
    KINDS,
    exported,
    layer_of,
    norm_of,
    pieces_of,
    pooled_network,
    prepared,
    trained_network,
    wrong,
)
from tests.helpers import Function, few_bits_of_both

FUSED = {'QLinearConv', 'QGemm', 'QLinearMatMul'}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    groups=st.sampled_from([1, 2, 'channel']),
    values=st.sampled_from(['relu', 'signed', 'silu']),
    norm=st.sampled_from(['none', 'affine', 'plain']),
    bias=st.booleans(),
)
def test_a_layer_gives_the_same_codes_in_both_runtimes(kind, channels, bits, groups, values, norm, bias):
    assume(kind != 'linear' or 1 not in channels)  # OpenVINO 2026.4 does not compile a linear layer of one channel
    layer = layer_of(kind, *channels, bias)
    function = {'relu': torch.relu, 'signed': lambda x: x, 'silu': nn.functional.silu}[values]
    c_in = getattr(layer, 'in_channels', None) or layer.in_features
    c_out = getattr(layer, 'out_channels', None) or layer.out_features
    x = function(torch.randn((8, c_in) if kind == 'linear' else (2, c_in, 7, 7)) * 2)
    reader = nn.Linear(c_out, 3) if kind == 'linear' else nn.Conv2d(c_out, 3, 1)
    parts = [layer] if norm == 'none' else [layer, norm_of(kind, layer, norm == 'affine')]
    options = dict(weight=dict(bits=bits[0], groups=groups), activation=dict(bits=bits[1]))
    model, plan = prepared(nn.Sequential(*parts, nn.ReLU(), reader), x, overrides={'*': options}, deployable=True)
    graph, seen, out = exported(model, plan, x)
    for name, pieces in pieces_of(graph, seen, x, out).items():
        assert [p.name for p in pieces] == ['0', str(len(parts) + 1), 'y', 'whole graph: y'], name
        assert sum(p.wrong for p in pieces) == 0, (name, pieces)
        # A float32 sum may fall on the other side of a tie, no more than that.
        assert sum(p.differing for p in pieces if p.step) <= 1, (name, pieces)
    stored = next(t for t in graph.graph.initializer if t.name.startswith('model.0.codes') and len(t.dims) > 1)
    assert (stored.data_type == TensorProto.INT4) == (bits[0] <= 4)


@functools.cache
def exported_network(bits, groups):
    """A trained network, its input, its graph, and what the trained one saw and gave: made once, not to be changed."""
    model, plan, x = trained_network(weight=dict(bits=bits, groups=groups), activation=dict(bits=bits))
    return model, x, *exported(model, plan, x)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_every_layer_runs_as_an_integer_kernel(bits):
    model, x, graph, seen, out = exported_network(bits, 4)
    ran = kernels(graph)
    assert sum(ran[kind] for kind in FUSED) == len(quant_layers(model)) == 7
    assert ran['Conv'] == ran['FusedConv'] == ran['Gemm'] == ran['MatMul'] == 0
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


def test_groups_cost_nothing():
    graphs = [exported_network(4, groups)[2] for groups in (1, 4, 'channel')]
    one, four, channel = ([(n.op_type, list(n.input)) for n in graph.graph.node] for graph in graphs)
    assert one == four == channel
    assert kernels(graphs[0]) == kernels(graphs[1]) == kernels(graphs[2])


def test_operands_of_an_addition_without_batch_normalization():
    """As in an FPN without norm: the quantizer of the operand sits on the convolution itself."""
    model = Function(
        lambda m, x: m.last(m.a(x) + m.b(x)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        last=nn.Conv2d(4, 2, 1),
    )
    x = torch.randn(4, 3, 8, 8)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True)
    assert 'output_quant' in model.a._modules
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


@pytest.mark.parametrize('bits', [3, 8])
@pytest.mark.parametrize('function', [nn.ReLU6, lambda: nn.Hardtanh(-0.6, 0.7)], ids=['ReLU6', 'Hardtanh'])
def test_a_function_that_clips_is_taken_up_by_the_clip_of_the_codes(function, bits):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), function(), nn.MaxPool2d(2), nn.Conv2d(8, 2, 1))
    model[1].weight.data.fill_(4)
    x = torch.randn(4, 3, 10, 10)
    model, plan = prepared(model.eval(), x, bits=bits, deployable=True)
    model[4].input_quant.threshold *= 2  # else the quantizer clips as much
    graph, seen, out = exported(model, plan, x)
    assert kernels(graph)['QLinearConv'] == 1
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


def test_a_quantizer_that_calibration_did_not_reach_passes_its_values():
    model, plan, x = trained_network()
    model.one.bn2.output_quant.set_state(stage=Stage.FLOAT)
    graph, _, out = exported(model, plan, x)
    (found,) = open_runtime('onnxruntime', graph.SerializeToString())([x.numpy()])
    assert np.abs(found - out).max() < 0.05 * np.abs(out).max()


def test_a_layer_of_several_names():
    """As RTMDet's heads share convolutions; the graph has the last name."""
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = Function(lambda m, x: m.layers[2](m.layers[0](x).relu()), layers=nn.ModuleList([shared, shared, shared]))
    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(model, x, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == {'onnxruntime': None, 'openvino': None}


def test_float_additions_are_slower_but_right():
    model, plan, x = trained_network(deployable=False)
    graph, seen, out = exported(model, plan, x)
    assert 0 < integer_layers(graph)[0] == 7 - len(float_layers(graph)) < 7
    assert {'one.conv2', 'two.conv2'} < set(float_layers(graph)) < set(quant_layers(model))
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


UNEVEN = ('hwgq', 'ttq', 'syq', 'log2', 'fgq', 'tsq')


UNIFORM = [name for name in METHODS if name not in (*UNEVEN, 'gdrq')]  # gdrq: see above
SLOW = ('lbw', 'inq', 'loss_aware')
"""By make test-full: their codes are merged as those of others."""


@pytest.mark.parametrize('method', [pytest.param(m, marks=[pytest.mark.full] * (m in SLOW)) for m in UNIFORM])
def test_uniform_methods_export(method):
    settings_ = few_bits_of_both(method)
    if method in ('lbw', 'inq'):
        settings_['weight'] = dict(bits=3)  # more powers of two are no multiples of one step
    model, plan, x = trained_network(**settings_)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


def test_the_batch_is_open_and_the_whole_graph_predicts_the_same():
    model, x, graph, *_ = exported_network(4, 4)
    for backend in RUNTIMES:
        run = open_runtime(backend, graph.SerializeToString())
        for batch in (1, 3, 4):
            with torch.no_grad():
                torch.testing.assert_close(
                    torch.from_numpy(run([x[:batch].numpy()])[0]), model(x[:batch]), atol=1e-4, rtol=1e-3
                )


def test_export_changes_neither_the_model_nor_the_inputs():
    model, plan, x = trained_network()
    before, hooks = copy.deepcopy(model.state_dict()), {n: len(m._forward_hooks) for n, m in model.named_modules()}
    inputs = x.clone()
    merged = merge_model(model, plan)
    kept = copy.deepcopy(merged.state_dict())
    export_onnx(merged, x, ['y'])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(v, kept[n]) for n, v in merged.state_dict().items())
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks and torch.equal(x, inputs)
    assert not torch.onnx.is_in_onnx_export() and not model.training


def change(graph, layer, what, function):
    """Change what belongs to a layer in a graph, and nothing that other layers share with it."""
    nodes = {node.name: node for node in graph.graph.node}
    reading = {name: node for node in graph.graph.node for name in node.input}
    making = {name: node for node in graph.graph.node for name in node.output}
    weight, dequantize = nodes[f'{layer}.codes'], nodes.get(f'{layer}:0')  # None: another reader of the tensor has it
    clip = dequantize and making[dequantize.input[0]]
    quantize = clip and making[clip.input[0]]
    bias = reading[weight.output[0]].input[2]
    places = {
        'codes': [(reading.get(f'model.{layer}.codes.int4'), 0)],
        'factor': [(reading.get(f'model.{layer}.codes.factor'), 1)],
        'scale': [(weight, 1)],
        'bias': [(making[bias], 0) if bias in making else (reading[bias], 2)],
        'step': [(quantize, 1), (dequantize, 1)],
        'zero point': [(quantize, 2), (dequantize, 2)],
        'high': [(clip, 2)],
    }[what]
    (node, place), *_ = places
    (tensor,) = [t for t in graph.graph.initializer if t.name == node.input[place]]
    value = function(numpy_helper.to_array(tensor))
    new = (
        numpy_helper.from_array(value, 'changed')
        if tensor.data_type != TensorProto.INT4
        else onnx.helper.make_tensor('changed', TensorProto.INT4, tensor.dims, value.ravel().astype(int))
    )
    graph.graph.initializer.append(new)
    for node, place in places:
        node.input[place] = 'changed'


@pytest.mark.parametrize(
    'layer, what, function, place',
    [
        ('one.conv1', 'codes', lambda v: -v.astype(np.int8), 'one.conv2'),
        ('one.conv1', 'factor', lambda v: v + 1, 'one.conv2'),
        ('one.conv1', 'scale', lambda v: v * np.float32(1.02), 'one.conv2'),
        ('one.conv1', 'bias', lambda v: v + np.float32(0.2), 'one.conv2'),
        ('one.conv2', 'step', lambda v: v * np.float32(1.02), 'one.conv2'),
        ('one.conv2', 'high', lambda v: v - np.uint8(3), 'one.conv2'),
        ('two.conv2', 'zero point', lambda v: v + np.uint8(1), 'two.conv2'),
        ('last', 'bias', lambda v: v + np.int32(5000), 'y'),
    ],
)
def test_a_broken_graph_is_seen_where_it_is_broken(layer, what, function, place):
    _, x, whole_graph, seen, out = exported_network(4, 4)  # that it is right is tested above
    graph = copy.deepcopy(whole_graph)
    change(graph, layer, what, function)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES, place)


@pytest.mark.parametrize('bits', [4, 8])
def test_a_negative_gamma_and_the_lowest_code(bits):
    layer = nn.Conv2d(1, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[[[-1.0]]], [[[0.3]]]])
    norm = nn.BatchNorm2d(2)
    norm.weight.data.fill_(-1)
    options = dict(weight=dict(bits=bits, groups=1, gdrq=dict(levels='full', threshold='search')))
    x = torch.rand(2, 1, 4, 4)
    model, plan = prepared(nn.Sequential(layer, norm), x, overrides={'*': options})
    assert int(model[0].weight_quant.codes(model[0].weight).min()) == -(2 ** (bits - 1))
    if bits == 8:
        with pytest.raises(UserError, match='layer 0 cannot be exported: a negative gamma turns the code -128 into'):
            export_onnx(merge_model(model, plan), x, ['y'])
    else:  # int8 holds 8 times the spread
        graph, seen, out = exported(model, plan, x)
        assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_a_gamma_next_to_nothing_is_no_reason_to_refuse(bits):
    """Of a residual branch that began with zeros: its bias is too large for int32 in units of its sum."""
    gammas = torch.cat([torch.logspace(-9, 0, 36), -torch.logspace(-9, 0, 36), torch.zeros(1)])
    layer, norm = nn.Conv2d(64, 73, 3, bias=False), nn.BatchNorm2d(73)
    norm.weight.data, norm.bias.data = gammas, torch.linspace(-1, 1, 73)
    norm.running_var.fill_(100)
    x = torch.rand(2, 64, 6, 6)
    model = nn.Sequential(layer, norm, nn.ReLU(), nn.Conv2d(73, 2, 1)).eval()
    model, plan = prepared(model, x, bits=bits, weight=dict(bits=bits), deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


def test_no_value_of_the_graph_has_the_name_of_two_things():
    """Buffers at the top of a model, which are named as what torch's exporter makes: `mean`, `x`, `y`."""
    model = pooled_network()
    for name in ('mean', 'x', 'y', 'relu'):
        if not hasattr(model, name):
            model.register_buffer(name, torch.ones(()))
    forward = model.function
    model.function = lambda m, x: forward(m, (x - m.mean) * m.x) + m.y
    x = torch.randn(4, 3, 16, 16)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


@pytest.mark.parametrize('bits', [3, 4])
def test_codes_in_4_bits_depend_on_the_bits_not_on_the_values(bits):
    """All codes even, or all zero: their greatest common divisor is not the factor."""
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -0.6], [0.0, 0.0]]).view(2, 2, 1, 1)
    x = torch.rand(2, 2, 4, 4)
    model, plan = prepared(nn.Sequential(layer, nn.ReLU()), x, bits=bits)
    graph, seen, out = exported(model, plan, x)
    factor = next(t for t in graph.graph.initializer if t.name == 'model.0.codes.factor')
    assert numpy_helper.to_array(factor) == 127 // (2 ** (bits - 1) - 1)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
