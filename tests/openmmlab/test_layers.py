"""gdrq_mm/openmmlab/layers.py: mmcv's layer classes, and our layers by name in a model config."""

from itertools import pairwise

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, build_activation_layer, build_conv_layer
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers

from gdrq_mm.core.attention import Projection
from gdrq_mm.core.config import Activation, Weight
from gdrq_mm.core.layers import QUANTIZED, QuantConv2d
from gdrq_mm.core.topology import record
from gdrq_mm.openmmlab import QuantRunner  # noqa: F401  registers the layers
from tests.helpers import Function, conv

LAYERS = {
    'convolution': (wrappers.Conv2d, nn.Conv2d, (4, 6, 3)),
    'transposed': (wrappers.ConvTranspose2d, nn.ConvTranspose2d, (4, 6, 3)),
    'linear': (wrappers.Linear, nn.Linear, (7, 5)),
}
"""A class of mmcv, that of torch, and arguments."""
ADAPTIVE = {
    'stride': lambda: Conv2dAdaptivePadding(4, 6, (3, 2), stride=2),
    'dilated': lambda: Conv2dAdaptivePadding(4, 6, 3, dilation=2, groups=2),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantized(layer, bits):
    return QUANTIZED[type(layer)].from_float(layer, Weight(bits=bits), Activation(bits=bits))


def image():
    return torch.randn(2, 4, 9, 7)


@pytest.mark.parametrize('bits', [2, 4, 32])
@pytest.mark.parametrize('name', LAYERS)
def test_a_layer_of_mmcv_is_quantized_as_that_of_torch(name, bits):
    mmcv_class, torch_class, args = LAYERS[name]
    theirs, ours = mmcv_class(*args), torch_class(*args)
    ours.load_state_dict(theirs.state_dict())
    new, other = quantized(theirs, bits), quantized(ours, bits)
    assert type(new) is type(other) and new.weight is theirs.weight and new.bias is theirs.bias
    x = image()
    assert torch.equal(new(x), other(x)) and torch.equal(new.eval()(x), other.eval()(x))


@pytest.mark.parametrize('name', ADAPTIVE)
def test_adaptive_padding(name):
    layer, x = ADAPTIVE[name](), image().requires_grad_()
    new = quantized(layer, 32)
    assert torch.equal(new.train()(x), layer(x)) and torch.equal(new.eval()(x), layer(x))
    assert new.weight is layer.weight and new.bias is layer.bias
    expected = layer(x)
    errors = [float((quantized(layer, n)(x) - expected).norm() / expected.norm()) for n in (2, 4, 6, 8)]
    assert errors[0] < 1 and all(after < before / 2 for before, after in pairwise(errors))
    new = quantized(layer, 4)
    new(x).square().sum().backward()
    assert all(torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0 for t in (new.weight, new.bias, x))


def test_the_class_is_a_direct_child_of_its_torch_class():
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, Projection)
    assert all(new.__bases__[-1] in kinds for new in QUANTIZED.values())


@pytest.mark.parametrize('name', ['GDRQConv2d', 'gdrq_mm.core.layers.QuantConv2d'])
def test_mmcv_builds_the_convolution_by_name(name):
    options = dict(weight=dict(bits=2, groups=3), activation=dict(bits=5))
    layer = build_conv_layer(dict(type=name, quantization=options), 4, 6, 3, padding=1, bias=False)
    assert type(layer) is QuantConv2d and layer.bits == (2, 5) and layer.weight_quant.groups == 3
    assert layer(image()).shape == (2, 6, 9, 7) and layer.bias is None


def test_a_conv_module_takes_the_convolution():
    cfg = dict(type='GDRQConv2d', quantization=dict(weight=dict(bits=2)))
    module = ConvModule(4, 6, 3, conv_cfg=cfg, norm_cfg=dict(type='BN'))
    module.init_weights()
    assert module.conv.bits == (2, 4) and torch.isfinite(module(image())).all()


def test_swish_of_mmcv_is_an_activation_function():
    act = build_activation_layer(dict(type='Swish'))
    model = Function(lambda m, x: m.act(m.bn(m.a(x))), a=conv(), bn=nn.BatchNorm2d(4), act=act)
    x = torch.randn(1, 4, 8, 8)
    assert record(model, lambda: model(x)).activated == ['bn']
