"""GDRQ's activations against the NumPy reference."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.quantizers.following import collected
from gdrq_mm.core.quantizers.gdrq import ACTIVATION_K, GDRQActivation
from tests import reference
from tests.core.builders import activation_quantizer, double, move


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def nonzero_mean(x):
    """mean(|x|) of the values that are not zero."""
    values = np.abs(double(x.detach()))
    return values[values > 0].mean()


# ---- activations: calibration ---------------------------------------------------------------------------------------

INPUTS = {
    'relu': (torch.relu, 'unsigned'),
    'gaussian': (lambda x: x, 'signed'),
    'leaky_relu': (lambda x: nn.functional.leaky_relu(3 * x, 0.1), 'zero_point'),
    'silu': (nn.functional.silu, 'zero_point'),
    'sum_of_silu': (lambda x: nn.functional.silu(5 * x) + nn.functional.silu(-5 * x.flip(0)), 'zero_point'),
    'hardswish': (lambda x: nn.functional.hardswish(3 * x), 'zero_point'),
    'gelu': (nn.functional.gelu, 'zero_point'),
}


@pytest.mark.parametrize('name', INPUTS)
def test_calibration_decides_the_range(name):
    function, kind = INPUTS[name]
    assert activation_quantizer('gdrq', function(torch.randn(4, 8, 16, 16))).kind == kind


def test_a_few_large_values_do_not_make_a_tail_short():
    x = torch.randn(4, 8, 16, 16)
    assert activation_quantizer('gdrq', torch.where(x > 3, 100.0, x)).kind == 'signed'


@pytest.mark.parametrize('kind', ['unsigned', 'signed', 'zero_point'])
def test_a_given_range_is_kept(kind):
    assert activation_quantizer('gdrq', torch.randn(4, 8, 16, 16), range=kind).kind == kind


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('name', INPUTS)
def test_the_threshold_starts_at_k_times_the_mean_but_not_beyond_the_largest_value(name, bits):
    x = INPUTS[name][0](torch.randn(4, 8, 16, 16))
    expected = min(ACTIVATION_K[INPUTS[name][1]][bits] * nonzero_mean(x), np.abs(double(x)).max())
    assert float(activation_quantizer('gdrq', x, bits=bits).threshold) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('k', [0.5, 2.0, 50.0])
def test_a_given_k_is_used_as_it_is(k):
    x = torch.randn(4, 8, 16, 16)
    assert float(activation_quantizer('gdrq', x, k=k).threshold) == pytest.approx(
        k * np.abs(double(x)).mean(), rel=1e-5
    )


def test_calibration_weighs_every_element_the_same():
    batches = torch.rand(1, 8, 4, 4), 10 * torch.rand(5, 8, 4, 4)
    mean = np.abs(double(torch.cat(batches))).mean()
    assert float(activation_quantizer('gdrq', *batches, k=2.0).threshold) == pytest.approx(2 * mean, rel=1e-5)


def test_the_summary_of_calibration_adds_up_over_batches():
    quantizer = GDRQActivation(4)
    quantizer.set_state(stage=Stage.OBSERVE)
    assert quantizer.observed().tolist() == [0, 0, 0, -np.inf, -np.inf]
    for batch in torch.tensor([1.0, -2.0, 0.0]), torch.tensor([4.0]):
        quantizer(batch)
    assert quantizer.observed().tolist() == [7, 4, 3, 2, 4]  # sum|x|, count, non-zeros, -min, max


def test_the_mean_leaves_out_zeros_unless_it_is_that_of_all():
    x = torch.relu(torch.randn(4, 8, 16, 16))
    quantizer, of_all = (activation_quantizer('gdrq', x, k=2.0, **each) for each in ({}, dict(mean='all')))
    assert float(quantizer.threshold) == pytest.approx(2 * nonzero_mean(x), rel=1e-5)
    assert float(of_all.threshold) == pytest.approx(2 * double(x).mean(), rel=1e-5)


@pytest.mark.parametrize('k', [0.5, 1.0, 2.0])
def test_a_zero_point_range_on_positive_inputs_has_the_least_zero_point(k):
    assert activation_quantizer('gdrq', torch.full((2, 3), 5.0), k=k, range='zero_point').lo == -1


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
    quantizer = activation_quantizer('gdrq', x.detach(), bits=bits, k=2.0)
    signed, z = quantizer.kind == 'signed', -quantizer.lo if quantizer.kind == 'zero_point' else 0
    out = quantizer(x)
    out.backward(upstream)
    threshold = 2 * nonzero_mean(x)
    np.testing.assert_allclose(
        double(out), reference.quantize(double(x), threshold, bits, signed, zero_point=z), rtol=1e-5, atol=1e-6
    )
    inside = reference.inside_range(double(x), threshold, bits, signed, zero_point=z)
    assert torch.equal(x.grad, upstream * torch.from_numpy(inside).float())


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_a_straight_through_gradient_of_activations_passes_everywhere(stage):
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    upstream = torch.randn(2, 8, 9, 7)
    activation_quantizer('gdrq', x.detach(), k=1.0, gradient='straight_through', stage=stage)(x).backward(upstream)
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize('name', INPUTS)
def test_reshape_clips_activations_without_rounding(name):
    x = INPUTS[name][0](torch.randn(2, 8, 9, 7))
    out = activation_quantizer('gdrq', x, bits=2, k=1.5, stage=Stage.RESHAPE)(x)
    threshold = 1.5 * nonzero_mean(x)
    np.testing.assert_allclose(double(out), np.clip(double(x), -threshold, threshold), rtol=1e-5)


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('name', ['silu', 'gelu'])
def test_a_zero_point_range_contains_zero_and_reaches_the_minimum(name, bits):
    x = INPUTS[name][0](torch.randn(4, 8, 16, 16))
    quantizer = activation_quantizer('gdrq', x, bits=bits).eval()
    assert quantizer(torch.zeros(5)).tolist() == [0] * 5
    assert quantizer.hi - quantizer.lo == 2**bits - 1
    assert float(x.min()) == pytest.approx(float(quantizer.lo * quantizer.step()), abs=float(quantizer.step()))


def test_an_empty_tensor_passes_and_leaves_no_trace():
    empty = torch.zeros(0, 4, 3, 3)
    assert GDRQActivation(4).eval()(empty) is empty
    assert not GDRQActivation(4).train()(empty).numel()
    quantizer = activation_quantizer('gdrq', empty)
    assert not quantizer.calibrated
    quantizer = activation_quantizer('gdrq', torch.randn(2, 4), k=2.0)
    quantizer(empty)
    assert collected([quantizer]).tolist() == [[0, 0]]


def test_an_all_zero_tensor_gives_zero_and_finite_gradients():
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    quantizer = activation_quantizer('gdrq', x.detach())
    out = quantizer(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4, 3, 3)) and torch.isfinite(x.grad).all()
    assert torch.equal(quantizer(torch.randn(3)), torch.zeros(3))  # T = 0 until it moves


# ---- activations: the running threshold -----------------------------------------------------------------------------


def test_one_update_takes_all_forwards_of_an_optimizer_step():
    quantizer = activation_quantizer('gdrq', torch.randn(4, 3, 5, 5), k=3.0, momentum=0.25)
    start = float(quantizer.threshold)
    batches = torch.randn(2, 3, 5, 5), 5 * torch.randn(6, 3, 5, 5), torch.randn(1, 3, 2, 2)
    for batch in batches:
        quantizer(batch)
        assert float(quantizer.threshold) == start  # constant within the step
    move(quantizer)
    expected = reference.running_threshold(start, 3.0, 0.25, [double(b) for b in batches])
    assert float(quantizer.threshold) == pytest.approx(expected, rel=1e-5)


def test_an_update_starts_the_statistics_anew():
    quantizer = activation_quantizer('gdrq', torch.randn(4, 3, 5, 5))
    quantizer(torch.randn(4, 3, 5, 5))
    move(quantizer)
    assert collected([quantizer]).tolist() == [[0, 0]]


def test_an_update_without_a_forward_leaves_the_threshold():
    quantizer = activation_quantizer('gdrq', torch.randn(4, 3, 5, 5))
    start = float(quantizer.threshold)
    move(quantizer)
    assert float(quantizer.threshold) == start


def test_thresholds_move_together_as_each_would_alone():
    def made():
        settings = dict(k=3.0, momentum=0.25), dict(mean='nonzero'), dict(momentum=0.5), dict(k=2.0)
        quantizers = [activation_quantizer('gdrq', torch.linspace(-1, 2, 50), **setting) for setting in settings]
        for number, quantizer in enumerate(quantizers[:3]):  # nothing comes through the last
            quantizer(torch.linspace(0, 1 + number, 70).relu())
        return quantizers

    alone, together = made(), made()
    for quantizer in alone:
        move(quantizer)
    move(*together)
    starts = [quantizer.threshold for quantizer in made()]
    moved = [not torch.equal(q.threshold, start) for q, start in zip(together, starts)]
    assert moved == [True, True, True, False]
    assert [q.threshold.tolist() for q in together] == [q.threshold.tolist() for q in alone]


@pytest.mark.parametrize('scale', [0.1, 10.0])
def test_the_running_threshold_converges_to_k_times_the_mean(scale):
    quantizer = activation_quantizer('gdrq', torch.ones(8), k=3.0, momentum=0.1)
    distances = []
    for _ in range(100):
        quantizer(torch.full((8,), scale))
        move(quantizer)
        distances.append(abs(float(quantizer.threshold) - 3 * scale))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 * scale * 3


def test_the_running_mean_may_leave_out_zeros():
    quantizer = activation_quantizer('gdrq', torch.rand(8), k=2.0, momentum=1.0, mean='nonzero')
    x = torch.tensor([0.0, 0.0, 1.0, 2.0])
    quantizer(x)
    move(quantizer)
    assert float(quantizer.threshold) == 3.0


def test_all_zeros_leave_a_threshold_of_nonzero_means():
    quantizer = activation_quantizer('gdrq', torch.rand(8), k=2.0, momentum=1.0, mean='nonzero')
    start = float(quantizer.threshold)
    quantizer(torch.zeros(8))
    move(quantizer)
    assert float(quantizer.threshold) == start


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_training_forwards_are_tracked(stage):
    quantizer = activation_quantizer('gdrq', torch.randn(8), stage=stage)
    quantizer(torch.tensor([1.0, -2.0, 0.0]))
    assert collected([quantizer]).tolist() == [[3, 2]]  # 0 is not counted


def test_nothing_is_tracked_in_evaluation():
    quantizer = activation_quantizer('gdrq', torch.randn(8)).eval()
    quantizer(torch.randn(8))
    assert collected([quantizer]).tolist() == [[0, 0]]


@pytest.mark.parametrize('stage', [Stage.OBSERVE, Stage.FREEZE, Stage.FLOAT])
def test_nothing_is_tracked_in_other_stages(stage):
    quantizer = activation_quantizer('gdrq', torch.randn(8), stage=stage)
    quantizer(torch.randn(8))
    assert collected([quantizer]).tolist() == [[0, 0]]


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_recomputed_segment_is_tracked_once(use_reentrant):
    quantizer = activation_quantizer('gdrq', torch.randn(8), k=2.0)
    runs = []

    def segment(x):
        runs.append(1)
        return quantizer(x).square()

    x = torch.randn(8, requires_grad=True)
    checkpoint(segment, x, use_reentrant=use_reentrant).sum().backward()
    assert len(runs) == 2 and collected([quantizer])[0, 1] == 8


def test_tracking_takes_no_gradient():
    quantizer = activation_quantizer('gdrq', torch.randn(8))
    quantizer(torch.randn(8, requires_grad=True))
    assert not collected([quantizer]).requires_grad
