"""gdrq_mm/core/layers.py: ordinary layers with quantized weight and input, against the NumPy reference."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.attention import Projection
from gdrq_mm.core.config import Activation, Weight
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.layers import QUANTIZED, QuantConv2d, QuantConvTranspose2d, QuantLinear
from gdrq_mm.core.quantizers import Stage
from tests import reference
from tests.core.builders import on_two_ranks

FLOAT = Weight(bits=32), Activation(bits=32)

LAYERS = {
    'plain': lambda: nn.Conv2d(4, 6, 3),
    'without bias': lambda: nn.Conv2d(4, 6, 3, bias=False),
    'grouped': lambda: nn.Conv2d(4, 6, 3, groups=2),
    'depthwise': lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    'strided': lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    'dilated': lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    'pointwise': lambda: nn.Conv2d(4, 6, 1),
    'oblong': lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2)),
    'same': lambda: nn.Conv2d(4, 6, 3, padding='same'),
    'reflect': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
    'replicate': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='replicate'),
    'circular': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 3),
    'transposed without bias': lambda: nn.ConvTranspose2d(4, 6, 3, bias=False),
    'transposed grouped': lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    'transposed depthwise': lambda: nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1, groups=4),
    'transposed dilated': lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2),
    'linear': lambda: nn.Linear(7, 5),
    'linear without bias': lambda: nn.Linear(7, 5, bias=False),
}
TRANSPOSED = [name for name in LAYERS if name.startswith('transposed')]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantized(layer, weight, activation):
    """The quantized layer, in training mode."""
    return QUANTIZED[type(layer)].from_float(layer, weight, activation)


def bits(weight, activation=None, **kwargs):
    return Weight(bits=weight, **kwargs), Activation(bits=activation or weight)


def double(x):
    return x.detach().double().numpy()


def image():
    return torch.randn(2, 4, 9, 7)


# ---- from_float -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', LAYERS)
def test_parameters_are_the_same_objects(name):
    layer = LAYERS[name]()
    new = quantized(layer, *bits(4))
    assert new.weight is layer.weight and new.bias is layer.bias
    assert dict(new.named_parameters()).keys() == dict(layer.named_parameters()).keys()


@pytest.mark.parametrize('name', LAYERS)
def test_32_bits_equal_the_float_layer_exactly(name):
    layer, x = LAYERS[name](), image()
    new = quantized(layer, *FLOAT)
    assert torch.equal(new.train()(x), layer(x)) and torch.equal(new.eval()(x), layer(x))
    assert new.bits == (32, 32) and new.weight_quant is None and new.input_quant is None


@pytest.mark.parametrize('name', LAYERS)
def test_two_bits_more_at_least_halve_the_error(name):
    layer, x = LAYERS[name](), image()
    expected = layer(x)
    errors = [float((quantized(layer, *bits(n))(x) - expected).norm() / expected.norm()) for n in (2, 4, 6, 8)]
    assert errors[0] < 1 and all(after < before / 2 for before, after in pairwise(errors))


@pytest.mark.parametrize('name', LAYERS)
def test_gradients_reach_weight_bias_and_input(name):
    layer, x = quantized(LAYERS[name](), *bits(4)), image().requires_grad_()
    layer(x).square().sum().backward()
    for tensor in (layer.weight, x, *([] if layer.bias is None else [layer.bias])):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_the_class_is_a_direct_child_of_its_torch_class():
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, Projection)
    assert all(new.__bases__[-1] in kinds for new in QUANTIZED.values())


def test_hooks_and_attributes_come_along():
    layer, calls = nn.Conv2d(4, 6, 3).eval(), []
    layer.is_special = True
    layer.register_forward_hook(lambda *args: calls.append(1))
    new = quantized(layer, *FLOAT)
    new(image())
    assert calls == [1] and new.is_special and not new.training


def test_the_float_layer_is_left_as_it_was():
    layer = nn.Conv2d(4, 6, 3)
    keys = list(layer.state_dict())
    quantized(layer, *bits(4))
    assert list(layer.state_dict()) == keys and type(layer) is nn.Conv2d


def test_a_float_state_dict_loads_strictly():
    layer = nn.Conv2d(4, 6, 3)
    new = quantized(nn.Conv2d(4, 6, 3), *bits(4))
    new.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(new.weight, layer.weight)


def test_a_quantized_state_dict_gives_the_same_layer():
    first, x = quantized(nn.Conv2d(4, 6, 3), *bits(4, groups=2)), image()
    first(x)
    second = quantized(nn.Conv2d(4, 6, 3), *bits(4, groups=2))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first.eval()(x), second.eval()(x))


# ---- against the reference ------------------------------------------------------------------------------------------


def by_hand(layer, x, function, k_weight, k_input, **kwargs):
    """The layer in float64: quantized input, quantized filters, then the convolution of the reference."""
    filters = double(layer.filters())
    thresholds = reference.scale_clip_threshold(filters, k_weight, layer.weight_quant.groups)
    weight = torch.from_numpy(reference.quantize_groups(filters, thresholds, layer.weight_quant.bits))
    x = reference.quantize(double(x), k_input * np.abs(double(x)).mean(), layer.input_quant.bits)
    return function(x, layer.set_filters(weight).numpy(), double(layer.bias), **kwargs)


def settings_of(weight_bits, groups, activation_bits):
    weight = Weight(bits=weight_bits, groups=groups, options=dict(k=2.5))
    return weight, Activation(bits=activation_bits, range='signed', options=dict(k=3.0))


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
@pytest.mark.parametrize(
    'kwargs',
    [dict(), dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(groups=2), dict(groups=4, padding=1)],
    ids=str,
)
def test_a_convolution_equals_the_reference(kwargs, groups):
    layer, x = quantized(nn.Conv2d(4, 8, 3, **kwargs), *settings_of(3, groups, 4)), image()
    expected = by_hand(layer, x, reference.conv2d, 2.5, 3.0, **kwargs)
    np.testing.assert_allclose(double(layer(x)), expected, atol=1e-5)
    np.testing.assert_allclose(double(layer.eval()(x)), expected, atol=1e-5)


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
@pytest.mark.parametrize(
    'kwargs',
    [dict(), dict(stride=2, padding=1, output_padding=1), dict(dilation=2), dict(groups=2), dict(groups=4, stride=2)],
    ids=str,
)
def test_a_transposed_convolution_equals_the_reference(kwargs, groups):
    layer, x = quantized(nn.ConvTranspose2d(4, 8, 3, **kwargs), *settings_of(3, groups, 4)), image()
    expected = by_hand(layer, x, reference.conv_transpose2d, 2.5, 3.0, **kwargs)
    np.testing.assert_allclose(double(layer(x)), expected, atol=1e-5)


@pytest.mark.parametrize('shape', [(6, 7), (2, 5, 7), (2, 3, 4, 7)])
def test_a_linear_layer_equals_the_reference(shape):
    layer, x = quantized(nn.Linear(7, 5), *settings_of(3, 2, 4)), torch.randn(shape)
    expected = by_hand(layer, x, lambda x, weight, bias: x @ weight.T + bias, 2.5, 3.0)
    np.testing.assert_allclose(double(layer(x)), expected, atol=1e-5)


# ---- transposed convolutions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('name', TRANSPOSED)
def test_filters_and_set_filters_are_inverses(name, memory_format):
    layer = quantized(LAYERS[name]().to(memory_format=memory_format), *FLOAT)
    filters = layer.filters()
    assert len(filters) == layer.out_channels
    assert torch.equal(layer.set_filters(filters), layer.weight)


@pytest.mark.parametrize('name', TRANSPOSED)
def test_a_filter_of_a_transposed_convolution_makes_one_output_channel(name):
    layer, x = quantized(LAYERS[name](), *FLOAT), image()
    changed = layer(x)
    with torch.no_grad():
        filters = layer.filters().clone()
        filters[1] += 1
        layer.weight.copy_(layer.set_filters(filters))
    differs = (layer(x) != changed).flatten(2).any(2).any(0)
    assert differs.tolist() == [c == 1 for c in range(layer.out_channels)]


@pytest.mark.parametrize('name', TRANSPOSED)
def test_a_transposed_convolution_has_a_threshold_for_each_output_channel(name):
    layer = LAYERS[name]()
    scale = torch.logspace(-3, 3, layer.out_channels)
    new = quantized(layer, *bits(4, 32, groups='channel', options=dict(k=3.5)))
    with torch.no_grad():
        layer.weight.copy_(new.set_filters(new.filters() * scale[:, None, None, None]))
    _, weight, _ = new.operands(image())
    new.weight.data.copy_(weight)
    levels = [len(torch.unique(f)) for f in new.filters()]
    assert len(levels) == layer.out_channels and min(levels) > 5 and max(levels) <= 15


def test_a_transposed_convolution_takes_an_output_size():
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), image()
    new = quantized(layer, *FLOAT)
    assert torch.equal(new(x, output_size=[18, 14]), layer(x, output_size=[18, 14]))


# ---- in a hand-written model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('layer_type', [QuantConv2d, QuantConvTranspose2d, QuantLinear])
def test_a_layer_has_the_default_settings_without_a_dict(layer_type):
    assert layer_type(4, 6, *([] if layer_type is QuantLinear else [3])).bits == (4, 4)


def test_a_bad_dict_is_an_error():
    with pytest.raises(UserError, match=r'quantization\.weight\.bits=1'):
        QuantConv2d(4, 6, 3, quantization=dict(weight=dict(bits=1)))


def test_thresholds_start_from_the_first_training_batch():
    layer, x = QuantConv2d(4, 6, 3), image()
    assert not layer.weight_quant.calibrated and not layer.input_quant.calibrated
    layer.train()(x)
    assert layer.weight_quant.calibrated and layer.input_quant.calibrated and layer.input_quant.threshold > 0
    started = float(layer.input_quant.threshold)
    layer(10 * x)
    assert float(layer.input_quant.threshold) == started


def test_several_processes_do_not_start_thresholds_each_by_itself():
    def work(rank):
        with pytest.raises(UserError, match='a layer is not calibrated: each process would start its own threshold'):
            QuantConv2d(4, 6, 3).train()(image())

    on_two_ranks(work)


@pytest.mark.parametrize('options', [{}, dict(weight=dict(bits=32)), dict(activation=dict(bits=32))], ids=str)
def test_evaluating_an_uncalibrated_layer_is_an_error(options):
    with pytest.raises(UserError, match='has no threshold yet'):
        QuantConv2d(4, 6, 3, quantization=options).eval()(image())


def test_seen_tells_whether_a_batch_came_through():
    layer = quantized(nn.Conv2d(4, 6, 3), *bits(4))
    assert not layer.seen
    layer(image())
    assert layer.seen


def test_bits_are_32_when_calibration_did_not_reach_the_layer():
    layer, x = quantized(nn.Conv2d(4, 6, 3), *bits(4)), image()
    layer.weight_quant.set_state(stage=Stage.FLOAT)
    layer.input_quant.set_state(stage=Stage.FLOAT)
    assert layer.bits == (32, 32)
    assert torch.equal(layer.eval()(x), nn.functional.conv2d(x, layer.weight, layer.bias))


# ---- shared input quantizers ----------------------------------------------------------------------------------------


def shared_pair():
    owner, reader = (quantized(nn.Conv2d(4, 6, 3), *bits(4)) for _ in range(2))
    reader.share_input_quant(owner)
    return nn.ModuleDict(dict(owner=owner, reader=reader))


def test_a_shared_quantizer_is_saved_once_under_its_owner():
    pair = shared_pair()
    assert pair['reader'].input_quant is pair['owner'].input_quant
    keys = [key for key in pair.state_dict() if 'own_input_quant' in key]
    assert keys and all(key.startswith('owner.') for key in keys)


def test_a_copied_model_shares_its_own_quantizer():
    pair, x = shared_pair(), image()
    pair['owner'](x)
    other = copy.deepcopy(pair)
    assert other['reader'].input_quant is other['owner'].input_quant is not pair['owner'].input_quant
    assert torch.equal(other['reader'](x), pair['reader'](x))


def test_a_reader_of_a_reader_shares_the_quantizer_of_the_owner():
    pair, third = shared_pair(), quantized(nn.Conv2d(4, 6, 3), *bits(4))
    third.share_input_quant(pair['reader'])
    assert third.input_quant is pair['owner'].input_quant


# ---- memory format and precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [n for n in LAYERS if 'linear' not in n])
def test_channels_last_gives_the_same_result_and_gradient(name):
    layer, x = LAYERS[name](), image()
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    results = []
    for conv, memory_format in (layer, torch.contiguous_format), (other, torch.channels_last):
        new = quantized(conv, *bits(4, groups=2))
        out = new(x.to(memory_format=memory_format))
        out.square().sum().backward()
        results.append((out.detach(), new.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('name', LAYERS)
def test_bfloat16_autocast_is_close_and_its_gradient_finite(name):
    layer, x = quantized(LAYERS[name](), *bits(4)), image()
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).norm() / expected.norm()) < 0.02
    assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.dtype == torch.float32


def test_an_empty_batch_passes():
    layer = quantized(nn.Conv2d(4, 6, 3), *bits(4))
    layer(image())
    out = layer(torch.zeros(0, 4, 9, 7))
    out.sum().backward()
    assert out.shape == (0, 6, 7, 5) and torch.isfinite(layer.weight.grad).all()
