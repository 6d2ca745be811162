"""GDRQ's weights against the NumPy reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.quantizers.gdrq import INTERVAL, WEIGHT_K, WEIGHT_K_WITHOUT_ZERO, GDRQWeight
from tests import reference
from tests.core import builders
from tests.core.builders import VALUES, activation_quantizer, double

LAW = settings(deadline=None, max_examples=60)
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=VALUES)
SOURCES = ['scale_clip', 'search']


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight_quantizer(weight, bits=4, groups=1, **options):
    """GDRQ's, started from `weight`."""
    return builders.weight_quantizer('gdrq', weight, bits, groups, **options)


def thresholds_of(weight, k, groups):
    groups = len(weight) if groups == 'channel' else min(groups, len(weight))
    return reference.scale_clip_threshold(double(weight), k, groups)


# ---- weights: forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('groups', [1, 4, 'channel', 50])
@pytest.mark.parametrize('narrow', [True, False])
def test_quantized_weights_equal_the_reference(bits, groups, narrow):
    weight = torch.randn(10, 3, 3, 3)
    quantizer = weight_quantizer(weight, bits, groups, k=2.5, levels='narrow' if narrow else 'full').eval()
    expected = reference.quantize_groups(double(weight), thresholds_of(weight, 2.5, groups), bits, narrow)
    np.testing.assert_allclose(quantizer(weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('groups, count', [(1, 1), (4, 4), ('channel', 10), (50, 10)])
def test_there_are_at_most_as_many_thresholds_as_filters(groups, count):
    quantizer = GDRQWeight(4, (10, 3), groups)
    assert quantizer.groups == count and quantizer.threshold.shape == (count,)


def test_one_group_equals_per_tensor():
    weight = torch.randn(6, 2, 3, 3)
    per_tensor = weight_quantizer(weight.reshape(1, -1), groups='channel')(weight.reshape(1, -1))
    assert torch.equal(weight_quantizer(weight, groups=1)(weight), per_tensor.reshape(weight.shape))


def test_a_group_depends_on_its_own_filters_only():
    weight = torch.randn(6, 2, 3, 3)
    other = weight.clone()
    other[3:] *= 10
    quantizer = weight_quantizer(weight, groups=2)
    assert torch.equal(quantizer(weight)[:3], quantizer(other)[:3])


@pytest.mark.parametrize('bits', range(2, 9))
def test_k_depends_on_the_bits_unless_it_is_given(bits):
    assert GDRQWeight(bits, (4, 3), levels='narrow').k == WEIGHT_K[bits]
    assert GDRQWeight(bits, (4, 3), k=1.25).k == 1.25


@LAW
@given(
    weight=WEIGHTS, bits=st.integers(2, 8), groups=st.integers(1, 5), levels=st.sampled_from(['narrow', 'full', None])
)
def test_by_default_some_weight_has_the_outer_level(weight, bits, groups, levels):
    weight = torch.from_numpy(weight)
    quantizer = weight_quantizer(weight, bits, groups, levels=levels)
    if quantizer.step(weight).max() > 0:
        assert quantizer.codes(weight).abs().max() >= quantizer.hi


def test_a_default_k_reaches_the_largest_weight_of_nearly_uniform_ones():
    weight = torch.rand(8, 3, 3, 3) * 2 - 1
    quantizer = weight_quantizer(weight, 4, groups=2)
    ratios = [w.abs().max() / w.abs().mean() for w in weight.chunk(2)]
    assert float(quantizer.k) == pytest.approx(float(max(ratios)) * 7 / 6.55, rel=1e-5) and quantizer.k < 2.5
    weight[0, 0, 0, 0] = 100  # a weight that grew
    for step in range(INTERVAL):
        assert quantizer.k < 2.5
        quantizer.after_step(weight, step)
    assert quantizer.k == WEIGHT_K[4]


@pytest.mark.parametrize(
    'options, k', [(dict(k=1.0), 1.0), (dict(k=6.0), 6.0), (dict(clip='project'), WEIGHT_K[4])], ids=str
)
def test_a_k_stays_that_is_given_and_one_that_ends_the_weights(options, k):
    """Projected weights end at T: with a k that follows the largest of them it would only ever fall."""
    weight = torch.rand(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, 4, **options)
    quantizer.after_step(weight, INTERVAL - 1)
    assert quantizer.k == k


@pytest.mark.parametrize('bits', range(2, 9))
def test_the_full_range_has_the_step_of_the_narrow_one(bits):
    weight = torch.randn(4, 3, 3, 3)
    narrow, full = (weight_quantizer(weight, bits, levels=levels).step(weight) for levels in ('narrow', 'full'))
    assert torch.allclose(narrow, full, rtol=1e-6)


def test_a_dead_group_gives_zero_and_finite_gradients():
    weight = torch.randn(4, 3, 3, 3)
    weight[2:] = 0
    weight.requires_grad_()
    out = weight_quantizer(weight, groups=2)(weight)
    out.sum().backward()
    assert torch.equal(out[2:], torch.zeros(2, 3, 3, 3)) and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize('source', SOURCES)
@LAW
@given(
    weight=WEIGHTS, bits=st.integers(2, 8), groups=st.integers(1, 5), levels=st.sampled_from(['narrow', 'full', None])
)
def test_codes_times_step_is_what_evaluation_returns(source, weight, bits, groups, levels):
    weight = torch.from_numpy(weight)
    quantizer = weight_quantizer(weight, bits, groups, threshold=source, levels=levels).eval()
    with torch.no_grad():
        codes, step, out = quantizer.codes(weight), quantizer.step(weight), quantizer(weight)
    assert codes.dtype == torch.int8 and codes.min() >= quantizer.lo and codes.max() <= quantizer.hi
    assert torch.equal(codes * step, out)


@pytest.mark.parametrize('source', SOURCES)
def test_training_and_evaluation_see_the_same_weights(source):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, groups=4, threshold=source)
    assert torch.equal(quantizer.train()(weight), quantizer.eval()(weight))


def test_the_input_is_left_as_it_was():
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 4, 4)
    kept = weight.clone(), x.clone()
    weight_quantizer(weight)(weight)
    activation_quantizer('gdrq', x)(x)
    assert torch.equal(weight, kept[0]) and torch.equal(x, kept[1])


