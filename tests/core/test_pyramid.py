"""`activation.per_level`: a threshold for each pyramid level in the layers that a head shares between them."""

import copy

import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.topology import record
from gdrq_mm.report.layers import layer_table
from tests.helpers import Function, conv

SCALES = (1.0, 3.0, 0.2)


def head_forward(head, levels):
    """Two branches that read each level, as RetinaNet's head."""
    return [(head.cls(head.cls_conv(x)), head.reg(head.reg_conv(x))) for x in levels]


def model_of(per_level=True, **settings):
    torch.manual_seed(0)
    head = Function(head_forward, cls_conv=conv(), reg_conv=conv(), cls=conv(), reg=conv())
    model = Function(lambda m, x: m.head([scale * y for y in [m.stem(x)] for scale in SCALES]), stem=conv(), head=head)
    x = torch.randn(2, 4, 8, 8)
    config = Quantization.from_dict(dict(activation=dict(per_level=per_level), **settings))
    report = quantize_model(model, config, record(model, lambda: model(x)))
    return model, x, report


def test_each_level_has_the_threshold_of_its_own_values():
    model, x, _ = model_of()
    calibrate(model, [x])
    layer = model.head.cls_conv
    thresholds = torch.stack([quant.threshold for quant in layer.input_quant])
    # At 4 bits the default k is the same for all levels, capped at max/mean, which scaling does not change.
    torch.testing.assert_close(thresholds, thresholds[0] * torch.tensor(SCALES))
    one, _, _ = model_of(per_level=False)
    calibrate(one, [x])
    assert one.head.cls_conv.input_quant.threshold.dim() == 0
    assert thresholds[2] < one.head.cls_conv.input_quant.threshold < thresholds[1]


def test_a_level_is_quantized_with_its_own_threshold():
    """The levels differ by a scale only, so the outputs do too, whatever the scale is."""
    model, x, _ = model_of()
    calibrate(model, [x])
    model.eval()
    first, *others = model(x)
    for scale, other in zip(SCALES[1:], others):
        for one, another in zip(first, other):
            torch.testing.assert_close(another, scale * one)
    shared, _, _ = model_of(per_level=False)
    calibrate(shared, [x])
    first, *others = shared.eval()(x)
    assert not torch.allclose(others[1][0], SCALES[2] * first[0], rtol=0.1)


def test_the_level_starts_anew_with_each_forward_of_the_head():
    model, x, _ = model_of()
    calibrate(model, [x])
    model.eval()
    first = model(x)
    model.head.cls_conv.pyramid_level = 7  # a forward that an error ended
    again = model(x)
    assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))


@pytest.mark.parametrize('count', [1, 2, 4])
def test_another_number_of_levels_is_an_error(count):
    model, x, _ = model_of()
    calibrate(model, [x])
    with pytest.raises(
        UserError, match=r'layer head.cls_conv has thresholds for 3 pyramid levels, but was called \d times'
    ):
        model.head([x] * count)


def test_readers_of_a_level_share_its_quantizer():
    model, *_ = model_of(deployable=True)
    assert model.head.reg_conv.input_quant is model.head.cls_conv.input_quant
    assert model.head.cls.input_quant is not model.head.reg.input_quant
    own, _, _ = model_of(deployable=False)
    assert own.head.reg_conv.input_quant is not own.head.cls_conv.input_quant


def test_gradients_averages_and_checkpoints():
    model, x, report = model_of()
    calibrate(model, [x])
    sum(a.sum() + b.sum() for a, b in model(x)).backward()
    assert all(layer.weight.grad is not None for layer in quant_layers(model).values())
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), model_of()[0]):
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for p, q in zip(expected, other.eval()(x)) for a, b in zip(p, q))
    names = [name for name in activation_quantizers(model) if name.startswith('head.cls_conv')]
    assert names == [f'head.cls_conv.own_input_quant.{level}' for level in range(3)]
    assert activation_quantizers(model)[names[1]].name == 'head.cls_conv.1'
    (row,) = [line for line in layer_table(model, report).splitlines() if line.startswith('head.cls_conv ')]
    assert 'signed, 3 pyramid levels' in row


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing_is_refused(use_reentrant):
    """A level that is computed again in the backward pass would take the quantizer of the last level."""
    model, x, _ = model_of()
    calibrate(model, [x])
    layer = model.head.cls_conv
    forward, compute_again = layer.forward, torch.utils.checkpoint.checkpoint
    layer.forward = lambda x: compute_again(forward, x, use_reentrant=use_reentrant)
    out = sum(a.sum() + b.sum() for a, b in model.train()(x.requires_grad_()))
    with pytest.raises(UserError, match='per_level does not go with activation checkpointing'):
        out.backward()


def test_layers_that_are_called_once_are_left_alone():
    model, x, _ = model_of()
    assert model.stem.input_quant.threshold.dim() == 0
    once = Function(lambda m, x: m.b(m.a(x)), a=conv(), b=nn.Conv2d(4, 2, 1))
    quantize_model(once, Quantization.from_dict(dict(activation=dict(per_level=True))), record(once, lambda: once(x)))
    assert len(activation_quantizers(once)) == 2
