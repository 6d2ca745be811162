"""Activations of the methods beside GDRQ against their papers' equations."""

import copy
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import silu

from gdrq_mm.core.quantizers import ACTIVATION_METHODS, Stage
from gdrq_mm.core.quantizers.bnn import LEVEL
from gdrq_mm.core.quantizers.hwgq import FULL_WAVE, HALF_WAVE
from gdrq_mm.core.quantizers.minmax import AttentionWeights, MinMaxActivation
from gdrq_mm.core.quantizers.tsq import sparse_step
from tests import reference_methods as papers
from tests.core.builders import (
    ACTIVATIONS,
    KINDS,
    VALUES,
    activation_quantizer,
    double,
    frozen,
    gradients,
    inputs,
    move,
    on_two_ranks,
)
from tests.helpers import same

LAW = settings(deadline=None, max_examples=40)
CASES = [
    (name, kind, bits)
    for name in ACTIVATIONS
    for kind in KINDS
    for bits in (1, 2, 3, 4, 8)
    if bits in ACTIVATION_METHODS[name].allowed_bits
]
INSTEAD = dict(log2='signed', bnn='unsigned', tsq='unsigned')
"""Methods without a zero point, and what they have instead."""
NO_ZERO = ('bnn', 'signed')
"""Its two levels are T and -T."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- activations: forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('method', 'kind', 'bits'), CASES)
def test_quantized_activations_equal_the_paper(method, kind, bits):
    batches = inputs(kind), inputs(kind)
    quantizer = activation_quantizer(method, *batches, bits=bits)
    seen = double(torch.cat(batches))
    wave = (FULL_WAVE if kind == 'signed' else HALF_WAVE).get(bits)
    if method == 'tsq':
        wave = sparse_step(papers.tsq_codes(kind, bits), NormalDist().inv_cdf(0.625))
    threshold = papers.start_threshold(method, seen, kind, bits, wave)
    assert float(quantizer.current_threshold()) == pytest.approx(threshold, rel=1e-5)
    x = 1.5 * batches[0]
    out = quantizer(x)
    expected = papers.activation(method, double(x), threshold, kind, bits, seen.min(), wave)
    np.testing.assert_allclose(double(out), expected, rtol=1e-5, atol=1e-6)
    assert len(torch.unique(out)) <= 2**bits
    assert not quantizer(torch.zeros(5)).any() or (method, kind) == NO_ZERO
    assert torch.equal(out, quantizer.eval()(x)), 'evaluation'
    assert torch.equal(out, frozen(quantizer).train()(x)), 'frozen'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_the_kind_of_activations_is_decided_by_calibration(method, kind):
    expected = INSTEAD.get(method, kind) if kind == 'zero_point' else kind
    assert activation_quantizer(method, inputs(kind)).kind == expected


@pytest.mark.parametrize('method', ACTIVATIONS)
def test_an_empty_tensor_passes_and_leaves_no_trace(method):
    empty = torch.zeros(0, 4, 3, 3)
    fresh = ACTIVATION_METHODS[method](4)
    assert fresh.eval()(empty) is empty and torch.equal(fresh.train()(empty), empty) and not fresh.calibrated
    assert not activation_quantizer(method, empty).calibrated
    quantizer = activation_quantizer(method, inputs('unsigned'), empty)
    quantizer(inputs('unsigned'))
    before = copy.deepcopy(quantizer.state_dict())
    out = quantizer(empty)  # what is learned has a gradient of 0: DistributedDataParallel waits for it
    assert torch.equal(out, empty) and out.requires_grad == bool(list(quantizer.parameters()))
    assert same(before, quantizer.state_dict())


@pytest.mark.parametrize('range', ['auto', 'unsigned', 'signed', 'zero_point'])
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_an_all_zero_tensor_gives_zeros_and_finite_gradients(method, range):
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    quantizer = activation_quantizer(method, x, range=range)
    out = quantizer(x)
    out.sum().backward()
    assert (not out.any() or (method, quantizer.kind) == NO_ZERO) and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in quantizer.parameters())
    assert torch.equal(quantizer.eval()(x), out) and torch.isfinite(quantizer(torch.randn(50))).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_bfloat16_inputs_are_quantized_in_float32(method, kind):
    x = inputs(kind).bfloat16()
    quantizer = activation_quantizer(method, x.float())
    with torch.autocast('cpu', torch.bfloat16):
        out = quantizer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, quantizer(x.float()).bfloat16())


@pytest.mark.parametrize('method', ACTIVATIONS)
@LAW
@given(values=hnp.arrays(np.float32, st.integers(1, 60), elements=VALUES), data=st.data())
def test_any_activations_get_few_levels_and_zero_is_one_of_them(method, values, data):
    bits = data.draw(st.sampled_from([b for b in (1, 2, 3, 4, 8) if b in ACTIVATION_METHODS[method].allowed_bits]))
    range_ = data.draw(st.sampled_from(['auto', 'unsigned', 'signed', 'zero_point']))
    x = torch.from_numpy(values)
    quantizer = activation_quantizer(method, x, bits=bits, range=range_).eval()
    with torch.no_grad():
        out = quantizer(torch.cat([x, torch.zeros(1)]))
    assert torch.isfinite(out).all() and len(torch.unique(out)) <= 2**bits
    assert out[-1] == 0 or (method, quantizer.kind) == NO_ZERO
    assert range_ == 'auto' or quantizer.kind == (INSTEAD.get(method, range_) if range_ == 'zero_point' else range_)


def test_a_running_largest_value():
    """T <- T + m * (max|x| - T) once a step, the largest of its forwards, as if they were one batch."""
    quantizer = activation_quantizer('minmax', torch.tensor([0.0, 4.0]), momentum=0.25)
    for largest in (8.0, 2.0):
        quantizer(torch.tensor([0.5, -largest]))
        assert float(quantizer.threshold) == 4
    move(quantizer)
    assert float(quantizer.threshold) == 4 + 0.25 * (8 - 4)
    move(quantizer)
    assert float(quantizer.threshold) == 5, 'no forward since'


def test_saving_does_not_change_how_a_training_goes_on():
    """Dropout makes weights of attention above 1; T is 1 at most, saved or not."""
    ends = []
    for saves in (False, True):
        quantizer = AttentionWeights(8)
        quantizer.start(torch.tensor([1.0, 2, 2, 0, 1.1], dtype=torch.float64))
        for largest in (1.2, 1.2, 0.5):
            quantizer.train()(torch.full((4, 8), largest))
            move(quantizer)
            if saves:
                quantizer.state_dict()
        ends.append(float(quantizer.threshold))
    assert ends[0] == ends[1] < 1


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_dropout_leaves_the_mean_of_attention_weights(stage):
    """It doubles what it keeps of them; weights of 0.9 would be clipped at 1."""
    quantizer, weights = AttentionWeights(8), torch.full((200, 200), 0.9)
    quantizer(weights)
    quantizer.stage = stage
    dropped = quantizer.train()(torch.nn.functional.dropout(weights, 0.5))
    assert float(dropped.mean()) == pytest.approx(float(quantizer.eval()(weights).mean()), rel=0.02)


@pytest.mark.parametrize('make', [lambda: MinMaxActivation(8), lambda: AttentionWeights(8)])
def test_the_largest_value_is_that_of_all_processes(make):
    """One that has seen nothing, as a head without regions, changes nothing."""
    parts, empty = [torch.tensor([0.2, 0.9]), torch.tensor([0.4, 0.1])], torch.zeros(0)

    def moved(*steps):
        quantizer = make()
        quantizer.start(torch.tensor([1.0, 2, 2, 0, 0.5], dtype=torch.float64))
        for x in steps:
            quantizer.train()(x)
            move(quantizer)
        return float(quantizer.threshold)

    found = on_two_ranks(lambda rank: moved(parts[rank], [empty, parts[1]][rank]))
    assert found[0] == found[1] == moved(torch.cat(parts), parts[1])


@pytest.mark.parametrize('sigma', [0.3, 0.6, 1.0, 3.0])
@pytest.mark.parametrize('bits', [2, 4, 7])
def test_a_step_that_a_paper_gives_is_that_step_with_a_zero_point_too(bits, sigma):
    x = silu(sigma * torch.randn(5000))
    mean = np.abs(double(x)).mean()
    quantizer = activation_quantizer('hwgq', x, bits=bits, range='zero_point')
    assert float(quantizer.step()) == pytest.approx(HALF_WAVE[bits] * math.sqrt(2 * math.pi) * mean, rel=1e-5)
    quantizer = activation_quantizer('lsq', x, bits=bits, range='zero_point')
    assert float(quantizer.step()) == pytest.approx(2 * mean / math.sqrt(quantizer.hi), rel=1e-5)
    assert float(quantizer.learned_step.detach()) == pytest.approx(float(quantizer.step()), rel=1e-5)


@pytest.mark.parametrize('method', ['hwgq', 'lsq'])
def test_the_zero_point_is_that_of_the_range_in_use(method):
    """Nothing is clipped below: the lowest level is within half a step of the smallest value."""
    x = silu(0.6 * torch.randn(5000))
    quantizer = activation_quantizer(method, x, bits=7)
    assert quantizer.lo < -2
    assert float(quantizer.lo * quantizer.step()) == pytest.approx(float(x.min()), abs=float(quantizer.step()))


@pytest.mark.parametrize(('kind', 'sigmas'), [('unsigned', HALF_WAVE), ('signed', FULL_WAVE)])
@pytest.mark.parametrize('bits', [2, 4])
def test_the_step_of_hwgq_is_that_of_the_standard_deviation(kind, sigmas, bits):
    noise = 3.0 * torch.randn(200_000)
    quantizer = activation_quantizer('hwgq', KINDS[kind](noise), bits=bits)
    assert float(quantizer.step()) == pytest.approx(3.0 * sigmas[bits], rel=0.01)
    quantizer(KINDS[kind](2 * noise))
    move(quantizer)
    assert float(quantizer.step()) == pytest.approx(3.0 * sigmas[bits] * 1.01, rel=0.01), 'it follows'


@pytest.mark.parametrize('bits', range(2, 9))
def test_the_tables_of_hwgq(bits):
    assert HALF_WAVE[bits] == pytest.approx(papers.best_wave_step(2**bits - 1, zero=False), abs=0.001)
    assert FULL_WAVE[bits] == pytest.approx(papers.best_wave_step(2 ** (bits - 1) - 1, zero=True), abs=0.001)


def test_the_level_of_bnn_has_the_least_squared_error():
    """In {0, t} for a rectified Gaussian, which has the mean sqrt(2 / pi) above 0."""
    best = papers.best_wave_step(1, zero=True) / math.sqrt(2 / math.pi)
    assert pytest.approx(best, abs=0.001) == LEVEL == papers.BEST_LEVEL


@pytest.mark.parametrize('levels', [1, 3, 7, 15])
@pytest.mark.parametrize('sparsity', [0.5, 0.625, 0.75])
def test_the_step_of_tsq_has_the_least_squared_error_beyond_epsilon(levels, sparsity):
    step = sparse_step(levels, NormalDist().inv_cdf(sparsity))
    best = papers.best_sparse_error(levels, sparsity)
    assert papers.sparse_error(levels * step, levels, sparsity) == pytest.approx(best, rel=0.001)
    assert papers.sparse_error(1.05 * levels * step, levels, sparsity) > 1.001 * best
    if sparsity == 0.5:  # nothing is cut off
        assert step == pytest.approx(papers.best_wave_step(levels, zero=False), abs=0.005)


def test_tsq_drops_the_share_of_inputs_that_sparsity_names():
    noise = 2.0 * torch.randn(100_000)
    for sparsity in (0.55, 0.625, 0.75):
        out = activation_quantizer('tsq', torch.relu(noise), bits=2, sparsity=sparsity)(torch.relu(noise))
        assert float((out == 0).float().mean()) == pytest.approx(sparsity, abs=0.01)
        assert len(torch.unique(out)) == 4


@pytest.mark.parametrize('method', ['ptq', 'dorefa', 'log2', 'bnn'])
def test_a_threshold_that_neither_learns_nor_follows_stays(method):
    quantizer = activation_quantizer(method, inputs('signed'))
    before = float(quantizer.step())
    quantizer(10 * inputs('signed'))
    assert float(quantizer.step()) == before and not quantizer.follows and not list(quantizer.parameters())


# ---- activations: gradients -----------------------------------------------------------------------------------------

CLIPPING = ['dorefa', 'pact', 'lsq', 'lsq_plus', 'minmax', 'ptq']


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', CLIPPING)
def test_the_gradient_of_clipped_activations_is_zero(method, kind, stage):
    x = inputs(kind)
    quantizer = activation_quantizer(method, x, bits=3)
    if stage == Stage.FREEZE:
        frozen(quantizer)
    low, high = (float(quantizer.step()) * code for code in (quantizer.lo, quantizer.hi))
    wider = 2.5 * x
    wider[:, 0] -= 1  # some below zero for 'unsigned' too
    _, upstream, gradient = gradients(quantizer, wider)
    inside = (double(wider) >= low) & (double(wider) <= high)
    np.testing.assert_allclose(gradient, upstream * inside, rtol=1e-6)
    assert 0.3 < inside.mean() < 1


@pytest.mark.parametrize('bits', [2, 4])
def test_the_gradient_of_hwgq_is_that_of_a_clipped_relu(bits):
    """Section 4.3: 1 where 0 < x <= q_m, else 0, for what goes into the ReLU."""
    noise = torch.randn(2, 8, 9, 7)
    quantizer = activation_quantizer('hwgq', torch.relu(noise), bits=bits)
    highest = HALF_WAVE[bits] * (2**bits - 1) * np.maximum(double(noise), 0).mean() * math.sqrt(2 * math.pi)
    _, upstream, gradient = gradients(lambda x: quantizer(torch.relu(x)), 2 * noise)
    inside = (double(noise) > 0) & (2 * double(noise) <= highest)
    np.testing.assert_array_equal(gradient, upstream * inside)
    assert inside.mean() < (double(noise) > 0).mean()


@pytest.mark.parametrize('kind', KINDS)
def test_the_gradient_of_bnn_is_that_of_hard_tanh(kind):
    x = inputs(kind)
    quantizer = activation_quantizer('bnn', x)
    threshold = float(quantizer.threshold)
    _, upstream, gradient = gradients(quantizer, 2 * x)
    low = -threshold if kind == 'signed' else 0
    inside = (2 * double(x) >= low) & (2 * double(x) <= threshold)
    np.testing.assert_array_equal(gradient, upstream * inside)
    assert 0.1 < inside.mean() < 0.9


@pytest.mark.parametrize('kind', ['unsigned', 'signed'])
def test_the_gradient_of_tsq_is_that_of_clipping(kind):
    x = inputs(kind)
    quantizer = activation_quantizer('tsq', x, bits=2)
    _, upstream, gradient = gradients(quantizer, 2 * x)
    np.testing.assert_array_equal(gradient, upstream * (np.abs(2 * double(x)) <= float(quantizer.threshold)))


@pytest.mark.parametrize('kind', KINDS)
def test_the_gradient_of_logarithmic_activations_passes_everywhere(kind):
    x = inputs(kind)
    _, upstream, gradient = gradients(activation_quantizer('log2', x), 2 * x)
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', [2, 4])
def test_the_gradient_of_the_clipping_level_of_pact(kind, bits):
    quantizer = activation_quantizer('pact', 0.5 * inputs(kind), bits=bits)
    x, alpha = inputs(kind), float(quantizer.alpha.detach())
    _, upstream, _ = gradients(quantizer, x)
    expected = papers.pact_gradient(double(x), alpha, quantizer.lo, quantizer.hi, upstream)
    assert float(quantizer.alpha.grad) == pytest.approx(expected, rel=1e-4)
    assert expected != 0


@pytest.mark.parametrize(
    ('method', 'kind'), [*(('lsq', kind) for kind in KINDS), ('lsq_plus', 'unsigned'), ('lsq_plus', 'signed')]
)
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_gradient_of_a_learned_step_of_activations(method, kind, bits):
    """Eq. 3 with N the features of one image."""
    x = inputs(kind, 3, 8, 9, 7)
    quantizer = activation_quantizer(method, x, bits=bits)
    step = float(quantizer.learned_step.detach())
    _, upstream, _ = gradients(quantizer, x)
    expected = papers.learned_step_gradient(double(x), step, quantizer.lo, quantizer.hi, upstream, 8 * 9 * 7)
    assert float(quantizer.learned_step.grad) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('offset', [0.0, 0.3])
def test_step_and_offset_of_lsq_plus(bits, offset):
    """Eq. 3 to 6, also where the offset is between two levels."""
    x = inputs('zero_point', 3, 8, 9, 7)
    quantizer = activation_quantizer('lsq_plus', 0.8 * x, bits=bits)
    assert quantizer.kind == 'zero_point'
    start = float(quantizer.learned_step.detach())
    quantizer.beta.data += offset * start
    beta = float(quantizer.beta.detach())
    assert beta == pytest.approx((quantizer.lo + offset) * start, rel=1e-5)
    out, upstream, gradient = gradients(quantizer, x)
    np.testing.assert_allclose(out, papers.lsq_plus_activation(double(x), start, beta, bits), rtol=1e-5, atol=1e-6)
    expected = papers.lsq_plus_gradients(double(x), start, beta, bits, upstream, 8 * 9 * 7)
    np.testing.assert_allclose(gradient, expected[0], rtol=1e-6)
    assert float(quantizer.learned_step.grad) == pytest.approx(expected[1], rel=1e-4)
    assert float(quantizer.beta.grad) == pytest.approx(expected[2], rel=1e-4)
    assert expected[1] != 0 and expected[2] != 0


def test_the_offset_of_lsq_plus_decides_the_codes():
    x = inputs('zero_point')
    quantizer = activation_quantizer('lsq_plus', x, bits=4)
    zero_point = -quantizer.lo
    quantizer.beta.data -= 2 * quantizer.learned_step.data
    out, step = quantizer(x), quantizer.step()
    assert quantizer.eval().train().lo == -zero_point, 'a mode changes nothing'
    quantizer.after_step(0)
    assert (quantizer.lo, quantizer.hi) == (-zero_point - 2, 15 - zero_point - 2)
    assert torch.equal(quantizer.step(), step) and quantizer.state.tolist()[2:4] == [quantizer.lo, quantizer.hi]
    assert torch.equal(quantizer.eval()(x), out) and torch.equal(frozen(quantizer)(x), out)
    codes = (out / quantizer.step()).round()
    assert codes.min() >= quantizer.lo and codes.max() == quantizer.hi
    torch.testing.assert_close(codes * quantizer.step(), out)


def test_the_offset_of_lsq_plus_freezes_where_it_is():
    x = inputs('zero_point')
    quantizer = activation_quantizer('lsq_plus', x)
    quantizer.beta.data -= 2 * quantizer.learned_step.data
    out = quantizer(x)
    torch.testing.assert_close(frozen(quantizer)(x), out)


def test_the_gradient_of_lsq_plus_does_not_depend_on_when_evaluation_was():
    """Else a run that is resumed in the middle of an epoch would go on otherwise."""
    x, found = inputs('zero_point'), []
    for evaluated in (False, True):
        quantizer = activation_quantizer('lsq_plus', x)
        quantizer.beta.data -= 2 * quantizer.learned_step.data
        if evaluated:
            quantizer.eval()(x)
            quantizer.after_step(0)
            quantizer.state_dict()
            quantizer.train()
        quantizer(x).sum().backward()
        found.append((float(quantizer.learned_step.grad), float(quantizer.beta.grad)))
    assert found[0] == found[1]


@pytest.mark.parametrize('kind', ['unsigned', 'signed'])
def test_the_offset_of_lsq_plus_stays_zero_without_a_zero_point(kind):
    x = inputs(kind)
    quantizer = activation_quantizer('lsq_plus', x)
    gradients(quantizer, x)
    assert float(quantizer.beta.detach()) == 0 and float(quantizer.beta.grad) == 0


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ['pact', 'lsq', 'lsq_plus'])
def test_frozen_activations_keep_their_threshold_and_give_zero_gradients(method, kind):
    x = inputs(kind)
    quantizer = frozen(activation_quantizer(method, 0.5 * x))
    before = quantizer(x)
    for parameter in quantizer.parameters():
        parameter.data *= 1.5
    assert torch.equal(quantizer.eval()(x), before) and torch.equal(quantizer.train()(x), before)
    gradient = gradients(quantizer, x)[2]
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in quantizer.parameters())
    assert gradient.any()


@pytest.mark.parametrize('method', ['pact', 'lsq', 'lsq_plus'])
def test_a_learned_threshold_that_crosses_zero_goes_on_learning(method):
    x = inputs('signed')
    one, other = activation_quantizer(method, x), activation_quantizer(method, x)
    learned = [quantizer.alpha if method == 'pact' else quantizer.learned_step for quantizer in (one, other)]
    for each in learned:
        each.data *= 0.5
    learned[1].data.neg_()
    assert torch.equal(one(x), other(x))
    for quantizer in (one, other):
        quantizer(x).square().sum().backward()
    assert float(learned[0].grad) == -float(learned[1].grad) != 0