def test_a_trained_weight_keeps_its_k_whatever_the_default_becomes(monkeypatch):
    weight = torch.randn(6, 3, 3, 3)
    trained = weight_quantizer(weight, groups=2)
    monkeypatch.setitem(WEIGHT_K, 4, 2.0)
    other = GDRQWeight(4, weight.shape, 2)
    assert other.k == 2
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.eval()(weight), trained.eval()(weight))


# ---- weights: levels without a zero ----------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 3])
@pytest.mark.parametrize('groups', [1, 4, 'channel'])
def test_levels_without_a_zero_equal_the_reference(bits, groups):
    weight = torch.randn(10, 3, 3, 3)
    quantizer = weight_quantizer(weight, bits, groups, k=1.5, levels='without_zero').eval()
    thresholds = thresholds_of(weight, 1.5, groups)
    index = reference.groups_of(10, len(thresholds))
    expected = [
        reference.quantize_without_zero(filters, thresholds[g], bits) for filters, g in zip(double(weight), index)
    ]
    np.testing.assert_allclose(quantizer(weight), expected, rtol=1e-5, atol=1e-6)
    assert set(quantizer.codes(weight).unique().tolist()) == set(range(1 - 2**bits, 2**bits, 2))


@pytest.mark.parametrize('bits', [2, 3])
def test_masked_gradient_without_a_zero_passes_in_the_outer_cells_too(bits):
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    upstream = torch.randn(8, 3, 3, 3)
    weight_quantizer(weight, bits, k=1.5, levels='without_zero')(weight).backward(upstream)
    inside = reference.inside_without_zero(double(weight), thresholds_of(weight, 1.5, 1)[0], bits)
    assert torch.equal(weight.grad, upstream * torch.from_numpy(inside).float()) and 0 < inside.mean() < 1


def test_two_bits_have_four_levels_by_default():
    weight = torch.randn(64, 3, 3, 3)
    default, full = weight_quantizer(weight, 2), weight_quantizer(weight, 2, levels='full')
    assert default.k == WEIGHT_K_WITHOUT_ZERO[2] and default.codes(weight).unique().tolist() == [-3, -1, 1, 3]
    assert full.codes(weight).unique().tolist() == [-2, -1, 0, 1]
    assert weight_quantizer(weight, 3).codes(weight).unique().tolist() == list(range(-3, 4))
    assert weight_quantizer(weight, 2, levels='narrow').codes(weight).unique().tolist() == [-1, 0, 1]


@LAW
@given(weight=WEIGHTS, bits=st.integers(2, 3), groups=st.integers(1, 5))
def test_a_negative_weight_has_the_negative_of_a_level(weight, bits, groups):
    """So batch normalization with a negative gamma is merged by changing signs."""
    weight = torch.from_numpy(weight)
    quantizer = weight_quantizer(weight, bits, groups, levels='without_zero')
    cells = weight / (2 * quantizer.step(weight))
    middle = cells != cells.round()  # a weight between two cells goes up
    assert torch.equal(quantizer(weight)[middle], -quantizer(-weight)[middle])


