"""gdrq_mm/core/quantizers/: GDRQ's quantizers of weights and activations against the NumPy reference."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.quantizers import GDRQActivation, GDRQWeight, Stage
from gdrq_mm.core.quantizers.following import collected, move_thresholds
from gdrq_mm.core.quantizers.gdrq import ACTIVATION_K, SEARCH_INTERVAL, WEIGHT_K
from tests import reference

LAW = settings(deadline=None, max_examples=60)
VALUES = st.floats(-10, 10, width=32, allow_subnormal=False)
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=VALUES)
SOURCES = ['scale_clip', 'search', 'learned']


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight_quantizer(weight, bits=4, groups=1, stage=Stage.QUANTIZE, **options):
    """Calibrated on `weight`, in training mode."""
    quantizer = GDRQWeight(bits, len(weight), groups, **options)
    quantizer.calibrate(weight.detach())
    quantizer.set_state(stage=stage)
    return quantizer


def activation_quantizer(*batches, bits=4, stage=Stage.QUANTIZE, **options):
    """Calibrated on `batches`, in training mode."""
    quantizer = GDRQActivation(bits, **options)
    quantizer.set_state(stage=Stage.OBSERVE)
    for batch in batches:
        quantizer(batch)
    quantizer.calibrate(quantizer.observed())
    quantizer.set_state(stage=stage)
    return quantizer


def double(x):
    return x.detach().double().numpy()


def thresholds_of(weight, k, groups):
    groups = len(weight) if groups == 'channel' else min(groups, len(weight))
    return reference.scale_clip_threshold(double(weight), k, groups)


# ---- weights: forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('groups', [1, 4, 'channel', 50])
@pytest.mark.parametrize('narrow', [True, False])
def test_quantized_weights_equal_the_reference(bits, groups, narrow):
    weight = torch.randn(10, 3, 3, 3)
    quantizer = weight_quantizer(weight, bits, groups, k=2.5, narrow_range=narrow).eval()
    expected = reference.quantize_groups(double(weight), thresholds_of(weight, 2.5, groups), bits, narrow)
    np.testing.assert_allclose(quantizer(weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('groups, count', [(1, 1), (4, 4), ('channel', 10), (50, 10)])
def test_there_are_at_most_as_many_thresholds_as_filters(groups, count):
    quantizer = GDRQWeight(4, 10, groups)
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
    assert GDRQWeight(bits, 4).k == WEIGHT_K[bits] and GDRQWeight(bits, 4, k=1.25).k == 1.25


@pytest.mark.parametrize('bits', range(2, 9))
def test_the_full_range_has_the_step_of_the_narrow_one(bits):
    weight = torch.randn(4, 3, 3, 3)
    narrow, full = (weight_quantizer(weight, bits, narrow_range=narrow).step(weight) for narrow in (True, False))
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
@given(weight=WEIGHTS, bits=st.integers(2, 8), groups=st.integers(1, 5), narrow=st.booleans())
def test_codes_times_step_is_what_evaluation_returns(source, weight, bits, groups, narrow):
    weight = torch.from_numpy(weight)
    quantizer = weight_quantizer(weight, bits, groups, threshold=source, narrow_range=narrow).eval()
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
    activation_quantizer(x)(x)
    assert torch.equal(weight, kept[0]) and torch.equal(x, kept[1])


# ---- weights: gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
@pytest.mark.parametrize('narrow', [True, False])
def test_masked_gradient_is_exact_and_the_threshold_takes_none(stage, narrow):
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    upstream = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, 3, groups=2, k=1.5, narrow_range=narrow, stage=stage)
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
    quantizer.set_state(stage=Stage.FREEZE)
    assert float(quantizer(2 * weight).max()) == pytest.approx(thresholds_of(weight, 2.0, 1)[0], rel=1e-5)


# ---- weights: searched and learned thresholds -----------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 4])
def test_search_finds_the_threshold_of_least_loss_in_each_group(bits):
    weight = torch.randn(9, 4, 3, 3)
    quantizer = weight_quantizer(weight, bits, groups=2, threshold='search')
    for g, filters in enumerate((double(weight)[:5], double(weight)[5:])):
        best = reference.search_threshold(filters, bits, 64)
        assert float(quantizer.threshold[g]) == pytest.approx(best, rel=1e-5)


def test_search_runs_again_once_in_an_interval():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, threshold='search')
    first = quantizer.threshold.clone()
    for step in range(SEARCH_INTERVAL - 1):
        quantizer.after_step(2 * weight, step)
    assert torch.equal(quantizer.threshold, first)
    quantizer.after_step(2 * weight, SEARCH_INTERVAL - 1)
    assert torch.equal(quantizer.threshold, 2 * first)


def test_a_learned_step_starts_from_scale_clip():
    weight = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, groups=2, k=2.0, threshold='learned')
    np.testing.assert_allclose(quantizer.learned_step.detach(), thresholds_of(weight, 2.0, 2) / 7, rtol=1e-5)


def test_the_gradient_of_a_learned_step_is_that_of_lsq():
    weight = torch.randn(8, 3, 3, 3)
    upstream = torch.randn(8, 3, 3, 3)
    quantizer = weight_quantizer(weight, 3, groups=2, k=1.5, threshold='learned')
    quantizer(weight).backward(upstream)
    for g in (0, 1):
        w, grad = double(weight)[4 * g : 4 * g + 4], double(upstream)[4 * g : 4 * g + 4]
        step = float(quantizer.learned_step[g])
        expected = reference.lsq_step_gradient(w, step, 3, grad)
        assert float(quantizer.learned_step.grad[g]) == pytest.approx(expected, rel=1e-4)
        assert expected != 0


def test_a_learned_step_masks_the_gradient_of_clipped_weights():
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    weight_quantizer(weight, 3, k=1.5, threshold='learned')(weight).sum().backward()
    inside = reference.inside_range(double(weight), thresholds_of(weight, 1.5, 1)[0], 3)
    assert torch.equal(weight.grad, torch.from_numpy(inside).float())


def test_the_gradient_of_a_learned_step_is_zero_when_it_is_frozen():
    weight = torch.randn(8, 3, 3, 3, requires_grad=True)
    quantizer = weight_quantizer(weight, threshold='learned', stage=Stage.FREEZE)
    quantizer(weight).sum().backward()
    assert torch.equal(quantizer.learned_step.grad, torch.zeros(1))


# ---- activations: calibration ---------------------------------------------------------------------------------------

INPUTS = {
    'relu': (torch.relu, 'unsigned'),
    'gaussian': (lambda x: x, 'signed'),
    'leaky_relu': (lambda x: nn.functional.leaky_relu(3 * x, 0.1), 'signed'),
    'silu': (nn.functional.silu, 'zero_point'),
    'gelu': (nn.functional.gelu, 'zero_point'),
}


@pytest.mark.parametrize('name', INPUTS)
def test_calibration_decides_the_range(name):
    function, kind = INPUTS[name]
    assert activation_quantizer(function(torch.randn(4, 8, 16, 16))).kind == kind


@pytest.mark.parametrize('kind', ['unsigned', 'signed', 'zero_point'])
def test_a_given_range_is_kept(kind):
    assert activation_quantizer(torch.randn(4, 8, 16, 16), range=kind).kind == kind


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('name', INPUTS)
def test_the_threshold_starts_at_k_times_the_mean_but_not_beyond_the_largest_value(name, bits):
    x = INPUTS[name][0](torch.randn(4, 8, 16, 16))
    k = ACTIVATION_K[INPUTS[name][1]][bits]
    expected = min(k * np.abs(double(x)).mean(), np.abs(double(x)).max())
    assert float(activation_quantizer(x, bits=bits).threshold) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('k', [0.5, 2.0, 50.0])
def test_a_given_k_is_used_as_it_is(k):
    x = torch.randn(4, 8, 16, 16)
    assert float(activation_quantizer(x, k=k).threshold) == pytest.approx(k * np.abs(double(x)).mean(), rel=1e-5)


def test_calibration_weighs_every_element_the_same():
    batches = torch.rand(1, 8, 4, 4), 10 * torch.rand(5, 8, 4, 4)
    mean = np.abs(double(torch.cat(batches))).mean()
    assert float(activation_quantizer(*batches, k=2.0).threshold) == pytest.approx(2 * mean, rel=1e-5)


def test_the_summary_of_calibration_adds_up_over_batches():
    quantizer = GDRQActivation(4)
    quantizer.set_state(stage=Stage.OBSERVE)
    assert quantizer.observed().tolist() == [0, 0, 0, -np.inf, -np.inf]
    for batch in torch.tensor([1.0, -2.0, 0.0]), torch.tensor([4.0]):
        quantizer(batch)
    assert quantizer.observed().tolist() == [7, 4, 3, 2, 4]  # sum|x|, count, non-zeros, -min, max


def test_the_mean_may_leave_out_zeros():
    x = torch.relu(torch.randn(4, 8, 16, 16))
    quantizer = activation_quantizer(x, k=2.0, mean='nonzero')
    assert float(quantizer.threshold) == pytest.approx(2 * double(x)[double(x) > 0].mean(), rel=1e-5)


@pytest.mark.parametrize('k', [0.5, 1.0, 2.0])
def test_a_zero_point_range_on_positive_inputs_has_the_least_zero_point(k):
    assert activation_quantizer(torch.full((2, 3), 5.0), k=k, range='zero_point').lo == -1


def test_observing_passes_values_and_calibrates_nothing():
    quantizer = GDRQActivation(4)
    quantizer.set_state(stage=Stage.OBSERVE)
    x = torch.randn(2, 3)
    assert quantizer(x) is x and not quantizer.calibrated


# ---- activations: forward and gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('name', INPUTS)
def test_quantized_activations_and_their_gradient_equal_the_reference(name, bits):
    x = INPUTS[name][0](torch.randn(2, 8, 9, 7)).requires_grad_()
    upstream = torch.randn(2, 8, 9, 7)
    quantizer = activation_quantizer(x.detach(), bits=bits, k=2.0)
    signed, z = quantizer.kind == 'signed', -quantizer.lo if quantizer.kind == 'zero_point' else 0
    out = quantizer(x)
    out.backward(upstream)
    threshold = 2 * np.abs(double(x)).mean()
    np.testing.assert_allclose(
        double(out), reference.quantize(double(x), threshold, bits, signed, zero_point=z), rtol=1e-5, atol=1e-6
    )
    inside = reference.inside_range(double(x), threshold, bits, signed, zero_point=z)
    assert torch.equal(x.grad, upstream * torch.from_numpy(inside).float())


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_a_straight_through_gradient_of_activations_passes_everywhere(stage):
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    upstream = torch.randn(2, 8, 9, 7)
    activation_quantizer(x.detach(), k=1.0, gradient='straight_through', stage=stage)(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize('name', INPUTS)
def test_reshape_clips_activations_without_rounding(name):
    x = INPUTS[name][0](torch.randn(2, 8, 9, 7))
    out = activation_quantizer(x, bits=2, k=1.5, stage=Stage.RESHAPE)(x)
    threshold = 1.5 * np.abs(double(x)).mean()
    np.testing.assert_allclose(double(out), np.clip(double(x), -threshold, threshold), rtol=1e-5)


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('name', ['silu', 'gelu'])
def test_a_zero_point_range_contains_zero_and_reaches_the_minimum(name, bits):
    x = INPUTS[name][0](torch.randn(4, 8, 16, 16))
    quantizer = activation_quantizer(x, bits=bits).eval()
    assert quantizer(torch.zeros(5)).tolist() == [0] * 5
    assert quantizer.hi - quantizer.lo == 2**bits - 1
    assert float(x.min()) == pytest.approx(float(quantizer.lo * quantizer.step()), abs=float(quantizer.step()))


def test_an_empty_tensor_passes_and_leaves_no_trace():
    empty = torch.zeros(0, 4, 3, 3)
    assert GDRQActivation(4).eval()(empty) is empty
    assert not GDRQActivation(4).train()(empty).numel()
    quantizer = activation_quantizer(empty)
    assert not quantizer.calibrated
    quantizer = activation_quantizer(torch.randn(2, 4), k=2.0)
    quantizer(empty)
    assert collected([quantizer]).tolist() == [[0, 0]]


def test_an_all_zero_tensor_gives_zero_and_finite_gradients():
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    quantizer = activation_quantizer(x.detach())
    out = quantizer(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4, 3, 3)) and torch.isfinite(x.grad).all()
    assert torch.equal(quantizer(torch.randn(3)), torch.zeros(3))  # T = 0 until it moves


# ---- activations: the running threshold -----------------------------------------------------------------------------


def test_one_update_takes_all_forwards_of_an_optimizer_step():
    quantizer = activation_quantizer(torch.randn(4, 3, 5, 5), k=3.0, momentum=0.25)
    start = float(quantizer.threshold)
    batches = torch.randn(2, 3, 5, 5), 5 * torch.randn(6, 3, 5, 5), torch.randn(1, 3, 2, 2)
    for batch in batches:
        quantizer(batch)
        assert float(quantizer.threshold) == start  # constant within the step
    move_thresholds([quantizer], collected([quantizer]))
    expected = reference.running_threshold(start, 3.0, 0.25, [double(b) for b in batches])
    assert float(quantizer.threshold) == pytest.approx(expected, rel=1e-5)


def test_an_update_starts_the_statistics_anew():
    quantizer = activation_quantizer(torch.randn(4, 3, 5, 5))
    quantizer(torch.randn(4, 3, 5, 5))
    move_thresholds([quantizer], collected([quantizer]))
    assert collected([quantizer]).tolist() == [[0, 0]]


def test_an_update_without_a_forward_leaves_the_threshold():
    quantizer = activation_quantizer(torch.randn(4, 3, 5, 5))
    start = float(quantizer.threshold)
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.threshold) == start


def test_thresholds_move_together_as_each_would_alone():
    def made():
        settings = dict(k=3.0, momentum=0.25), dict(mean='nonzero'), dict(momentum=0.5), dict(k=2.0)
        quantizers = [activation_quantizer(torch.linspace(-1, 2, 50), **setting) for setting in settings]
        for number, quantizer in enumerate(quantizers[:3]):  # nothing comes through the last
            quantizer(torch.linspace(0, 1 + number, 70).relu())
        return quantizers

    alone, together = made(), made()
    for quantizer in alone:
        move_thresholds([quantizer], collected([quantizer]))
    move_thresholds(together, collected(together))
    starts = [quantizer.threshold for quantizer in made()]
    moved = [not torch.equal(q.threshold, start) for q, start in zip(together, starts)]
    assert moved == [True, True, True, False]
    assert [q.threshold.tolist() for q in together] == [q.threshold.tolist() for q in alone]


@pytest.mark.parametrize('scale', [0.1, 10.0])
def test_the_running_threshold_converges_to_k_times_the_mean(scale):
    quantizer = activation_quantizer(torch.ones(8), k=3.0, momentum=0.1)
    distances = []
    for _ in range(100):
        quantizer(torch.full((8,), scale))
        move_thresholds([quantizer], collected([quantizer]))
        distances.append(abs(float(quantizer.threshold) - 3 * scale))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 * scale * 3


def test_the_running_mean_may_leave_out_zeros():
    quantizer = activation_quantizer(torch.rand(8), k=2.0, momentum=1.0, mean='nonzero')
    x = torch.tensor([0.0, 0.0, 1.0, 2.0])
    quantizer(x)
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.threshold) == 3.0


def test_all_zeros_leave_a_threshold_of_nonzero_means():
    quantizer = activation_quantizer(torch.rand(8), k=2.0, momentum=1.0, mean='nonzero')
    start = float(quantizer.threshold)
    quantizer(torch.zeros(8))
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.threshold) == start


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_training_forwards_are_tracked(stage):
    quantizer = activation_quantizer(torch.randn(8), stage=stage)
    quantizer(torch.tensor([1.0, -2.0, 0.0]))
    assert collected([quantizer]).tolist() == [[3, 3]]


def test_nothing_is_tracked_in_evaluation():
    quantizer = activation_quantizer(torch.randn(8)).eval()
    quantizer(torch.randn(8))
    assert collected([quantizer]).tolist() == [[0, 0]]


@pytest.mark.parametrize('stage', [Stage.OBSERVE, Stage.FREEZE, Stage.FLOAT])
def test_nothing_is_tracked_in_other_stages(stage):
    quantizer = activation_quantizer(torch.randn(8), stage=stage)
    quantizer(torch.randn(8))
    assert collected([quantizer]).tolist() == [[0, 0]]


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_recomputed_segment_is_tracked_once(use_reentrant):
    quantizer = activation_quantizer(torch.randn(8), k=2.0)
    runs = []

    def segment(x):
        runs.append(1)
        return quantizer(x).square()

    x = torch.randn(8, requires_grad=True)
    checkpoint(segment, x, use_reentrant=use_reentrant).sum().backward()
    assert len(runs) == 2 and collected([quantizer])[0, 1] == 8


def test_tracking_takes_no_gradient():
    quantizer = activation_quantizer(torch.randn(8))
    quantizer(torch.randn(8, requires_grad=True))
    assert not collected([quantizer]).requires_grad


# ---- stages, state, precision ---------------------------------------------------------------------------------------


def test_a_float_stage_passes_values_through():
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    for quantizer, value in (GDRQWeight(4, 4), weight), (GDRQActivation(4), x):
        assert quantizer.bits_in_use == 4
        quantizer.set_state(stage=Stage.FLOAT)
        assert quantizer.train()(value) is value and quantizer.eval()(value) is value
        assert quantizer.bits_in_use == 32


@pytest.mark.parametrize('quantizer', [GDRQWeight(4, 4), GDRQActivation(4)], ids=['weight', 'activation'])
def test_evaluating_without_a_threshold_is_an_error_that_names_the_layer(quantizer):
    quantizer.name = 'backbone.conv1'
    with pytest.raises(UserError, match=r'layer backbone\.conv1 has no threshold'):
        quantizer.eval()(torch.randn(4, 3))


@pytest.mark.parametrize('source', SOURCES)
def test_weight_thresholds_start_from_the_first_training_forward(source):
    weight = torch.randn(4, 3)
    fresh = GDRQWeight(4, 4, 1, threshold=source).train()
    assert torch.equal(fresh(weight), weight_quantizer(weight, threshold=source)(weight)) and fresh.calibrated


def test_an_activation_threshold_starts_from_the_first_training_forward():
    x = torch.randn(2, 3, 4, 4)
    fresh = GDRQActivation(4).train()
    assert torch.equal(fresh(x), activation_quantizer(x)(x)) and fresh.calibrated


@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE, Stage.FREEZE])
def test_the_state_of_a_weight_quantizer_survives_a_checkpoint(source, stage):
    weight = torch.randn(6, 3, 3, 3)
    saved = weight_quantizer(weight, 3, groups=2, threshold=source, stage=stage, narrow_range=False)
    loaded = GDRQWeight(3, 6, 2, threshold=source)
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.stage, loaded.calibrated, loaded.lo, loaded.hi) == (stage, True, -4, 3)
    assert torch.equal(loaded.threshold, saved.threshold)
    assert torch.equal(loaded.eval()(weight), saved.eval()(weight))


@pytest.mark.parametrize('name', INPUTS)
def test_the_state_of_an_activation_quantizer_survives_a_checkpoint(name):
    x = INPUTS[name][0](torch.randn(4, 8, 16, 16))
    saved = activation_quantizer(x, stage=Stage.FREEZE)
    loaded = GDRQActivation(4)
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.stage, loaded.calibrated, loaded.lo, loaded.hi) == (Stage.FREEZE, True, saved.lo, saved.hi)
    assert loaded.kind == saved.kind and float(loaded.k) == float(saved.k) > 0
    assert torch.equal(loaded.eval()(x), saved.eval()(x))


@pytest.mark.parametrize('quantizer', [GDRQWeight(4, 4, threshold='learned'), GDRQActivation(4)], ids=['weight', 'act'])
def test_a_float_checkpoint_loads_strictly(quantizer):
    quantizer.load_state_dict({}, strict=True)
    assert not quantizer.calibrated


def test_the_parameters_of_a_layer_are_still_missed():
    layer = nn.Sequential(nn.Linear(3, 4), GDRQActivation(4))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight", "0\.bias"\.'):
        layer.load_state_dict({}, strict=True)


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_autocast_changes_nothing_for_float32(stage):
    weight, x = torch.randn(8, 3, 3, 3), torch.randn(2, 3, 9, 9)
    quantizers = weight_quantizer(weight, groups=4, stage=stage), activation_quantizer(x, stage=stage)
    expected = quantizers[0](weight), quantizers[1](x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(quantizers[0](weight), expected[0]) and torch.equal(quantizers[1](x), expected[1])


def test_bfloat16_inputs_are_quantized_in_float32():
    x = torch.randn(2, 3, 9, 9).bfloat16()
    quantizer = activation_quantizer(x.float())
    with torch.autocast('cpu', torch.bfloat16):
        out = quantizer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, quantizer(x.float()).bfloat16())


def test_the_gradient_of_bfloat16_inputs_is_masked_in_float32():
    x = torch.linspace(0.9, 1.1, 500).bfloat16().requires_grad_()
    quantizer = activation_quantizer(torch.ones(8), k=1.005)  # bfloat16 has 1 and 1.0078
    quantizer(x).sum().backward()
    assert torch.equal(x.grad.float(), (x.detach().float() <= 1.005).float())


def test_bfloat16_inputs_are_tracked_in_float32():
    quantizer = activation_quantizer(torch.rand(8))
    quantizer(torch.full((100_000,), 1.0, dtype=torch.bfloat16))
    assert collected([quantizer]).tolist() == [[100_000, 100_000]]
