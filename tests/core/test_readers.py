"""gdrq_mm/core/topology.py: who else reads what a layer makes, or its weight."""

import json

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.topology import Plan, record
from tests.helpers import Function, conv


def plan_of(model):
    x = torch.randn(1, 4, 8, 8)
    return record(model, lambda: model(x))


@pytest.mark.parametrize(
    'forward',
    [
        lambda m, x: torch.cat([(y := m.conv(x)), m.norm(y)], 1),
        lambda m, x: torch.stack(tensors=[(y := m.conv(x)), m.norm(y)]),
        lambda m, x: (m.norm(y := m.conv(x)), y),
        lambda m, x: dict(out=m.norm(y := m.conv(x)), features=[y]),
    ],
    ids=['cat', 'stack by keyword', 'output', 'nested output'],
)
def test_a_convolution_that_something_else_reads_keeps_its_norm(forward):
    assert plan_of(Function(forward, conv=conv(), norm=nn.BatchNorm2d(4))).norms == {}


def test_a_convolution_that_is_written_into_another_tensor_keeps_its_norm():
    def forward(m, x):
        y, z = m.conv(x), torch.zeros(1, 4, 8, 8)
        z[:] = y
        return m.norm(y) + z

    assert plan_of(Function(forward, conv=conv(), norm=nn.BatchNorm2d(4))).norms == {}


def test_a_size_is_no_reading():
    def forward(m, x):
        y = m.conv(x)
        return m.norm(y) * (y.shape[0] + y.size(1) + y.stride()[0] + y.dim() + (y.dtype == torch.float32))

    assert plan_of(Function(forward, conv=conv(), norm=nn.BatchNorm2d(4))).norms == {'conv': 'norm'}


def test_a_norm_that_reads_another_tensor_in_place_of_a_call_is_not_folded():
    """The convolution runs twice, its norm too; but one of these calls is not behind the other."""
    model = Function(lambda m, x: m.norm(m.conv(x)) + m.norm(x) + m.conv(x), conv=conv(), norm=nn.BatchNorm2d(4))
    assert plan_of(model).norms == {}


def test_a_layer_whose_weight_a_function_reads_is_named():
    def forward(m, x):
        return m.last(nn.functional.linear(m.first(x).relu(), m.middle.weight, bias=m.middle.bias).relu())

    layers = dict(first=nn.Linear(8, 8), middle=nn.Linear(8, 8), last=nn.Linear(8, 8))
    plan = plan_of(Function(forward, **layers))
    assert plan.by_function == ['middle']
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    older = {key: value for key, value in plan.to_dict().items() if key != 'by_function'}
    assert Plan.from_dict(older).by_function == []


def test_a_weight_that_is_read_beside_its_own_layer_is_not_named():
    def forward(m, x):
        m.penalty = m.layer.weight.square().sum()
        return m.layer(x) + m.unused.weight.shape[0]

    assert plan_of(Function(forward, layer=nn.Linear(8, 8), unused=nn.Linear(8, 8))).by_function == []
