"""Merging: exact sums and the same outputs, on generated layers and on networks."""

import copy

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.integer_bias import bias_in_use
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import METHODS
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.runtime import RUNTIMES
from gdrq_mm.deploy.verify import compare
from tests.deploy.builders import (
    KINDS,
    exported,
    layer_of,
    network,
    norm_of,
    prepared,
    wrong,
)
from tests.helpers import Function, few_bits_of_both

LAW = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(model, plan, x):
    """Merge and compare; the largest relative difference."""
    merged = merge_model(model, plan)
    results = compare(model, merged, plan, lambda m: m(x))
    assert results and all(r.accumulator_errors == r.wrong == 0 for r in results)
    with torch.no_grad():
        assert merged(x).shape == model(x).shape
    return max(r.largest for r in results)


@LAW
@given(
    kind=st.sampled_from(KINDS),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    groups=st.sampled_from([1, 2, 3, 'channel']),
    values=st.sampled_from(['relu', 'signed', 'silu']),
    norm=st.sampled_from(['none', 'affine', 'plain']),
    bias=st.booleans(),
)
def test_a_merged_layer_gives_exact_sums_and_the_same_output(kind, channels, bits, groups, values, norm, bias):
    layer = layer_of(kind, *channels, bias)
    function = {'relu': torch.relu, 'signed': lambda x: x, 'silu': nn.functional.silu}[values]
    c_in = getattr(layer, 'in_channels', None) or layer.in_features
    x = function(torch.randn((8, c_in) if kind == 'linear' else (2, c_in, 7, 7)) * 2)
    parts = [layer] if norm == 'none' else [layer, norm_of(kind, layer, norm == 'affine')]
    weight, activation = dict(bits=bits[0], groups=groups), dict(bits=bits[1])
    options = {'overrides': {'*': dict(weight=weight, activation=activation)}}
    model, plan = prepared(nn.Sequential(*parts), x, **options)
    assert check(model, plan, x) < 1e-4
    merged = merge_model(model, plan)[0]
    assert merged.codes.dtype == torch.int8 and merged.multiplier.shape == merged.bias.shape
    assert merged.multiplier.numel() == (getattr(layer, 'out_channels', None) or layer.out_features)


UNEVEN = dict(ttq='TTQ', syq='SYQ', log2='logarithmic', hwgq='HWGQ', fgq='FGQ', tsq='TSQ', lbw='powers', inq='powers')
"""Method -> what the message says, with the bits of this test."""


@pytest.mark.parametrize('method', sorted(METHODS))
def test_methods_merge_or_say_why_not(method):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)
    )
    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(model, x, bits=8, **few_bits_of_both(method))
    if method in UNEVEN:
        with pytest.raises(UserError, match=rf'layer 2 cannot be merged: .*{UNEVEN[method]}'):
            merge_model(model, plan)
        return
    assert check(model, plan, x) < 1e-4


@pytest.mark.parametrize('call', [lambda up, x, size: up(x, size), lambda up, x, size: up(output_size=size, input=x)])
def test_a_transposed_convolution_may_be_told_its_size(call):
    """As in a decoder that restores what strides have halved."""
    model = Function(
        lambda m, x: m.last(call(m.up, m.first(x).relu(), x.shape[2:]).relu()),
        first=nn.Conv2d(3, 4, 3, stride=2, padding=1),
        up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        last=nn.Conv2d(4, 2, 1),
    )
    x = torch.randn(2, 3, 8, 8)
    model, plan = prepared(model, x, bits=8)
    assert check(model, plan, x) < 1e-4
    graph, seen, out = exported(model, plan, x)
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


@pytest.mark.parametrize('deployable', [True, False])
def test_a_whole_network_keeps_its_predictions(deployable):
    model, x = network(), torch.randn(4, 3, 12, 12)
    model.train()(x)  # statistics of batch normalization
    model, plan = prepared(model.eval(), x, bits=8, deployable=deployable)
    before = copy.deepcopy(model.state_dict())
    results = compare(model, merged := merge_model(model, plan), plan, lambda m: m(x))
    assert sum(r.codes for r in results) > 0 and sum(r.wrong for r in results) == 0
    assert sum(isinstance(m, IntegerLayer) for m in merged.modules()) == len(quant_layers(model)) == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), atol=1e-3, rtol=1e-3)
        if deployable:  # operands of additions are still quantized
            assert hasattr(merged.two.conv2, 'output_quant') or hasattr(merged.two.bn2, 'output_quant')


