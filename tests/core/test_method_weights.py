"""Weights of the methods beside GDRQ against their papers' equations."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gdrq_mm.core.functional import power_of_two
from gdrq_mm.core.quantizers import WEIGHT_METHODS, Stage
from gdrq_mm.core.quantizers.gdrq import WEIGHT_K
from tests import reference
from tests import reference_methods as papers
from tests.core.builders import VALUES, double, frozen, gradients, levels_of, weight_quantizer

LAW = settings(deadline=None, max_examples=40)
WEIGHTS = hnp.arrays(np.float32, st.just((5, 2, 3, 3)) | st.just((4, 6)), elements=VALUES)
BITS = {name: [b for b in (1, 2, 3, 4, 8) if b in WEIGHT_METHODS[name].allowed_bits] for name in papers.WEIGHTS}
PAIRS = [(name, bits) for name, several in BITS.items() for bits in several]
NOT_UNIFORM = ('ttq', 'log2', 'lbw', 'inq')
"""Weights whose levels are not whole multiples of a step."""
OWN_GROUPS = ('syq', 'fgq')
"""They have scales for each place of the kernel, or for a few weights along the input channels."""
STRAIGHT = [('lbw', 2), ('lbw', 4), ('inq', 3), ('fgq', 2), ('loss_aware', 3), ('tsq', 2)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- weights: forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
@pytest.mark.parametrize(('method', 'bits'), PAIRS)
def test_quantized_weights_equal_the_paper(method, bits, groups):
    weight = torch.randn(10, 4, 3, 3) * 0.7 + 0.1
    quantizer = weight_quantizer(method, weight, bits, groups)
    out = quantizer(weight)
    function = functools.partial(papers.WEIGHTS[method], bits=bits)
    places = 1 if method in OWN_GROUPS else groups
    np.testing.assert_allclose(double(out), papers.by_groups(function, places, double(weight)), rtol=1e-5, atol=1e-6)
    assert torch.equal(out, quantizer.eval()(weight)), 'evaluation'
    assert torch.equal(out, frozen(quantizer, weight).train()(weight)), 'frozen'
    by_scale = out.flatten(2).permute(2, 0, 1) if method == 'syq' else out
    assert method == 'fgq' or levels_of(by_scale, 'channel' if method == 'syq' else groups) <= 2**bits


@pytest.mark.parametrize('method', papers.WEIGHTS)
def test_the_weights_of_a_linear_layer(method):
    weight, bits = torch.randn(6, 20), BITS[method][0]
    expected = {
        'syq': lambda w, bits: papers.syq_codes(w, bits) * np.abs(w).mean(),
    }.get(method, papers.WEIGHTS[method])
    out = weight_quantizer(method, weight, bits, groups=1)(weight)
    np.testing.assert_allclose(double(out), expected(double(weight), bits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('method', [name for name in papers.WEIGHTS if name not in NOT_UNIFORM])
@LAW
@given(weight=WEIGHTS, data=st.data(), groups=st.sampled_from([1, 2, 'channel']))
def test_codes_times_step_is_what_evaluation_returns(method, weight, data, groups):
    weight, bits = torch.from_numpy(weight), data.draw(st.sampled_from(BITS[method]))
    quantizer = weight_quantizer(method, weight, bits, groups).eval()
    with torch.no_grad():
        codes, step, out = quantizer.codes(weight), quantizer.step(weight), quantizer(weight)
    assert codes.dtype == torch.int8 and codes.min() >= quantizer.lo and codes.max() <= quantizer.hi
    assert torch.equal(codes * step, out) and torch.isfinite(out).all()


@pytest.mark.parametrize('method', [name for name in papers.WEIGHTS if name != 'dorefa'])
@LAW
@given(weight=WEIGHTS, exponent=st.integers(-6, 6), data=st.data())
def test_weights_of_another_scale_get_the_same_codes(method, weight, exponent, data):
    """Not those of DoReFa, whose tanh has a scale of its own."""
    weight, bits = torch.from_numpy(weight), data.draw(st.sampled_from(BITS[method]))
    scaled = weight * 2.0**exponent
    out = weight_quantizer(method, scaled, bits, groups=2)(scaled)
    torch.testing.assert_close(out, 2.0**exponent * weight_quantizer(method, weight, bits, groups=2)(weight))


@pytest.mark.parametrize('bits', range(2, 6))
def test_logarithmic_weights_are_powers_of_two(bits):
    weight = torch.randn(6, 3, 3, 3)
    out = weight_quantizer('log2', weight, bits, groups=2)(weight)
    exponents = np.log2(np.unique(np.abs(double(out)[out != 0])))
    assert np.array_equal(exponents, np.rint(exponents))
    codes = weight_quantizer('log2', weight, bits, groups=2).codes(weight)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 2 ** (bits - 1) - 1


def test_the_nearest_power_of_two_is_one():
    exponents = torch.arange(-60.0, 61)
    assert torch.equal(power_of_two(torch.exp2(exponents) * 1.4), torch.tensor([2.0**e for e in range(-60, 61)]))
    assert torch.equal(
        power_of_two(torch.exp2(exponents) * 1.42), torch.tensor([2.0 ** (e + 1) for e in range(-60, 61)])
    )
    assert power_of_two(torch.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize('groups', [1, 3])
def test_ternary_codes_carry_the_sign_of_a_scale(groups):
    weight = torch.randn(10, 4, 3, 3)
    quantizer = weight_quantizer('ttq', weight, 2, groups, t=0.3)
    codes, out = quantizer.codes(weight), quantizer.eval()(weight)
    assert codes.dtype == torch.int8 and torch.equal(codes, torch.sign(out).to(torch.int8))
    expected = papers.by_groups(lambda w: papers.ttq_weight(w, t=0.3), groups, double(weight))
    np.testing.assert_allclose(double(out), expected, rtol=1e-5)


@pytest.mark.parametrize('method', papers.WEIGHTS)
def test_a_dead_group_gives_no_nan(method):
    weight = torch.randn(6, 3, 3, 3)
    weight[2:4] = 0
    weight.requires_grad_()
    for bits in BITS[method]:
        weight.grad = None
        quantizer = weight_quantizer(method, weight, bits, groups=3)
        out = quantizer(weight)
        out.sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(weight.grad).all()
        assert all(torch.isfinite(parameter.grad).all() for parameter in quantizer.parameters())
        assert (method, bits) == ('syq', 1) or not out[2:4].any()  # a sign has no zero, and the layer one scale
        assert torch.equal(quantizer.eval()(weight), out) and torch.isfinite(frozen(quantizer, weight)(weight)).all()


@pytest.mark.parametrize('method', papers.WEIGHTS)
def test_a_layer_of_zeros_gives_zeros(method):
    weight = torch.zeros(4, 3, 3, 3)
    for bits in BITS[method]:
        assert torch.equal(weight_quantizer(method, weight, bits)(weight), weight)


@pytest.mark.parametrize(('method', 'groups'), [('dorefa', 1), ('lsq', 1), ('minmax', 10), ('ptq', 10), ('xnor', 10)])
def test_groups_are_those_of_the_paper_unless_they_are_given(method, groups):
    weight = torch.randn(10, 4, 3, 3)
    assert weight_quantizer(method, weight, BITS[method][0]).groups == groups
    assert weight_quantizer(method, weight, BITS[method][0], groups=3).groups == 3


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
@pytest.mark.parametrize(('method', 'start'), [('lsq', papers.lsq_start), ('lsq_plus', papers.lsq_plus_start)])
def test_a_learned_step_of_weights_starts_as_in_the_paper(method, start, groups):
    weight = torch.randn(10, 4, 3, 3) * 0.2 + 0.05
    step = weight_quantizer(method, weight, 4, groups).learned_step
    expected = papers.by_groups(lambda w: np.array([start(w, 4)]), groups, double(weight))
    np.testing.assert_allclose(double(step), expected, rtol=1e-5)


@pytest.mark.parametrize(('narrow', 'lo'), [(True, -7), (False, -8)])
def test_the_lowest_code_of_a_learned_step_is_the_papers_unless_it_is_left_out(narrow, lo):
    weight = torch.randn(5, 9)
    weight[0, 0] = -100
    quantizer = weight_quantizer('lsq', weight, 4, narrow_range=narrow)
    assert int(quantizer.codes(weight).min()) == lo
    assert int(weight_quantizer('lsq', weight, 4).codes(weight).min()) == -8


# ---- weights: gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize(('method', 'bits'), [('ptq', 3), ('lsq', 3), ('lsq_plus', 2)])
def test_weights_beyond_the_range_take_no_gradient(method, bits, groups, stage):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(method, weight, bits, groups)
    if stage == Stage.FREEZE:
        frozen(quantizer, weight)
    step = double(quantizer.step(weight))
    _, upstream, gradient = gradients(quantizer, weight)
    low, high = quantizer.lo * step, quantizer.hi * step
    inside = (double(weight) >= low) & (double(weight) <= high)
    np.testing.assert_array_equal(gradient, upstream * inside)
    assert 0.5 < inside.mean() < 1


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_nothing_is_beyond_the_largest_weight_until_it_is_frozen(bits):
    weight = torch.randn(50, 9)
    quantizer = weight_quantizer('minmax', weight, bits)
    _, upstream, gradient = gradients(quantizer, weight)
    np.testing.assert_array_equal(gradient, upstream)
    _, upstream, gradient = gradients(frozen(quantizer, 0.5 * weight), weight)
    largest = np.abs(double(weight)).max(1, keepdims=True)
    np.testing.assert_array_equal(gradient, upstream * (np.abs(double(weight)) <= 0.5 * largest))


@pytest.mark.parametrize(('method', 'bits'), [('balanced', 3), ('twn', 2), ('log2', 3), *STRAIGHT])
def test_a_straight_through_gradient_passes_everywhere(method, bits):
    weight = torch.randn(8, 3, 3, 3)
    _, upstream, gradient = gradients(weight_quantizer(method, weight, bits), weight)
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize('groups', [1, 2, 'channel'])
def test_the_gradient_of_dorefa_passes_through_tanh_and_the_maximum(groups):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer('dorefa', weight, 3, groups)
    _, upstream, gradient = gradients(quantizer, weight)
    scale = double(quantizer.step(weight)) * quantizer.hi
    expected = papers.by_groups(papers.dorefa_weight_gradient, groups, double(weight), upstream * scale)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('method', ['lsq', 'lsq_plus'])
@pytest.mark.parametrize(('bits', 'groups'), [(2, 1), (3, 2), (8, 'channel')])
def test_the_gradient_of_a_learned_step_of_weights(method, bits, groups):
    """Eq. 3 with N the weights of the group."""
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(method, weight, bits, groups)
    quantizer.learned_step.data *= 0.7  # with 8 bits the start clips nothing
    _, upstream, _ = gradients(quantizer, weight)
    parts = zip(*(np.array_split(a, quantizer.groups) for a in (double(weight), upstream)))
    for g, (w, grad) in enumerate(parts):
        step = float(quantizer.learned_step[g].detach())
        expected = papers.learned_step_gradient(w, step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, grad, w.size)
        assert float(quantizer.learned_step.grad[g]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize('groups', [1, 2])
def test_the_gradients_of_ttq(groups):
    """Eq. 7: the scales take those of their weights; Eq. 8: a weight's is multiplied by the scale of its side."""
    weight = torch.randn(8, 3, 3, 3) + 0.2
    quantizer = weight_quantizer('ttq', weight, 2, groups, t=0.2)
    _, upstream, gradient = gradients(quantizer, weight)
    expected = papers.by_groups(functools.partial(papers.ttq_weight_gradient, t=0.2), groups, double(weight), upstream)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    for g, (w, grad) in enumerate(zip(*(np.array_split(a, groups) for a in (double(weight), upstream)))):
        delta = 0.2 * np.abs(w).max()
        assert float(quantizer.positive.grad[g]) == pytest.approx(grad[w > delta].sum(), rel=1e-4)
        assert float(quantizer.negative.grad[g]) == pytest.approx(-grad[w < -delta].sum(), rel=1e-4)


