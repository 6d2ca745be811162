"""The forms of a graph that make it fast: codes are joined, no strided slices, SiLU reads its input once."""

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import interpolate, max_pool2d

from gdrq_mm.core.modules import quant_layers
from gdrq_mm.deploy.float_twin import float_twin
from gdrq_mm.deploy.runtime import RUNTIMES, integer_layers, kernels
from tests.deploy.builders import exported, prepared, wrong
from tests.helpers import Function


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layers(*shapes):
    return {name: nn.Conv2d(c_in, c_out, size, padding=size // 2) for name, c_in, c_out, size in shapes}


def operators(graph):
    return [node.op_type for node in graph.graph.node]


def test_what_is_joined_pooled_and_enlarged_between_integer_layers_is_codes():
    """As in SPP and in the neck of YOLO: all layers but the last, which ends in floats, have integer kernels."""

    def forward(m, x):
        x = m.a(x).relu()
        pyramid = torch.cat([x, *(max_pool2d(x, size, 1, size // 2) for size in (3, 5))], 1)
        small = m.b(pyramid).relu()
        return m.last(
            torch.cat([interpolate(small, scale_factor=2.0), m.c(interpolate(x, scale_factor=2.0)).relu()], 1)
        )

    model = Function(forward, **layers(('a', 3, 4, 3), ('b', 12, 4, 1), ('c', 4, 4, 3), ('last', 8, 2, 1)))
    x = torch.randn(2, 3, 8, 8)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    floats = {name for node in graph.graph.node if node.op_type in ('Conv', 'DequantizeLinear') for name in node.output}
    for node in graph.graph.node:
        if node.op_type in ('Concat', 'Resize', 'MaxPool'):
            assert floats.isdisjoint(node.input), node.op_type
    # x, small and c; a for b, and once more for c where the last digit of its threshold is another one
    steps = {float(layer.next_quant.step()) for name, layer in quant_layers(model).items() if name in ('b', 'c')}
    assert operators(graph).count('QuantizeLinear') == 3 + len(steps)
    assert integer_layers(graph) == (4 - len(steps), 4)  # a sum that is rounded twice is a float


def test_a_tensor_that_is_read_as_it_is_and_pooled_is_quantized_once():
    def forward(m, x):
        x = m.a(x).relu()
        return m.b(x) + m.b(max_pool2d(x, 3, 1, 1))

    model = Function(forward, **layers(('a', 3, 4, 3), ('b', 4, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    assert operators(graph).count('QuantizeLinear') == 2


def test_bilinear_values_are_quantized_where_they_are_read():
    def forward(m, x):
        return m.last(interpolate(m.a(x).relu(), scale_factor=2.0, mode='bilinear'))

    model = Function(forward, **layers(('a', 3, 4, 3), ('last', 4, 2, 1)))
    x = torch.randn(2, 3, 8, 8)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    assert operators(graph).index('Resize') < len(operators(graph)) - operators(graph)[::-1].index('QuantizeLinear')


@pytest.mark.parametrize('corners', [[(0, 0), (1, 0), (0, 1), (1, 1)], [(1, 1), (0, 1), (0, 0), (1, 0)]])
def test_a_focus_layer_has_no_strided_slices(corners):
    def forward(m, x):
        return m.last(m.a(torch.cat([x[..., i::2, j::2] for i, j in corners], 1)).relu())

    model = Function(forward, **layers(('a', 12, 4, 3), ('last', 4, 2, 1)))
    x = torch.randn(2, 3, 8, 12)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    assert 'Slice' not in operators(graph) and operators(graph).count('SpaceToDepth') == 1


@pytest.mark.parametrize(
    'pick',
    [
        lambda x: [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., ::2, 1::2]],
        lambda x: [x[..., ::2, :6], x[..., 1::2, :6]],
        lambda x: [x[..., :8:2, :8:2], x[..., 1:8:2, :8:2], x[..., :8:2, 1:8:2], x[..., 1:8:2, 1:8:2]],
    ],
    ids=['one of them twice', 'one axis', 'of a part'],
)
def test_other_slices_stay(pick):
    channels = sum(each.shape[1] for each in pick(torch.zeros(1, 3, 12, 12)))
    model = Function(lambda m, x: m.last(m.a(torch.cat(pick(x), 1)).relu()), **layers(('a', channels, 4, 3)))
    model.last = nn.Conv2d(4, 2, 1)
    x = torch.randn(2, 3, 12, 12)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    assert 'Slice' in operators(graph) and 'SpaceToDepth' not in operators(graph)


def test_silu_is_one_kernel_of_onnx_runtime():
    model = nn.Sequential(*(each for c in (3, 8, 8) for each in (nn.Conv2d(c, 8, 3), nn.BatchNorm2d(8), nn.SiLU())))
    model.append(nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 12, 12)
    model, plan = prepared(model.eval(), x, bits=4, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    ran = kernels(graph)
    assert ran['QuickGelu'] == 3 and not ran['Sigmoid'] and not ran['Mul']
    assert ran['DequantizeLinear'] == 3 + 2  # for SiLU, and for the last layer, which is float
    assert 'Max' not in operators(float_twin(graph)) and kernels(float_twin(graph))['QuickGelu'] == 3


@pytest.mark.parametrize(
    'pool',
    [
        lambda x: x.amax((2, 3)),
        lambda x: nn.functional.adaptive_max_pool2d(x, 1).flatten(1),
        lambda x: x.amax((-2, -1), keepdim=True).flatten(1),
    ],
    ids=['amax', 'adaptive_max_pool2d', 'keepdim'],
)
def test_the_largest_value_of_each_channel_is_exact(pool):
    """OpenVINO 2026.4 is wrong at a ReduceMax between an integer convolution and a quantizer."""
    model = Function(
        lambda m, x: m.last(pool(m.middle(m.first(x).relu()).relu())),
        first=nn.Conv2d(3, 8, 3, padding=1),
        middle=nn.Conv2d(8, 8, 3, padding=1),
        last=nn.Linear(8, 3),
    )
    x = torch.randn(4, 3, 8, 8)
    model, plan = prepared(model.eval(), x, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    assert integer_layers(graph) == (3, 3)
