"""gdrq_mm/deploy/: merging, comparing and packing, on generated layers and on whole models."""

import copy
import hashlib
import json
import struct

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.integer_bias import bias_in_use
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import METHODS, WEIGHT_METHODS
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.packed import MAGIC, load_packed, pack_codes, read_packed, unpack_codes, write_packed
from gdrq_mm.deploy.verify import compare
from tests.helpers import Block, Function

LAW = settings(deadline=None, max_examples=40)
KINDS = ['conv', 'grouped', 'depthwise', 'strided', 'dilated', 'transposed', 'transposed grouped', 'linear']


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_of(kind, c_in, c_out, bias):
    return {
        'conv': lambda: nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias),
        'grouped': lambda: nn.Conv2d(2 * c_in, 2 * c_out, 3, groups=2, bias=bias),
        'depthwise': lambda: nn.Conv2d(c_in, 2 * c_in, 3, padding=1, groups=c_in, bias=bias),
        'strided': lambda: nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=bias),
        'dilated': lambda: nn.Conv2d(c_in, c_out, (1, 3), padding=(0, 2), dilation=2, bias=bias),
        'transposed': lambda: nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias),
        'transposed grouped': lambda: nn.ConvTranspose2d(2 * c_in, 2 * c_out, 3, groups=2, bias=bias),
        'linear': lambda: nn.Linear(c_in, c_out, bias=bias),
    }[kind]()


def norm_of(kind, layer, affine):
    channels = getattr(layer, 'out_channels', None) or layer.out_features
    norm = (nn.BatchNorm1d if kind == 'linear' else nn.BatchNorm2d)(channels, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if affine:
        norm.weight.data.normal_()  # of both signs
        norm.weight.data[0] = 0
        norm.bias.data.normal_()
    return norm


def prepared(model, *batches, **quantization):
    """Quantized, calibrated, in evaluation mode; and its plan."""
    plan = record(model, lambda: model(batches[0]))
    cfg = Quantization.from_dict(dict(first_last_bits=quantization.pop('bits', 4), **quantization))
    quantize_model(model, cfg, plan)
    calibrate(model, batches)
    return model.eval(), plan


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


@pytest.mark.parametrize('method', sorted(METHODS))
def test_methods_merge_or_say_why_not(method):
    weight = WEIGHT_METHODS[METHODS[method][0]].allowed_bits
    bits = dict(weight=dict(bits=min(4, weight[-1])), activation=dict(bits=4))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3)
    )
    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(model, x, method=method, bits=8, **bits)
    if method in ('ttq', 'syq', 'log2', 'hwgq'):
        with pytest.raises(UserError, match=r'layer 2 cannot be merged: (TTQ|SYQ|HWGQ|logarithmic)'):
            merge_model(model, plan)
        return
    assert check(model, plan, x) < 1e-4


def network():
    shared = nn.BatchNorm2d(4)
    return Function(
        lambda m, x: m.last(m.pool(m.two(m.norm(m.b(m.one(m.norm(m.a(x)))))))),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 4, 3, padding=1),
        norm=shared,
        one=Block(downsample=True),
        two=Block(),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        last=nn.Linear(4, 3),
    )


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
        model, plan = prepared(model, torch.rand(2, inputs), bits=8)
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
    with pytest.raises(UserError, match='has not been trained or calibrated to its end'):
        merge_model(model, plan)


# ---- the packed checkpoint ------------------------------------------------------------------------------------------


