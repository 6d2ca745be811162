"""Methods that change in the course of a training, and what moves after a step: inq, tsq, loss_aware, bnn."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers.inq import FREE, UNTOLD
from gdrq_mm.core.quantizers.loss_aware import DECAY, INTERVAL, LEAST
from gdrq_mm.core.step import after_step
from tests import reference
from tests import reference_methods as papers
from tests.core.builders import double, everywhere, frozen, gradients, on_two_ranks, weight_quantizer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def told(quantizer, weight, progress, step=0):
    """What is stored after a step at this progress of the training."""
    quantizer.progress = progress
    stored = quantizer.after_step(weight, step)
    return weight if stored is None else stored


# ---- INQ ------------------------------------------------------------------------------------------------------------


def test_a_growing_share_of_the_largest_weights_becomes_levels_and_stays():
    weight = torch.randn(8, 4, 5, 5)
    quantizer = weight_quantizer('inq', weight, 5)
    expected = papers.inq_weight(double(weight), 5)
    held, before = np.zeros(weight.shape, bool), weight
    for step, (progress, share) in enumerate([(0.01, 0.5), (0.2, 0.5), (0.25, 0.75), (0.5, 0.875), (0.75, 1), (1, 1)]):
        stored = told(quantizer, weight, progress, step)
        now = double(quantizer.held) != FREE
        assert now.mean() == pytest.approx(share, abs=0.01) and now[held].all()
        if not held.any():
            np.testing.assert_array_equal(double(stored)[now], expected[now])
            assert np.abs(double(weight))[now].min() >= np.abs(double(weight))[~now].max()
        new = now & ~held
        np.testing.assert_array_equal(
            double(stored)[new], papers.cut_at_ties(double(weight), levels_of(quantizer))[new]
        )
        np.testing.assert_array_equal(double(stored)[held], double(before)[held])
        assert torch.equal(stored[torch.from_numpy(~now)], weight[torch.from_numpy(~now)])
        _, upstream, gradient = gradients(quantizer, stored)
        np.testing.assert_array_equal(gradient, upstream * ~now)
        before, held = stored, now
        weight = stored + 0.1 * torch.randn(weight.shape)  # as momentum and weight decay do, held or not
    assert torch.equal(quantizer(weight), stored) and torch.equal(quantizer.eval()(stored), stored)
    quantizer.start(weight)  # it begins anew
    told(quantizer, weight, 1.0)
    assert int(quantizer.held.abs().max()) == quantizer.hi


def levels_of(quantizer):
    top = float(quantizer.threshold)
    return [top * 2.0**-t for t in range(quantizer.hi)]


def test_evaluation_and_freezing_round_all_weights():
    weight = torch.randn(8, 4, 3, 3)
    quantizer = weight_quantizer('inq', weight, 3)
    stored = told(quantizer, weight, 0.1)
    out = quantizer(stored)
    assert torch.equal(out, stored) and len(torch.unique(out)) > 100
    whole = quantizer.eval()(stored)
    np.testing.assert_array_equal(double(whole), papers.inq_weight(double(weight), 3))
    assert torch.equal(frozen(quantizer, stored).train()(stored), whole)
    assert torch.equal(told(quantizer, stored, 0.2), whole), 'and then they are held'


def test_where_nobody_tells_the_progress_all_weights_are_rounded_and_train():
    weight = torch.randn(8, 4, 3, 3)
    quantizer = weight_quantizer('inq', weight, 4)
    assert quantizer.after_step(weight, 0) is None and bool((quantizer.held == UNTOLD).all())
    out, upstream, gradient = gradients(quantizer, weight)
    np.testing.assert_array_equal(out, papers.inq_weight(double(weight), 4))
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize('portions', [1, 2, 5])
def test_portions_are_even_fractions_of_the_training(portions):
    quantizer = weight_quantizer('inq', torch.randn(4, 9), 4, portions=portions)
    found = []
    for i in range(portions):
        for progress in (i / portions + 1e-9, (i + 1) / portions - 1e-9):
            quantizer.progress = progress
            found.append(quantizer.share())
    assert found == [share for i in range(portions) for share in [1 - 0.5 ** (i + 1) if i < portions - 1 else 1.0] * 2]


def test_weights_of_the_same_size_are_held_by_their_order_so_that_processes_agree():
    weight = torch.ones(4, 8)
    quantizer = weight_quantizer('inq', weight, 4)
    told(quantizer, weight, 0.1)
    assert (quantizer.held.flatten() != FREE).tolist() == [True] * 16 + [False] * 16


@pytest.mark.parametrize('method', ['inq', 'tsq', 'loss_aware'])
@pytest.mark.parametrize('stop', [3, 12, 20])
def test_a_training_that_is_resumed_goes_on_as_it_was(method, stop):
    """With the weights, the buffers and the number of the step alone."""
    target, steps = torch.randn(6, 8), 24

    def run(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            (model.train()(x) - target).square().mean().backward()
            optimizer.step()
            after_step(model, step, (step + 1) / steps)

    def build():
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        quantize_model(model, Quantization.from_dict(everywhere(method, 'minmax')))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    x = torch.randn(6, 8)
    one = build()
    calibrate(one[0], [x])
    run(*one, 0, stop)
    other = build()
    for mine, saved in zip(other, copy.deepcopy([each.state_dict() for each in one])):
        mine.load_state_dict(saved)
    for each in (one, other):
        run(*each, stop, steps)
    found, expected = (each[0].state_dict() for each in (other, one))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if method == 'inq':
        assert all((layer.weight_quant.held.abs() <= 4).all() for layer in quant_layers(one[0]).values())


# ---- TSQ ------------------------------------------------------------------------------------------------------------


def test_weights_are_float_in_the_first_step_and_ternary_in_the_second():
    weight = torch.randn(8, 4, 3, 3)
    quantizer = weight_quantizer('tsq', weight, 2, 2, weights_from=0.6)
    whole = papers.by_groups(lambda w: papers.least_squares_weight(w, 2), 2, double(weight))
    for progress, rounds in [(None, True), (0.1, False), (0.59, False), (0.6, True), (1.0, True)]:
        told(quantizer, weight, progress)
        out, upstream, gradient = gradients(quantizer.train(), weight)
        np.testing.assert_allclose(out, whole if rounds else double(weight), rtol=1e-5)
        np.testing.assert_array_equal(gradient, upstream)
        np.testing.assert_allclose(double(quantizer.eval()(weight)), whole, rtol=1e-5)
    told(quantizer, weight, 0.1)
    np.testing.assert_allclose(double(frozen(quantizer, weight).train()(weight)), whole, rtol=1e-5)


@pytest.mark.parametrize('groups', [1, 2])
def test_the_scale_of_tsq_takes_a_turn_of_least_squares_after_each_step(groups):
    weight = torch.randn(8, 4, 3, 3)
    quantizer, expected = weight_quantizer('tsq', weight, 2, groups), None
    for step in range(3):
        weight = weight + 0.3 * torch.randn(weight.shape)
        parts = zip(np.array_split(double(weight), groups), double(quantizer.threshold))
        expected = [papers.refit(w, t, 2, np.ones_like(w), 1) for w, t in parts]
        quantizer.after_step(weight, step)
        np.testing.assert_allclose(double(quantizer.threshold), expected, rtol=1e-5)


# ---- loss-aware -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('bits', [2, 4])
def test_the_step_minimizes_the_error_weighted_by_the_gradients(bits, groups):
    weight = torch.randn(8, 4, 3, 3)
    quantizer = weight_quantizer('loss_aware', weight, bits, groups)
    second, importance = np.zeros(weight.shape), np.ones(weight.shape)
    uneven = torch.rand(weight.shape).pow(3)
    for step in range(2 * INTERVAL):
        out, upstream, _ = gradients(lambda w: quantizer(w) * uneven, weight)
        out = out / double(uneven)
        noted, before = upstream * double(uneven), double(quantizer.threshold)
        quantizer.after_step(weight, step)
        if (step + 1) % INTERVAL:
            np.testing.assert_array_equal(double(quantizer.threshold), before)
            continue
        second = DECAY * second + (1 - DECAY) * noted**2 / (noted**2).mean()
        np.testing.assert_allclose(double(quantizer.second), second, rtol=1e-4)
        importance = np.sqrt(second) + LEAST * np.sqrt(second).mean()
        parts = zip(*(np.array_split(a, groups) for a in (double(weight), importance)), before)
        expected = [papers.refit(w, t, bits, h, 2) for w, h, t in parts]
        np.testing.assert_allclose(double(quantizer.threshold), expected, rtol=1e-4)
        errors = [(importance * (found - double(weight)) ** 2).sum() for found in (out, double(quantizer(weight)))]
        assert errors[1] < errors[0], 'than with the step before'
        weight = weight + 0.2 * torch.randn(weight.shape)


def test_gradients_of_several_backward_passes_are_one():
    """Of gradient accumulation; and what happens to the gradient of the weight in place does not matter."""
    weight = nn.Parameter(torch.randn(4, 9))
    quantizer, total = weight_quantizer('loss_aware', weight, 4), 0
    for _ in range(3):
        upstream = torch.randn(4, 9)
        quantizer(weight).backward(upstream)
        weight.grad.zero_()
        total = total + double(upstream)
    with torch.no_grad():
        quantizer(weight)
        quantizer.after_step(weight, INTERVAL - 1)
    np.testing.assert_allclose(double(quantizer.second), (1 - DECAY) * total**2 / (total**2).mean(), rtol=1e-4)


@pytest.mark.parametrize('value', [0.0, torch.nan, torch.inf])
def test_gradients_that_say_nothing_change_nothing(value):
    weight = torch.randn(4, 9, requires_grad=True)
    quantizer = weight_quantizer('loss_aware', weight, 4)
    before = quantizer.threshold.clone()
    quantizer(weight).backward(torch.full((4, 9), value))
    quantizer.after_step(weight.detach(), INTERVAL - 1)
    assert not quantizer.second.any() and torch.allclose(quantizer.threshold, before, rtol=0.05)
    assert torch.isfinite(quantizer.threshold).all()


def test_processes_find_the_same_step():
    """One of them has no gradient, as a head without samples."""
    weight, upstream = torch.randn(4, 9), torch.randn(4, 9)

    def work(rank):
        quantizer = weight_quantizer('loss_aware', weight, 3)
        if rank:
            quantizer(weight.clone().requires_grad_()).backward(upstream)
        quantizer.after_step(weight, INTERVAL - 1)
        return quantizer.second, quantizer.threshold

    found = on_two_ranks(work)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    expected = (1 - DECAY) * double(upstream) ** 2 / (double(upstream) ** 2).mean()
    np.testing.assert_allclose(double(found[0][0]), expected, rtol=1e-4)


# ---- BNN, FGQ, LBW-Net ----------------------------------------------------------------------------------------------


def test_binary_weights_have_the_gradient_of_hard_tanh_and_are_clipped():
    weight = 1.2 * torch.randn(6, 3, 3, 3)
    quantizer = weight_quantizer('bnn', weight, 1)
    _, upstream, gradient = gradients(quantizer, weight)
    np.testing.assert_array_equal(gradient, upstream * (np.abs(double(weight)) <= 1))
    assert 0.3 < (gradient == 0).mean() < 0.6
    stored = quantizer.after_step(weight, 0)
    np.testing.assert_array_equal(double(stored), np.clip(double(weight), -1, 1))
    assert sorted(set(double(quantizer(torch.zeros(6, 3, 3, 3) + weight)).ravel())) == pytest.approx(
        [-np.abs(double(weight)).mean(), np.abs(double(weight)).mean()], rel=1e-6
    )


@pytest.mark.parametrize('n', [1, 3, 4, 64])
@pytest.mark.parametrize('shape', [(4, 10, 3, 3), (6, 1, 3, 3), (5, 13), (2, 9, 1, 1)])
def test_the_groups_of_fgq(shape, n):
    weight = torch.randn(shape)
    quantizer = weight_quantizer('fgq', weight, 2, n=n)
    np.testing.assert_allclose(double(quantizer(weight)), papers.fgq_weight(double(weight), n=n), rtol=1e-5, atol=1e-6)
    if n == 1:
        assert torch.allclose(quantizer(weight), weight)


@pytest.mark.parametrize('mu', [0.5, 0.6, 0.9])
@pytest.mark.parametrize('bits', [3, 4, 6])
def test_the_free_parameter_of_lbw(bits, mu):
    weight = torch.randn(6, 3, 3, 3)
    out = weight_quantizer('lbw', weight, bits, 1, mu=mu)(weight)
    np.testing.assert_allclose(double(out), papers.lbw_weight(double(weight), bits, mu), rtol=1e-6)


@pytest.mark.parametrize('method', ['lbw', 'inq'])
@pytest.mark.parametrize('bits', [2, 3, 4, 5])
def test_powers_of_two_are_whole_multiples_of_one_step_up_to_3_bits(method, bits):
    weight = torch.randn(6, 3, 3, 3)
    quantizer = weight_quantizer(method, weight, bits, 2).eval()
    codes = quantizer.codes(weight)
    assert codes.dtype == torch.int8 and int(codes.max()) == quantizer.hi == 2 ** (bits - 2)
    same = torch.equal(codes * quantizer.step(weight), quantizer(weight))
    assert same == (quantizer.uneven is None) == (bits <= 3)


def test_the_best_ternary_scale_is_found_beside_large_weights():
    """Whether a few large weights or the many small ones decide."""
    small = 0.01 * torch.randn(2000).sign()
    for large in (0.02, 0.2, 1.0, 30.0):
        weight = torch.cat([torch.tensor([large]), small]).view(1, -1)
        out = weight_quantizer('lbw', weight, 2)(weight)
        np.testing.assert_allclose(double(out), papers.lbw_weight(double(weight), 2), rtol=1e-6)
    assert reference.quantized_loss(double(weight), double(out), 2) < 0.2