@pytest.mark.parametrize('bits', [1, 2])
@pytest.mark.parametrize('shape', [(6, 3, 3, 3), (6, 20)])
def test_the_gradients_of_syq(bits, shape):
    weight = torch.randn(shape)
    quantizer = weight_quantizer('syq', weight, bits)
    _, upstream, gradient = gradients(quantizer, weight)
    w = double(weight).reshape(6, shape[1], -1) if len(shape) > 2 else double(weight)[..., None].reshape(6, 20, 1)
    grad, axes = upstream.reshape(w.shape), (0, 1)
    np.testing.assert_allclose(gradient.reshape(w.shape), grad * np.abs(w).mean(axes), rtol=1e-5)
    np.testing.assert_allclose(double(quantizer.alpha.grad), (grad * papers.syq_codes(w, bits)).sum(axes), rtol=1e-4)


@pytest.mark.parametrize('groups', ['channel', 1, 4])
def test_the_gradient_of_xnor(groups):
    weight = torch.randn(6, 3, 3, 3)
    _, upstream, gradient = gradients(weight_quantizer('xnor', weight, 1, groups=groups), weight)
    expected = papers.by_groups(papers.xnor_weight_gradient, groups, double(weight), upstream)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert 0 < (double(weight) > 1).mean() < 1


