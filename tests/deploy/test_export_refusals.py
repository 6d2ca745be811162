"""What an export refuses before it writes: models and examples that cannot be compared, and sizes that differ."""

import logging

import numpy as np
import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.deploy.export import export, properties
from gdrq_mm.deploy.runtime import RUNTIMES, RuntimeFailed, open_runtime
from gdrq_mm.deploy.verify_onnx import _compare_output
from tests.deploy.builders import prepared, trained_network
from tests.helpers import Function


def trained(network):
    """A network on pictures of 12x12, with statistics of batch normalization; its plan and pictures."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    network.train()(x)
    return *prepared(network.eval(), x, bits=8, deployable=True), x


def test_a_graph_with_one_way_for_all_remainders_takes_one_size(tmp_path, caplog):
    """What is left of a size decides whether it pads; torch's exporter keeps the way of the traced size."""

    def forward(m, x):
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, width % 2, 0, height % 2))
        return m.last(m.first(x).relu())

    network = Function(forward, first=nn.Conv2d(3, 8, 3, padding=1), last=nn.Conv2d(8, 4, 2, stride=2))
    model, plan, x = trained(network)
    with caplog.at_level(logging.WARNING):
        report = export(model, plan, x, tmp_path / 'exported')
    assert properties(report.parts[0].graph)['any_size'] is False and 'takes the traced size only' in caplog.text
    for backend in RUNTIMES:
        run = open_runtime(backend, tmp_path / 'exported/model.onnx')
        with pytest.raises(RuntimeFailed):
            run([np.zeros((4, 3, 13, 13), np.float32)])


@pytest.mark.parametrize('expected', [[1.0, -np.inf, 2.0], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0]])
def test_values_that_are_not_finite_hide_no_others(expected):
    expected = np.array(expected, np.float32)
    wrong = [np.add(expected, [0.1, 0, 0]), np.full(3, 77.0), np.full(3, np.nan), np.array([1.0, 3.0, 2.0]), -expected]
    assert _compare_output('y', expected, expected.copy(), 0.0).wrong == 0
    for found in wrong:
        assert _compare_output('y', expected, found.astype(np.float32), 0.0).wrong > 0
    assert _compare_output('y', np.ones(3), np.full(3, np.nan), 0.0).wrong == 3


def spoilt(value):
    def spoil(model):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] = value

    return spoil


def not_calibrated(model):
    next(layer for layer in quant_layers(model).values()).own_input_quant.set_state(calibrated=False)


@pytest.mark.parametrize(
    ('spoil', 'example', 'message'),
    [
        (spoilt(torch.nan), torch.Tensor.clone, r'.*weight has NaN or infinite values: its training diverged'),
        (spoilt(-torch.inf), torch.Tensor.clone, r'.*weight has NaN or infinite values: its training diverged'),
        (not_calibrated, torch.Tensor.clone, 'layer .* has no threshold yet: calibrate or train the model first'),
        (nn.Module.double, torch.Tensor.double, r'.* is torch.float64: export takes a float32 model'),
        (nn.Module.eval, lambda x: x / 0, 'the example has NaN or infinite values'),
        (nn.Module.eval, lambda x: x[:, :2], r'the model does not take the example, \(.*\) of torch.float32: '),
    ],
)
def test_what_cannot_be_compared_is_refused(spoil, example, message, tmp_path):
    model, plan, x = trained_network()
    spoil(model)
    with pytest.raises(UserError, match=message):
        export(model, plan, example(x), tmp_path / 'exported')
    assert not (tmp_path / 'exported').exists()


def test_a_quantized_tensor_times_a_constant_is_exported(tmp_path):
    network = Function(
        lambda m, x: m.last((y := m.first(x)).tanh() + 0.1 * y), first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 1)
    )
    model, plan, x = trained(network)
    assert export(model, plan, x, tmp_path / 'exported').wrong == 0


def test_what_one_runtime_does_not_take_is_exported_for_the_other(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode='circular'),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    model, plan, x = trained(network)
    with pytest.raises(UserError, match=r'openvino: .*[^:]$'):
        export(model, plan, x, tmp_path / 'both')
    assert list(export(model, plan, x, tmp_path / 'one', 'onnxruntime').differing) == ['onnxruntime']
    with pytest.raises(UserError, match="target='tensorrt' is neither both nor installed: onnxruntime, openvino"):
        export(model, plan, x, tmp_path / 'other', 'tensorrt')


def test_for_openvino_functions_are_not_quantized_in_front(tmp_path):
    model, plan, x = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)))
    kinds = {}
    for target in ('both', 'openvino'):
        graph = export(model, plan, x, tmp_path / target, target).parts[0].graph
        kinds[target] = [node.op_type for node in graph.graph.node].count('QuantizeLinear')
    assert kinds['openvino'] == kinds['both'] - 1


class ActivatingNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x):
        return super().forward(x).relu()


def test_a_norm_that_does_more_is_not_folded(tmp_path):
    layers = nn.Conv2d(3, 8, 3), ActivatingNorm(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    model, plan, x = trained(nn.Sequential(*layers))
    assert plan.norms == {'2': '3'}
    assert export(model, plan, x, tmp_path / 'exported').wrong == 0
