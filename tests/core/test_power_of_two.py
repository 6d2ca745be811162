"""The option power_of_two: every step is a power of two, so multiplying by it is a shift."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, WEIGHT_METHODS, Stage
from gdrq_mm.core.step import after_step
from tests import reference
from tests import reference_methods as papers
from tests.core.builders import KINDS, activation_quantizer, double, everywhere, frozen, gradients, inputs, move
from tests.core.builders import weight_quantizer as weights

OF_WEIGHTS = ('gdrq', 'minmax', 'lsq', 'lsq_plus', 'ptq', 'loss_aware')
OF_ACTIVATIONS = ('gdrq', 'minmax', 'lsq', 'ptq', 'pact')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def is_power_of_two(steps):
    exponents = np.log2(double(steps))
    return np.array_equal(exponents, np.rint(exponents))


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('method', OF_WEIGHTS)
def test_the_step_of_weights_is_the_power_of_two_of_the_paper(method, bits):
    weight = torch.randn(6, 4, 3, 3) * 0.3
    plain, other = (weights(method, weight, bits, 3, power_of_two=on) for on in (False, True))
    expected = [papers.fixed_point_step(s, up=method == 'minmax') for s in double(plain.step(weight)).ravel()]
    step = other.step(weight)
    np.testing.assert_array_equal(double(step).ravel(), expected)
    assert is_power_of_two(step) and not is_power_of_two(plain.step(weight))
    assert torch.equal(other(weight), other.codes(weight) * step)
    assert torch.equal(frozen(other, weight)(weight), other.codes(weight) * step)
    if method == 'minmax':
        assert (double(weight - other(weight)) <= double(step) / 2).all(), 'nothing is clipped'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', OF_ACTIVATIONS)
def test_the_step_of_activations_is_one_while_the_threshold_goes_on(method, kind):
    x = inputs(kind)
    plain, other = (activation_quantizer(method, x, power_of_two=on) for on in (False, True))
    if kind != 'zero_point':  # there the zero point fits the step in use
        expected = papers.fixed_point_step(float(plain.step()), up=method == 'minmax')
        assert float(other.step()) == expected and torch.equal(other.threshold, plain.threshold)
    out = other(3 * x)
    codes = double(out) / double(other.step())
    assert is_power_of_two(other.step()) and np.array_equal(codes, np.rint(codes))
    assert codes.min() >= other.lo and codes.max() == other.hi
    if other.follows:
        before = float(other.threshold)
        move(other)
        assert before < float(other.threshold) < 2 * before
    saved = {key: value.clone() for key, value in other.state_dict().items()}
    assert all(torch.equal(value, saved[key]) for key, value in other.state_dict().items()), 'saving moves nothing'
    out = other(x)
    assert torch.equal(frozen(other)(x), out)


@pytest.mark.parametrize('method', OF_ACTIVATIONS)
def test_the_zero_point_is_that_of_the_step_in_use(method):
    """Nothing is clipped below."""
    for scale in (0.5, 0.6, 0.7, 0.8):
        x = scale * inputs('zero_point', 2000)
        quantizer = activation_quantizer(method, x, bits=7, range='zero_point', power_of_two=True)
        assert quantizer.lo < -2
        step = float(quantizer.step().detach())
        assert 2 * float(x.min()) - step < quantizer.lo * step < float(x.min()) + 0.51 * step


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_a_learned_step_takes_its_gradient_straight_through(stage):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weights('lsq', weight, 3, power_of_two=True)
    step = float(quantizer.step(weight)[0].detach())
    assert step != float(quantizer.learned_step.detach())
    if stage == Stage.FREEZE:
        frozen(quantizer, weight)
    _, upstream, _ = gradients(quantizer, weight)
    expected = papers.learned_step_gradient(double(weight), step, -4, 3, upstream, weight.numel())
    found = float(quantizer.learned_step.grad)
    assert found == (pytest.approx(expected, rel=1e-4) if stage == Stage.QUANTIZE else 0)
    assert expected != 0


def test_scale_clip_clips_at_the_threshold_in_use():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weights('gdrq', weight, 4, 1, Stage.RESHAPE, power_of_two=True, clip='project', k=2.0)
    limit = 7 * papers.fixed_point_step(reference.scale_clip_threshold(double(weight), 2.0, 1)[0] / 7, up=False)
    assert float(quantizer.after_step(weight, 0).abs().max()) == limit


@pytest.mark.parametrize(
    ('weight', 'activation'),
    [(name, name if name in OF_ACTIVATIONS else 'minmax') for name in OF_WEIGHTS] + [('minmax', 'pact')],
)
def test_a_network_learns_with_it_and_its_layers_are_shifted(weight, activation):
    """In a forward of the whole model weights are quantized together."""
    settings = everywhere(weight, activation)
    for side, method in (('weight', weight), ('activation', activation)):
        settings[side][method] = dict(power_of_two=True)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    quantize_model(model, Quantization.from_dict(settings))
    x, target = torch.randn(8, 3, 8, 8), torch.randn(8, 2, 4, 4)
    calibrate(model, [x])
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model.train()(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        after_step(model)
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < 0.95 * losses[0]
    for layer in quant_layers(model).values():
        assert is_power_of_two(layer.weight_quant.step(layer.filters())) and is_power_of_two(layer.input_quant.step())
    with torch.no_grad():
        expected = x
        for each in model.eval():
            expected = each(expected)
        assert torch.equal(model(x), expected)


def test_other_methods_refuse_it_in_one_line():
    others = [('weight', name) for name in WEIGHT_METHODS if name not in OF_WEIGHTS]
    others += [('activation', name) for name in ACTIVATION_METHODS if name not in OF_ACTIVATIONS]
    assert ('activation', 'lsq_plus') in others
    for side, name in others:
        with pytest.raises(UserError, match=f"quantization.{side}.{name} has no key 'power_of_two'") as error:
            Quantization.from_dict({side: {name: dict(power_of_two=True)}})
        assert '\n' not in str(error.value)