@LAW
@given(bits=st.integers(1, 8), count=st.integers(0, 50), seed=st.integers(0, 99))
def test_codes_survive_packing(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    data = pack_codes(codes, bits)
    assert len(data) == -(-count * bits // 8) and np.array_equal(unpack_codes(data, bits, count), codes)


@pytest.mark.parametrize('method, bits', [('gdrq', 2), ('gdrq', 4), ('dorefa', 3), ('lsq', 4), ('xnor', 1)])
def test_a_packed_model_loads_to_the_last_bit(tmp_path, method, bits):
    model, x = network(), torch.randn(4, 3, 12, 12)
    model, plan = prepared(model, x, bits=8, method=method, weight=dict(bits=bits))
    merged = merge_model(model, plan)
    write_packed(merged, tmp_path / 'model.gdrq', 'the config')
    state, header = read_packed(tmp_path / 'model.gdrq')
    assert header['config'] == 'the config' and header['layers']['b']['weight_bits'] == bits
    expected = merged.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[n], v) and state[n].dtype == v.dtype for n, v in expected.items())
    again = merge_model(model, plan)
    for tensor in again.state_dict().values():
        tensor.zero_()
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(x), merged(x))


@pytest.mark.parametrize('bits, ratio', [(4, 7.5), (2, 13)])
def test_the_size_of_a_packed_resnet18(tmp_path, bits, ratio):
    from torchvision.models import resnet18

    model = resnet18()
    float_bytes = 4 * sum(v.numel() for v in model.state_dict().values())
    model, plan = prepared(model, torch.randn(1, 3, 64, 64), bits=8, weight=dict(bits=bits))
    write_packed(merge_model(model, plan), tmp_path / 'model.gdrq')
    assert float_bytes / (tmp_path / 'model.gdrq').stat().st_size >= ratio


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp('packed') / 'model.gdrq'
    model, plan = prepared(network(), torch.randn(2, 3, 8, 8))
    write_packed(merge_model(model, plan), path)
    return path.read_bytes()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused(packed, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / 'damaged.gdrq'
    content = bytearray(packed)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_packed(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match='cannot be read: No such file'):
        read_packed(tmp_path / 'none.gdrq')


def crafted(packed, change):
    """The same file with another header and a checksum that fits it."""
    start = len(MAGIC) + 12
    size = struct.unpack_from('<Q', packed, len(MAGIC) + 4)[0]
    header = json.loads(packed[start : start + size])
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    content = MAGIC + struct.pack('<IQ', 1, len(text)) + text.encode() + packed[start + size : -32]
    return content + hashlib.sha256(content).digest()


def codes_of(header):
    return next(entry for entry in header['tensors'].values() if entry['type'] == 'codes')


@pytest.mark.parametrize(
    'change',
    [
        lambda header: codes_of(header).update(lowest=[[0]] * 4000),  # broadcast to 4000 times the size
        lambda header: codes_of(header).update(stride=float('nan')),  # codes that are no numbers
        lambda header: codes_of(header).update(stride=0),
        lambda header: codes_of(header).update(bits=4.0),
        lambda header: '[' * 100_000,
        lambda header: header['tensors'].update({f'{n}': codes_of(header) for n in range(999)}),  # the same bytes
    ],
    ids=['lowest', 'stride', 'no stride', 'bits', 'nested', 'shared bytes'],
)
def test_a_crafted_header_is_refused(packed, tmp_path, change):
    (tmp_path / 'model.gdrq').write_bytes(crafted(packed, lambda header: None))
    assert read_packed(tmp_path / 'model.gdrq')[0], 'unchanged it is good'
    (tmp_path / 'model.gdrq').write_bytes(crafted(packed, change))
    with pytest.raises(UserError, match='damaged'):
        read_packed(tmp_path / 'model.gdrq')


@pytest.mark.parametrize(
    'change', [dict(lo=float('inf')), dict(hi='x'), dict(norm=[]), dict(norm='x'), dict(weight_bits=9)]
)
def test_a_crafted_header_does_not_fit_the_model(packed, tmp_path, change):
    (tmp_path / 'model.gdrq').write_bytes(crafted(packed, lambda header: header['layers']['a'].update(change)))
    model, _ = prepared(network(), torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match=r'model\.gdrq'):
        load_packed(model, tmp_path / 'model.gdrq')
