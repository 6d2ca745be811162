"""All methods in small networks: zeros at the start, several ranks, training, freezing."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import cross_entropy

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.layers import QuantConv2d
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS, Stage, learned_parameters
from gdrq_mm.core.quantizers.gdrq import GDRQActivation, GDRQWeight
from gdrq_mm.core.step import after_step, set_stage
from gdrq_mm.core.topology import record
from tests import reference_methods as papers
from tests.core.builders import (
    ACTIVATIONS,
    activation_quantizer,
    double,
    everywhere,
    few_bits,
    inputs,
    move,
    on_two_ranks,
    weight_quantizer,
)
from tests.helpers import Block


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- zeros at the start ---------------------------------------------------------------------------------------------


def fit(quantizer, value, target, parameters):
    """The squared error after gradient descent, as a share of that of zeros."""
    optimizer = torch.optim.SGD([*parameters, *quantizer.parameters()], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(value()) - target).square().mean().backward()
        optimizer.step()
        if getattr(quantizer, 'follows', False):
            move(quantizer)
    return float((quantizer(value()) - target).square().mean() / target.square().mean())


@pytest.mark.parametrize('range', ['auto', 'zero_point'])
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_a_branch_that_is_zero_at_first_learns(method, range):
    """OpenMMLab's ResNets start residual branches at zero: a threshold that stays zero would keep them there."""
    quantizer = activation_quantizer(method, torch.zeros(4, 8), bits=4, range=range)
    x, scale = torch.relu(torch.randn(64, 8)).clamp(max=0.9), torch.full((8,), 0.0, requires_grad=True)
    assert fit(quantizer, lambda: x * scale, x, [scale]) < 0.75


CONSTANT = ('dorefa', 'balanced', 'ptq')
"""Weights whose scale stays that of the checkpoint: none for zeros."""


@pytest.mark.parametrize('method', [name for name in WEIGHT_METHODS if name not in CONSTANT])
def test_weights_that_are_zero_at_first_learn(method):
    """The last layers of some heads and the offsets of deformable layers start at zero."""
    weight, target = torch.zeros(4, 16, requires_grad=True), torch.randn(4, 16)
    quantizer = weight_quantizer(method, weight, few_bits(method))
    assert fit(quantizer, lambda: weight, target, [weight]) < 0.75


def test_a_step_that_starts_from_scale_clip_starts_above_zero_too():
    weight, target = torch.zeros(4, 16, requires_grad=True), torch.randn(4, 16)
    quantizer = weight_quantizer('lsq', weight, 4, start='scale_clip')
    assert fit(quantizer, lambda: weight, target, [weight]) < 0.75


@pytest.mark.parametrize('method', ['ptq', 'lsq_plus'])
def test_every_rank_finds_the_same_threshold(method):
    """Each has batches of its own."""
    batches = [inputs('unsigned', 40, 6), 2 * inputs('unsigned', 60, 6)]

    def work(rank):
        model = nn.Sequential(nn.Linear(6, 6))
        quantize_model(nn.Sequential(model), Quantization.from_dict(everywhere(method, method)))
        calibrate(model, [batches[rank]])
        return float(model[0].input_quant.step())

    found = on_two_ranks(work)
    assert found[0] == found[1]
    expected = papers.best_threshold(double(torch.cat(batches)), 'unsigned', 4)
    assert found[0] == pytest.approx(expected / 15, rel=1e-5)


def test_the_samples_of_calibration_are_those_of_the_operand():
    """A block adds in place to the tensor that an observer has just let through."""
    model = nn.Sequential(Block(), Block(), nn.Conv2d(4, 4, 1)).eval()
    x, seen = torch.randn(2, 4, 8, 8), []
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization.from_dict(dict(method='ptq')), plan)
    quantizer = model[0].bn2.output_quant
    quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for each in activation_quantizers(model).values():
        each.set_state(stage=Stage.OBSERVE)
    for layer in quant_layers(model).values():
        layer.weight_quant.set_state(stage=Stage.OBSERVE)
    model(x)
    assert torch.equal(quantizer.samples, seen[0].flatten())


# ---- a small network ------------------------------------------------------------------------------------------------


NETWORKS = {
    **{name: everywhere(*sides) for name, sides in METHODS.items()},
    'GDRQ weights, PACT activations': everywhere('gdrq', 'pact'),
    'LSQ weights in 4 groups': everywhere('lsq', 'lsq', groups=4),
    'HWGQ with binary weights': everywhere('xnor', 'hwgq'),
}