@pytest.mark.parametrize('method', ['lsq', 'lsq_plus', 'ttq', 'syq'])
def test_frozen_weights_keep_their_scales_and_give_zero_gradients(method):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = frozen(weight_quantizer(method, weight, 2), weight)
    before = quantizer(weight)
    for parameter in quantizer.parameters():
        parameter.data *= 1.5
    assert torch.equal(quantizer(weight), before)
    gradients(quantizer, weight)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in quantizer.parameters())


# ---- LSQ with the start of Scale-Clip -------------------------------------------------------------------------------


def learned(weight, bits=4, groups=1):
    return weight_quantizer('lsq', weight, bits, groups, start='scale_clip', narrow_range=True)


def test_a_learned_step_may_start_from_scale_clip():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = learned(weight, groups=2)
    expected = reference.scale_clip_threshold(double(weight), WEIGHT_K[4], 2) / 7
    np.testing.assert_allclose(quantizer.learned_step.detach(), expected, rtol=1e-5)


def test_a_step_that_starts_from_scale_clip_does_not_reach_beyond_the_largest_weight():
    """As GDRQ's own k: a uniform distribution ends at twice its mean."""
    weight = torch.linspace(-1, 1, 640).view(8, 80)
    expected = weight_quantizer('gdrq', weight, 4, 1).threshold
    assert expected < 1.1
    torch.testing.assert_close(learned(weight).threshold, expected)


