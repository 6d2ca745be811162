"""Layers of 8 bits are exact on every CPU; without VNNI integer kernels add two products in 16 bits."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.deploy import runtime
from gdrq_mm.deploy.runtime import RUNTIMES, OpenVino
from gdrq_mm.deploy.saturation import saturating_inputs
from tests.deploy.builders import exported, prepared, wrong
from tests.helpers import Function

openvino = pytest.importorskip('openvino')


@pytest.fixture(scope='module')
def large_sums():
    """Three layers of 8, 4 and 8 bits, whose weights and inputs are all near the end of their range."""
    torch.manual_seed(0)
    model = Function(
        lambda m, x: m.last(m.middle(m.first(x).relu()).relu()),
        first=nn.Conv2d(4, 8, 3, padding=1),
        middle=nn.Conv2d(8, 8, 3, padding=1),
        last=nn.Conv2d(8, 8, 3, padding=1),
    )
    for layer in model.children():
        nn.init.uniform_(layer.weight, 0.9, 1)
    x = torch.rand(2, 4, 12, 12) / 10 + 0.9
    few = dict(method='minmax', weight=dict(bits=4), activation=dict(bits=4))
    model, plan = prepared(model.eval(), x, bits=8, deployable=True, **few)
    return x, *exported(model, plan, x)


@pytest.mark.parametrize('vnni', [True, False])
def test_sums_beyond_16_bits(large_sums, vnni, monkeypatch):
    x, graph, seen, out = large_sums
    if not vnni:  # where the CPU has it, what it would need without is right too
        monkeypatch.setattr(runtime, 'has_vnni', lambda: False)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)
    opened = OpenVino(graph.SerializeToString())
    opened([x.numpy()])
    assert opened.integer_layers() == (3 if runtime.has_vnni() else 1)


def test_a_layer_that_reads_constants(monkeypatch):
    """As a decoder of transformers reads its learned queries. OpenVINO 2026.4 cannot fold them alone."""
    monkeypatch.setattr(runtime, 'has_vnni', lambda: False)
    torch.manual_seed(0)
    model = Function(
        lambda m, x: m.last(x + m.first(m.queries.weight.repeat(x.shape[0], 1, 1))),
        queries=nn.Embedding(6, 16),
        first=nn.Linear(16, 16),
        last=nn.Linear(16, 8),
    )
    x = torch.randn(2, 6, 16)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True, method='minmax')
    graph, seen, out = exported(model, plan, x)
    assert len(saturating_inputs(graph)) == 2
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


def test_openvino_keeps_the_names_of_inputs_that_saturate(large_sums):
    """A program in another language finds them by these names, as predict.cpp does."""
    _, graph, *_ = large_sums
    outputs = [
        each for node in openvino.Core().read_model(graph.SerializeToString()).get_ops() for each in node.outputs()
    ]
    readers = {name: each.get_target_inputs() for each in outputs for name in each.get_names()}
    found = saturating_inputs(graph)
    assert len(found) == 2
    for name in found:
        assert [each.get_node().get_type_name() for each in readers[name]] == ['Convolution']


@pytest.mark.parametrize('backend', RUNTIMES)
def test_several_layers_with_one_filter(backend, monkeypatch):
    """As YOLOX has for its objects at each level: their zero points are one element each."""
    monkeypatch.setattr(runtime, 'has_vnni', lambda: False)
    torch.manual_seed(0)
    model = Function(
        lambda m, x: m.one(y := m.first(x).relu()) + m.two(y),
        first=nn.Conv2d(3, 4, 3),
        one=nn.Conv2d(4, 1, 1),
        two=nn.Conv2d(4, 1, 1),
    )
    x = torch.randn(2, 3, 8, 8)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True)
    graph, seen, out = exported(model, plan, x)
    assert saturating_inputs(graph) and wrong(graph, seen, x, out)[backend] is None