def test_uniform_weights_lose_less_without_a_zero():
    """12.0 dB against 9.5: the share of the signal that is lost, by 2 bits at the best step."""
    weight = torch.rand(4, 4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lost = {}
    for levels in ('narrow', 'without_zero'):
        quantizer = weight_quantizer(weight, 2, threshold='search', levels=levels)
        lost[levels] = float((quantizer(weight) - weight).square().mean() / weight.square().mean())
    decibels = {name: -10 * np.log10(value) for name, value in lost.items()}
    assert decibels['without_zero'] == pytest.approx(12.0, abs=0.1)
    assert decibels['narrow'] == pytest.approx(9.5, abs=0.1)


# ---- weights: gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
@pytest.mark.parametrize('narrow', [True, False])
def test_masked_gradient_is_exact_and_the_threshold_takes_none(stage, narrow):
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    upstream = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, 3, groups=2, k=1.5, levels='narrow' if narrow else 'full', stage=stage)
    quantizer(weight).backward(upstream)
    thresholds = thresholds_of(weight, 1.5, 2)
    halves = [reference.inside_range(double(weight)[4 * g : 4 * g + 4], thresholds[g], 3, True, narrow) for g in (0, 1)]
    assert torch.equal(weight.grad, upstream * torch.from_numpy(np.concatenate(halves)).float())
    assert 0 < np.mean(halves) < 1


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_straight_through_gradient_passes_everywhere(stage):
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    upstream = torch.randn(8, 3, 3, 3)
    weight_quantizer(weight, k=1.5, gradient='straight_through', stage=stage)(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


# ---- weights: reshape and projection --------------------------------------------------------------------------------


def test_reshape_clips_without_rounding():
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    out = weight_quantizer(weight, 2, k=1.5, stage=Stage.RESHAPE)(weight)
    out.sum().backward()
    threshold = thresholds_of(weight, 1.5, 1)[0]
    np.testing.assert_allclose(double(out), np.clip(double(weight), -threshold, threshold), rtol=1e-6)
    assert torch.equal(weight.grad, (weight.detach().abs() <= threshold).float())
    assert len(torch.unique(out)) > 100


def test_reshape_leaves_the_forward_pass_to_projection():
    weight = torch.randn(8, 3, 3, 3)
    assert weight_quantizer(weight, clip='project', stage=Stage.RESHAPE)(weight) is weight


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_projection_clips_the_stored_weights_to_the_threshold_of_their_group(stage):
    weight = torch.randn(7, 3, 3, 3)
    quantizer = weight_quantizer(weight, groups=3, k=1.5, clip='project', stage=stage)
    limit = thresholds_of(weight, 1.5, 3)[reference.groups_of(7, 3)][:, None, None, None]
    expected = np.clip(double(weight), -limit, limit)
    np.testing.assert_allclose(quantizer.after_step(weight, 0), expected, rtol=1e-6)


def test_clipping_on_the_way_in_leaves_the_stored_weights_alone():
    weight = torch.randn(8, 3, 3, 3)
    assert weight_quantizer(weight, clip='forward').after_step(weight, 0) is None


@pytest.mark.parametrize('stage', [Stage.OBSERVE, Stage.FREEZE, Stage.FLOAT])
def test_projection_stops_outside_reshape_and_quantize(stage):
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, clip='project', stage=stage)
    before = quantizer.threshold.clone()
    assert quantizer.after_step(2 * weight, 0) is None and torch.equal(quantizer.threshold, before)


@pytest.mark.parametrize('k, sigmas', [(2.0, 1.47), (1.5, 0.89), (0.8, 0.0)])
def test_repeated_projection_of_a_gaussian_converges(k, sigmas):
    weight = 3 * torch.randn(1, 100_000)  # sigma 3
    quantizer = weight_quantizer(weight, k=k, clip='project', stage=Stage.RESHAPE)
    for step in range(60):
        weight = quantizer.after_step(weight, step)
    assert float(quantizer.threshold) / 3 == pytest.approx(sigmas, abs=0.01)
    assert float(weight.abs().max()) == pytest.approx(float(quantizer.threshold), rel=1e-4)


def test_the_threshold_follows_the_weights_until_it_is_frozen():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, k=2.0)
    assert torch.equal(quantizer(2 * weight), 2 * quantizer(weight))
    quantizer.freeze(weight)
    assert float(quantizer(2 * weight).max()) == pytest.approx(thresholds_of(weight, 2.0, 1)[0], rel=1e-5)


# ---- weights: searched thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 4])
def test_search_finds_the_threshold_of_least_loss_in_each_group(bits):
    weight = torch.randn(9, 4, 3, 3)
    for levels, quantize in (('narrow', reference.quantize), ('without_zero', reference.quantize_without_zero)):
        if bits > 3 and levels == 'without_zero':
            continue
        quantizer = weight_quantizer(weight, bits, groups=2, threshold='search', levels=levels)
        for g, filters in enumerate((double(weight)[:5], double(weight)[5:])):
            best = reference.search_threshold(filters, bits, 64, quantize=quantize)
            assert float(quantizer.threshold[g]) == pytest.approx(best, rel=1e-5)


def test_search_runs_again_once_in_an_interval():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, threshold='search')
    first = quantizer.threshold.clone()
    for step in range(INTERVAL - 1):
        quantizer.after_step(2 * weight, step)
    assert torch.equal(quantizer.threshold, first)
    quantizer.after_step(2 * weight, INTERVAL - 1)
    assert torch.equal(quantizer.threshold, 2 * first)
