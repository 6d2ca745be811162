"""Values near the ends of float32, and zeros, give no NaN: thresholds stay finite, and nothing is divided by zero."""

import math

import pytest
import torch

import gdrq_mm.core.functional as F
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, WEIGHT_METHODS
from tests.core.builders import activation_quantizer, few_bits, gradients, move, weight_quantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ('dtype', 'threshold', 'x'), [(torch.bfloat16, 2.797, 300.0), (torch.float32, 1.7, 1e8), (torch.float16, 0.3, 6e4)]
)
def test_a_value_clipped_straight_through_is_the_threshold_itself(dtype, threshold, x):
    values = torch.tensor([x, -x, 0.1], dtype=dtype, requires_grad=True)
    threshold = torch.tensor(threshold)
    clipped = F.clip(values, threshold, 'straight_through')
    assert clipped.tolist() == [float(threshold.to(dtype)), -float(threshold.to(dtype)), float(values[2])]
    clipped.sum().backward()
    assert values.grad.tolist() == [1, 1, 1]
    low = F.clip(values, threshold, 'straight_through', torch.tensor(-0.25))
    assert float(low[1]) == -0.25 and low.dtype == dtype


@pytest.mark.parametrize('method', WEIGHT_METHODS)
@pytest.mark.parametrize('size', [1e30, 3e36, 3e37, 1.1e38])
def test_huge_weights_have_finite_thresholds_and_values(method, size):
    weight = size * torch.randn(8, 16, 3, 3).clamp(-3, 3)
    quantizer = weight_quantizer(method, weight, few_bits(method))
    assert bool(torch.isfinite(quantizer.threshold).all()) and bool(torch.isfinite(quantizer(weight)).all())
    if size < 1e37 and method not in ('dorefa', 'balanced', 'log2', 'lbw', 'inq'):  # the others do the same at any size
        small = weight_quantizer(method, weight / size, few_bits(method))
        torch.testing.assert_close(quantizer(weight).detach() / size, small(weight / size).detach())


@pytest.mark.parametrize('method', ACTIVATION_METHODS)
@pytest.mark.parametrize('size', [1e30, 1e35, 3e37])
def test_huge_activations_have_finite_thresholds_and_values(method, size):
    x = size * torch.randn(4, 16, 9, 9).clamp(-3, 3)
    quantizer = activation_quantizer(method, x)
    out = quantizer(x)
    if quantizer.follows:
        before = float(quantizer.threshold)
        move(quantizer)
        assert math.isclose(float(quantizer.threshold), before, rel_tol=0.1), 'T follows, with the right sum'
    assert math.isfinite(float(quantizer.threshold)) and bool(torch.isfinite(out).all())


@pytest.mark.parametrize('value', [math.inf, math.nan])
def test_calibration_on_values_that_are_not_finite_is_an_error(value):
    with pytest.raises(UserError, match='inputs in calibration that are not finite'):
        activation_quantizer('gdrq', torch.tensor([1.0, value]))


def test_an_input_that_is_infinite_still_shows_in_the_threshold():
    quantizer = activation_quantizer('gdrq', torch.rand(10))
    quantizer(torch.tensor([1.0, math.inf]))
    move(quantizer)
    assert not math.isfinite(float(quantizer.threshold))


@pytest.mark.parametrize('groups', [1, 4, 'channel'])
@pytest.mark.parametrize('method', WEIGHT_METHODS)
def test_filters_of_zeros_divide_by_nothing(method, groups, monkeypatch):
    weight = torch.randn(4, 3, 3, 3)
    weight[:2] = 0
    if groups == 1:
        weight.zero_()
    divisors = []
    divide = torch.Tensor.__truediv__
    monkeypatch.setattr(torch.Tensor, '__truediv__', lambda a, b: divisors.append(b) or divide(a, b))
    quantizer = weight_quantizer(method, weight, few_bits(method), groups)
    out, _, grad = gradients(quantizer, weight)
    monkeypatch.undo()
    assert not [d for d in divisors if isinstance(d, torch.Tensor) and bool((d == 0).any())]
    assert bool(torch.isfinite(torch.as_tensor(out)).all()) and bool(torch.isfinite(torch.as_tensor(grad)).all())


@pytest.mark.parametrize('method', ['lsq', 'syq', 'ttq'])
def test_what_is_learned_of_filters_of_zeros_does_not_start_at_zero(method):
    """From there it would never learn."""
    quantizer = weight_quantizer(method, torch.zeros(4, 3, 3, 3), few_bits(method))
    assert all(bool((parameter > 0).all()) for parameter in quantizer.parameters())
    assert list(quantizer.parameters())


@pytest.mark.parametrize('method', WEIGHT_METHODS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_weights_have_the_codes_of_the_same_weights_in_float32(method, dtype):
    half = (0.1 * torch.randn(8, 16, 3, 3)).to(dtype)
    most = WEIGHT_METHODS[method].allowed_bits[-1]
    quantizer = weight_quantizer(method, half.float(), most)
    one, other = (quantizer.round(weight, quantizer.step(weight)).float() for weight in (half, half.float()))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
