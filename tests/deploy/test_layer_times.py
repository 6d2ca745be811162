"""deploy/layer_times.py: a graph of one layer computes what the layer does, in integers where a runtime has them."""

import numpy as np
import onnx.numpy_helper
import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.config import Activation, Weight
from gdrq_mm.core.layers import QUANTIZED
from gdrq_mm.core.mixed.budgets import Pair
from gdrq_mm.deploy import measure
from gdrq_mm.deploy.layer_times import FORMS, costs_of, form_of, layer_graph, time_layers, timed_layer
from gdrq_mm.deploy.runtime import RUNTIMES, integer_layers, open_runtime
from tests.deploy.builders import needs_runtimes

LAYERS = {
    'convolution': (nn.Conv2d(8, 6, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 8, 9, 7)),
    'grouped, dilated': (nn.Conv2d(8, 8, 3, dilation=2, groups=4), (1, 8, 9, 7)),
    'transposed': (nn.ConvTranspose2d(8, 6, 2, stride=2), (1, 8, 5, 5)),
    'linear': (nn.Linear(8, 6), (3, 8)),
    'linear on tokens': (nn.Linear(8, 6), (2, 5, 8)),
}


def timed(name):
    layer, shape = LAYERS[name]
    return timed_layer(QUANTIZED[type(layer)].from_float(layer, Weight(), Activation()), shape)


@needs_runtimes
@pytest.mark.parametrize('name', LAYERS)
def test_a_graph_is_that_layer(name):
    """The float form against torch, with the weight of the graph; the integer ones have integer kernels."""
    layer, shape = LAYERS[name]
    graph = layer_graph(timed(name), 'float')
    (weight,) = map(onnx.numpy_helper.to_array, graph.graph.initializer)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight.T if isinstance(layer, nn.Linear) else weight))
        layer.bias.zero_()
        expected = layer(torch.tensor(x)).relu().numpy()
    for backend in RUNTIMES:
        (found,) = open_runtime(backend, graph.SerializeToString())([x])
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)
    for form in FORMS[1:]:
        assert integer_layers(layer_graph(timed(name), form)) == (name != 'transposed', 1)


def test_forms_of_bits():
    assert [form_of(*bits) for bits in ((2, 4), (8, 7), (4, 8), (32, 8), (4, 32))] == [
        *('clipped', 'clipped', 'whole', 'float', 'float')
    ]


def test_a_layer_whose_form_is_not_known_has_no_time():
    layer = QUANTIZED[nn.Conv2d].from_float(nn.Conv2d(8, 8, 3, padding='same'), Weight(), Activation())
    assert timed_layer(layer, (1, 8, 9, 9)) is None


@needs_runtimes
def test_the_cost_of_a_layer_is_the_sum_of_its_calls(monkeypatch):
    monkeypatch.setattr(measure, 'PAUSE', 0)
    conv, linear = timed('convolution'), timed('linear')
    times = time_layers([conv, linear, conv], 'onnxruntime', threads=1, rounds=2)
    assert times.keys() == {(layer, form) for layer in (conv, linear) for form in FORMS}
    assert all(value > 0 for value in times.values())
    costs = costs_of({'head': [conv, conv], 'fc': [linear]}, times)
    assert costs['head'](Pair(4, 4)) == 2 * times[conv, 'clipped']
    assert costs['fc'](Pair(4, 8)) == times[linear, 'whole'] and costs['fc'](Pair(32, 4)) == times[linear, 'float']