def test_deployable_evaluates_with_the_biases_of_the_integer_graph():
    model, x = network(), torch.randn(4, 3, 12, 12)
    model.train()(x)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True)
    merged = merge_model(model, plan)
    integers = {name: m for name, m in merged.named_modules() if isinstance(m, IntegerLayer)}
    for name, layer in integers.items():
        spread = 127 // quant_layers(model)[name].weight_quant.hi
        codes = layer.bias.double() * spread / layer.multiplier.double().abs()
        assert torch.allclose(codes, codes.round(), atol=1e-2, rtol=0), name
        trained = quant_layers(model)[name]
        assert bias_in_use(trained, trained.input_quant) is not None
    assert max(r.largest for r in compare(model, merged, plan, lambda m: m(x))) < 1e-5
    layer = model.train().one.conv1
    assert (
        layer.bias is None and bias_in_use(layer, layer.input_quant) is None
    )  # training has the statistics of the batch


@pytest.mark.parametrize('deployable', [True, False])
@pytest.mark.parametrize('gate', [lambda n, y: torch.relu(n) + y, lambda n, y: torch.sigmoid(n) * y])
def test_a_convolution_that_two_read_is_not_merged(deployable, gate):
    def forward(m, x):
        y = m.a(x)
        return m.last(gate(m.norm(y), y))

    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    model = Function(forward, a=nn.Conv2d(3, 4, 3), norm=norm, last=nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(model.eval(), x, bits=8, deployable=deployable)
    assert plan.norms == {}
    with torch.no_grad():
        torch.testing.assert_close(merge_model(model, plan)(x), model(x), atol=1e-2, rtol=1e-2)


def test_a_wrong_merge_is_seen():
    model, x = network(), torch.randn(4, 3, 12, 12)
    model, plan = prepared(model.eval(), x, bits=8)
    for name, change in (('codes', 1), ('multiplier', 0.02), ('bias', 0.2)):
        merged = merge_model(model, plan)
        getattr(merged.one.conv1, name).add_(change)
        results = {r.name: r for r in compare(model, merged, plan, lambda m: m(x))}
        wrong = [n for n, r in results.items() if r.accumulator_errors or r.wrong or r.largest > 1e-4]
        assert wrong == ['one.conv1'], name


def test_sums_that_may_not_fit_into_32_bits_are_refused():
    for inputs, fits in ((50_000, True), (1_000_000, False)):
        model = nn.Sequential(nn.Linear(inputs, 2))
        nn.init.constant_(model[0].weight, 1.0)
        model, plan = prepared(model, torch.rand(2, inputs), bits=8, weight=dict(bits=8, gdrq=dict(k=7.0)))
        if fits:
            layer = merge_model(model, plan)[0]
            sums = layer.accumulate(torch.full((1, inputs), float(layer.hi)))
            assert sums.abs().max() * layer.spread < 2**30
        else:
            with pytest.raises(UserError, match=r'layer 0 cannot be merged: its sums, up to [\d,]+, may not fit'):
                merge_model(model, plan)


@pytest.mark.parametrize(
    'quantization, message',
    [
        (dict(weight=dict(bits=32)), 'layer a cannot be merged: its weight is float'),
        (dict(activation=dict(bits=32)), 'layer a cannot be merged: its input is float'),
    ],
)
def test_what_cannot_be_merged_is_named(quantization, message):
    model, plan = prepared(network(), torch.randn(2, 3, 8, 8), **quantization)
    with pytest.raises(UserError, match=message):
        merge_model(model, plan)


def test_an_uncalibrated_model_is_refused():
    model, x = network(), torch.randn(2, 3, 8, 8)
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization(), plan)
    with pytest.raises(UserError, match=r'has no threshold, .*; a float checkpoint has none'):
        merge_model(model, plan)