def problem():
    """Pictures of a bright quadrant in noise, and which one it is."""
    labels = torch.arange(48) % 4
    x = torch.randn(48, 3, 8, 8)
    for picture, label in zip(x, labels.tolist()):
        picture[:, label // 2 * 4 : label // 2 * 4 + 4, label % 2 * 4 : label % 2 * 4 + 4] += 1.5
    return x, labels


def network(activation):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        activation(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        activation(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


@pytest.mark.parametrize('name', NETWORKS)
def test_a_quantized_network_learns(name):
    settings_ = NETWORKS[name]
    model, (x, labels) = network(nn.SiLU if name == 'lsq_plus' else nn.ReLU), problem()
    quantize_model(model, Quantization.from_dict(settings_))
    calibrate(model, [x[:24], x[24:]])
    methods = settings_['weight']['method'], settings_['activation']['method']
    layers = quant_layers(model).values()
    assert {type(layer.weight_quant) for layer in layers} == {WEIGHT_METHODS[methods[0]]}
    assert {type(layer.input_quant) for layer in layers} == {ACTIVATION_METHODS[methods[1]]}
    assert {layer.bits for layer in layers} == {(few_bits(methods[0]), few_bits(methods[1], ACTIVATION_METHODS))}
    if 'groups' in settings_['weight']:
        assert [layer.weight_quant.groups for layer in layers] == [4, 4, 4]
    learned = learned_parameters(model)
    parameters = dict(model.named_parameters())
    assert set(learned) == {n for n, m in parameters.items() if '_quant.' in n}
    start = {name: parameters[name].detach().clone() for name in learned}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, taken = [], dict.fromkeys(learned, False)
    for _ in range(40):
        loss = cross_entropy(model(x), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        for name in learned:
            assert torch.isfinite(parameters[name].grad).all()
            taken[name] |= bool(parameters[name].grad.any())
        optimizer.step()
        after_step(model)
    assert losses[-1] < 0.5 * losses[0]
    moved = {name: not torch.equal(parameters[name].detach(), start[name]) for name in learned}
    expected = {name: not name.endswith('beta') or learned[name].kind == 'zero_point' for name in learned}
    assert taken == moved == expected
    with torch.no_grad():
        assert float(cross_entropy(model.eval()(x), labels)) < 0.7 * losses[0]


def test_after_a_step_the_codes_are_those_of_the_learned_offset():
    """What is merged and exported reads them."""
    model = nn.Sequential(nn.SiLU(), nn.Conv2d(3, 4, 3))
    quantize_model(model, Quantization.from_dict(everywhere('lsq_plus', 'lsq_plus')))
    calibrate(model, [torch.randn(4, 3, 8, 8)])
    quantizer = model[1].input_quant
    before = quantizer.lo, quantizer.hi
    quantizer.beta.data -= 2 * quantizer.learned_step.data
    after_step(model)
    assert (quantizer.lo, quantizer.hi) == (before[0] - 2, before[1] - 2)


@pytest.mark.parametrize('method', METHODS)
def test_a_layer_of_a_handwritten_model_trains_and_freezes(method):
    """Its thresholds start in the first training forward, within the graph of that."""
    settings_ = NETWORKS[method]
    layer = QuantConv2d(3, 4, 3, quantization={k: v for k, v in settings_.items() if k != 'overrides'}).train()
    x = inputs('unsigned', 2, 3, 8, 8)
    layer(x).sum().backward()
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    copied = copy.deepcopy(layer)
    set_stage(nn.Sequential(layer), Stage.FREEZE)
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
    learned = learned_parameters(layer)
    assert not any(dict(layer.named_parameters())[name].grad.any() for name in learned)
    assert layer.weight.grad.any() and torch.equal(layer(x), copied(x))


# ---- a method of one's own ------------------------------------------------------------------------------------------


class OwnWeight(GDRQWeight):
    def current_threshold(self, weight):
        return self.sizes * 0 + 0.01


class OwnActivation(GDRQActivation):
    def measure(self, x):
        return x.sum() * 0 + 3, 1


def test_a_threshold_of_ones_own_is_used_in_training_too():
    """The kernels compute k * mean themselves, for all layers at once."""
    model, x = Block().train(), torch.randn(2, 4, 8, 8)
    quantize_model(model, Quantization.from_dict(everywhere('gdrq', 'gdrq')), record(model, lambda: model(x)))
    calibrate(model, [x])
    layer = model.conv2
    layer.weight_quant.__class__, layer.own_input_quant.__class__ = OwnWeight, OwnActivation
    layer.own_input_quant.threshold.zero_()
    out = []
    layer.register_forward_hook(lambda module, args, y: out.append(y))
    model(x).sum().backward()
    after_step(model)
    assert torch.equal(out[0], torch.zeros_like(out[0]))  # of an input whose T is 0
    q = layer.own_input_quant
    torch.testing.assert_close(q.threshold, q.options.momentum * q.k * 3)
    model(x)
    assert 0 < out[1].abs().max() <= 9 * 4 * 0.01 * q.threshold * 1.001