def test_a_step_that_starts_from_scale_clip_has_the_gradient_of_lsq():
    weight = torch.randn(8, 3, 3, 3)
    upstream = torch.randn(8, 3, 3, 3)
    quantizer = learned(weight, 3, groups=2)
    quantizer(weight).backward(upstream)
    for g in (0, 1):
        w, grad = double(weight)[4 * g : 4 * g + 4], double(upstream)[4 * g : 4 * g + 4]
        step = float(quantizer.learned_step[g])
        expected = reference.lsq_step_gradient(w, step, 3, grad)
        assert float(quantizer.learned_step.grad[g]) == pytest.approx(expected, rel=1e-4)
        assert expected != 0


def test_a_step_that_starts_from_scale_clip_masks_the_gradient_of_clipped_weights():
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    learned(weight, 3)(weight).sum().backward()
    inside = reference.inside_range(double(weight), WEIGHT_K[3] * np.abs(double(weight)).mean(), 3)
    assert torch.equal(weight.grad, torch.from_numpy(inside).float())


def test_the_gradient_of_a_step_from_scale_clip_is_zero_when_it_is_frozen():
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    quantizer = frozen(learned(weight), weight)
    quantizer(weight).sum().backward()
    assert torch.equal(quantizer.learned_step.grad, torch.zeros(1))
