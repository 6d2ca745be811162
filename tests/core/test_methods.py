"""gdrq_mm/core/quantizers/: the methods beside GDRQ against their papers' equations, alone, in models and in runs."""

import copy
import functools
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn.functional import cross_entropy, silu
from torch.testing._internal.distributed import multi_threaded_pg

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.layers import QuantConv2d
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import (
    ACTIVATION_METHODS,
    METHODS,
    WEIGHT_METHODS,
    Stage,
    WeightQuantizer,
    learned_parameters,
)
from gdrq_mm.core.quantizers.following import collected, move_thresholds
from gdrq_mm.core.quantizers.hwgq import FULL_WAVE, HALF_WAVE
from gdrq_mm.core.quantizers.log2 import power_of_two
from gdrq_mm.core.step import set_stage
from gdrq_mm.core.topology import record
from gdrq_mm.openmmlab.hooks import CalibrationHook
from gdrq_mm.openmmlab.runner import QuantRunner
from tests import reference_methods as papers
from tests.helpers import Block, same
from tests.openmmlab.test_models import YOLOX, batch_of, build, check_result, predict, settle
from tests.openmmlab.test_runner import contents, scores_of
from tests.runs import TEST_ONLY, checkpoint_of, tiny_config, train

LAW = settings(deadline=None, max_examples=40)
VALUES = st.floats(-10, 10, width=32, allow_subnormal=False)
WEIGHTS = hnp.arrays(np.float32, st.just((5, 2, 3, 3)) | st.just((4, 6)), elements=VALUES)
BITS = {name: [b for b in (1, 2, 3, 4, 8) if b in WEIGHT_METHODS[name].allowed_bits] for name in papers.WEIGHTS}
PAIRS = [(name, bits) for name, several in BITS.items() for bits in several]
NOT_UNIFORM = ('ttq', 'log2')
"""Weights whose levels are not whole multiples of a step."""
INPUTS = {'unsigned': torch.relu, 'signed': lambda x: x, 'zero_point': silu}
"""What gives activations of each kind."""
ACTIVATIONS = [name for name in ACTIVATION_METHODS if name != 'gdrq']
ACTIVATION_CASES = [
    (name, kind, bits)
    for name in ACTIVATIONS
    for kind in INPUTS
    for bits in (2, 3, 4, 8)
    if bits in ACTIVATION_METHODS[name].allowed_bits
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight_quantizer(method, weight, bits, groups=None, **options):
    """Calibrated on `weight`, in training mode."""
    cls = WEIGHT_METHODS[method]
    if cls.by_place:
        options['kernel'] = tuple(weight.shape[2:])
    quantizer = cls(bits, len(weight), groups, **options)
    quantizer.calibrate(weight.detach())
    return quantizer


def activation_quantizer(method, *batches, bits=4, **options):
    """Calibrated on `batches`, in training mode."""
    quantizer = ACTIVATION_METHODS[method](bits, **options)
    quantizer.set_state(stage=Stage.OBSERVE)
    for batch in batches:
        quantizer(batch.detach())
    quantizer.calibrate(quantizer.observed())
    quantizer.set_state(stage=Stage.QUANTIZE)
    return quantizer


def inputs(kind, *shape):
    return INPUTS[kind](torch.randn(shape or (2, 8, 9, 7)))


def double(x):
    return x.detach().double().numpy()


@torch.no_grad()
def frozen(quantizer, weight=None):
    """What StageHook does to a quantizer when thresholds freeze."""
    if weight is None:
        quantizer.freeze()
    else:
        quantizer.threshold.copy_(quantizer.threshold_of(weight))
    quantizer.set_state(stage=Stage.FREEZE)
    return quantizer


def levels_of(out, groups):
    """The largest number of different values in a group."""
    parts = np.array_split(double(out), len(out) if groups == 'channel' else groups)
    return max(len(np.unique(part)) for part in parts)


# ---- weights: forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
@pytest.mark.parametrize(('method', 'bits'), PAIRS)
def test_quantized_weights_equal_the_paper(method, bits, groups):
    weight = torch.randn(10, 4, 3, 3) * 0.7 + 0.1
    quantizer = weight_quantizer(method, weight, bits, groups)
    out = quantizer(weight)
    function = functools.partial(papers.WEIGHTS[method], bits=bits)
    places = 1 if method == 'syq' else groups  # it has a scale for each place of the kernel instead
    np.testing.assert_allclose(double(out), papers.by_groups(function, places, double(weight)), rtol=1e-5, atol=1e-6)
    assert torch.equal(out, quantizer.eval()(weight)), 'evaluation'
    assert torch.equal(out, frozen(quantizer, weight).train()(weight)), 'frozen'
    by_scale = out.flatten(2).permute(2, 0, 1) if method == 'syq' else out
    assert levels_of(by_scale, 'channel' if method == 'syq' else groups) <= 2**bits


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


def gradients(quantizer, values):
    """The output, a random upstream gradient, and that of the values; those of Parameters are in their .grad."""
    values = values.detach().clone().requires_grad_()
    out = quantizer(values)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    return double(out), double(upstream), double(values.grad)


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


@pytest.mark.parametrize(('method', 'bits'), [('balanced', 3), ('twn', 2), ('log2', 3)])
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


def test_the_gradient_of_xnor():
    weight = torch.randn(6, 3, 3, 3)
    _, upstream, gradient = gradients(weight_quantizer('xnor', weight, 1), weight)
    expected = papers.by_groups(papers.xnor_weight_gradient, 'channel', double(weight), upstream)
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


# ---- activations: forward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('method', 'kind', 'bits'), ACTIVATION_CASES)
def test_quantized_activations_equal_the_paper(method, kind, bits):
    batches = inputs(kind), inputs(kind)
    quantizer = activation_quantizer(method, *batches, bits=bits)
    seen = double(torch.cat(batches))
    wave = (FULL_WAVE if kind == 'signed' else HALF_WAVE)[bits] if method == 'hwgq' else None
    threshold = papers.start_threshold(method, seen, kind, bits, wave)
    assert float(quantizer.current_threshold()) == pytest.approx(threshold, rel=1e-5)
    x = 1.5 * batches[0]
    out = quantizer(x)
    expected = papers.activation(method, double(x), threshold, kind, bits, seen.min())
    np.testing.assert_allclose(double(out), expected, rtol=1e-5, atol=1e-6)
    assert len(torch.unique(out)) <= 2**bits
    assert quantizer(torch.zeros(5)).tolist() == [0] * 5
    assert torch.equal(out, quantizer.eval()(x)), 'evaluation'
    assert torch.equal(out, frozen(quantizer).train()(x)), 'frozen'


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_the_kind_of_activations_is_decided_by_calibration(method, kind):
    signed = method == 'log2' and kind == 'zero_point'  # powers of two have no zero point
    assert activation_quantizer(method, inputs(kind)).kind == ('signed' if signed else kind)


@pytest.mark.parametrize('method', ACTIVATIONS)
def test_an_empty_tensor_passes_and_leaves_no_trace(method):
    empty = torch.zeros(0, 4, 3, 3)
    fresh = ACTIVATION_METHODS[method](4)
    assert fresh.eval()(empty) is empty and fresh.train()(empty) is empty and not fresh.calibrated
    assert not activation_quantizer(method, empty).calibrated
    quantizer = activation_quantizer(method, inputs('unsigned'), empty)
    quantizer(inputs('unsigned'))
    before = copy.deepcopy(quantizer.state_dict())
    assert quantizer(empty) is empty and same(before, quantizer.state_dict())


@pytest.mark.parametrize('range', ['auto', 'unsigned', 'signed', 'zero_point'])
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_an_all_zero_tensor_gives_zeros_and_finite_gradients(method, range):
    x = torch.zeros(2, 4, 3, 3, requires_grad=True)
    quantizer = activation_quantizer(method, x, range=range)
    out = quantizer(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out)) and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in quantizer.parameters())
    assert torch.equal(quantizer.eval()(x), out) and torch.isfinite(quantizer(torch.randn(50))).all()


@pytest.mark.parametrize('kind', INPUTS)
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
    bits = data.draw(st.sampled_from([b for b in (2, 3, 4, 8) if b in ACTIVATION_METHODS[method].allowed_bits]))
    range_ = data.draw(st.sampled_from(['auto', 'unsigned', 'signed', 'zero_point']))
    x = torch.from_numpy(values)
    quantizer = activation_quantizer(method, x, bits=bits, range=range_).eval()
    with torch.no_grad():
        out = quantizer(torch.cat([x, torch.zeros(1)]))
    assert torch.isfinite(out).all() and out[-1] == 0 and len(torch.unique(out)) <= 2**bits
    assert quantizer.kind == range_ or range_ == 'auto' or (method, range_) == ('log2', 'zero_point')


def test_a_running_largest_value():
    """T <- T + m * (max|x| - T) once a step, the mean over its forwards."""
    quantizer = activation_quantizer('minmax', torch.tensor([0.0, 4.0]), momentum=0.25)
    for largest in (8.0, 2.0):
        quantizer(torch.tensor([0.5, -largest]))
        assert float(quantizer.threshold) == 4
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.threshold) == 4 + 0.25 * (5 - 4)
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.threshold) == 4.25, 'no forward since'


@pytest.mark.parametrize(('kind', 'sigmas'), [('unsigned', HALF_WAVE), ('signed', FULL_WAVE)])
@pytest.mark.parametrize('bits', [2, 4])
def test_the_step_of_hwgq_is_that_of_the_standard_deviation(kind, sigmas, bits):
    noise = 3.0 * torch.randn(200_000)
    quantizer = activation_quantizer('hwgq', INPUTS[kind](noise), bits=bits)
    assert float(quantizer.step()) == pytest.approx(3.0 * sigmas[bits], rel=0.01)
    quantizer(INPUTS[kind](2 * noise))
    move_thresholds([quantizer], collected([quantizer]))
    assert float(quantizer.step()) == pytest.approx(3.0 * sigmas[bits] * 1.01, rel=0.01), 'it follows'


@pytest.mark.parametrize('bits', range(2, 9))
def test_the_tables_of_hwgq(bits):
    assert HALF_WAVE[bits] == pytest.approx(papers.best_wave_step(2**bits - 1, zero=False), abs=0.001)
    assert FULL_WAVE[bits] == pytest.approx(papers.best_wave_step(2 ** (bits - 1) - 1, zero=True), abs=0.001)


@pytest.mark.parametrize('method', ['ptq', 'dorefa', 'log2'])
def test_a_threshold_that_neither_learns_nor_follows_stays(method):
    quantizer = activation_quantizer(method, inputs('signed'))
    before = float(quantizer.step())
    quantizer(10 * inputs('signed'))
    assert float(quantizer.step()) == before and not quantizer.follows and not list(quantizer.parameters())


# ---- activations: gradients -----------------------------------------------------------------------------------------

CLIPPING = ['dorefa', 'pact', 'lsq', 'lsq_plus', 'minmax', 'ptq']


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
@pytest.mark.parametrize('kind', INPUTS)
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


@pytest.mark.parametrize('kind', INPUTS)
def test_the_gradient_of_logarithmic_activations_passes_everywhere(kind):
    x = inputs(kind)
    _, upstream, gradient = gradients(activation_quantizer('log2', x), 2 * x)
    np.testing.assert_array_equal(gradient, upstream)


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('bits', [2, 4])
def test_the_gradient_of_the_clipping_level_of_pact(kind, bits):
    quantizer = activation_quantizer('pact', 0.5 * inputs(kind), bits=bits)
    x, alpha = inputs(kind), float(quantizer.alpha.detach())
    _, upstream, _ = gradients(quantizer, x)
    expected = papers.pact_gradient(double(x), alpha, quantizer.lo, quantizer.hi, upstream)
    assert float(quantizer.alpha.grad) == pytest.approx(expected, rel=1e-4)
    assert expected != 0


@pytest.mark.parametrize(
    ('method', 'kind'), [*(('lsq', kind) for kind in INPUTS), ('lsq_plus', 'unsigned'), ('lsq_plus', 'signed')]
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


def test_the_offset_of_lsq_plus_decides_the_codes_of_evaluation():
    x = inputs('zero_point')
    quantizer = activation_quantizer('lsq_plus', x, bits=4)
    zero_point = -quantizer.lo
    quantizer.beta.data -= 2 * quantizer.learned_step.data
    out = quantizer.train()(x)
    assert (quantizer.lo, quantizer.hi) == (-zero_point - 2, 15 - zero_point - 2)
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
            quantizer.eval().train()
        quantizer(x).sum().backward()
        found.append((float(quantizer.learned_step.grad), float(quantizer.beta.grad)))
    assert found[0] == found[1]


@pytest.mark.parametrize('kind', ['unsigned', 'signed'])
def test_the_offset_of_lsq_plus_stays_zero_without_a_zero_point(kind):
    x = inputs(kind)
    quantizer = activation_quantizer('lsq_plus', x)
    gradients(quantizer, x)
    assert float(quantizer.beta.detach()) == 0 and float(quantizer.beta.grad) == 0


@pytest.mark.parametrize('kind', INPUTS)
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


# ---- zeros at the start ---------------------------------------------------------------------------------------------


def fit(quantizer, value, target, parameters):
    """The squared error after gradient descent, as a share of that of zeros."""
    optimizer = torch.optim.SGD([*parameters, *quantizer.parameters()], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(value()) - target).square().mean().backward()
        optimizer.step()
        if getattr(quantizer, 'follows', False):
            move_thresholds([quantizer], collected([quantizer]))
    return float((quantizer(value()) - target).square().mean() / target.square().mean())


@pytest.mark.parametrize('range', ['auto', 'zero_point'])
@pytest.mark.parametrize('method', ACTIVATIONS)
def test_a_branch_that_is_zero_at_first_learns(method, range):
    """OpenMMLab's ResNets start residual branches at zero: a threshold that stays zero would keep them there."""
    quantizer = activation_quantizer(method, torch.zeros(4, 8), bits=4, range=range)
    x, scale = torch.relu(torch.randn(64, 8)).clamp(max=0.9), torch.full((8,), 0.0, requires_grad=True)
    assert fit(quantizer, lambda: x * scale, x, [scale]) < 0.75


@pytest.mark.parametrize('method', ['lsq', 'lsq_plus', 'minmax', 'twn', 'ttq', 'syq', 'xnor', 'log2'])
def test_weights_that_are_zero_at_first_learn(method):
    """The last layers of some heads and the offsets of deformable layers start at zero."""
    weight, target = torch.zeros(4, 16, requires_grad=True), torch.randn(4, 16)
    quantizer = weight_quantizer(method, weight, few_bits(method))
    assert fit(quantizer, lambda: weight, target, [weight]) < 0.75


def test_a_learned_threshold_of_gdrq_starts_above_zero_too():
    weight, target = torch.zeros(4, 16, requires_grad=True), torch.randn(4, 16)
    quantizer = weight_quantizer('gdrq', weight, 4, threshold='learned')
    assert fit(quantizer, lambda: weight, target, [weight]) < 0.75


@pytest.mark.parametrize('method', ['ptq', 'lsq_plus'])
def test_every_rank_finds_the_same_threshold(method):
    """Ranks are threads here, each with batches of its own; torch tests its collectives in this way."""
    group, store, found, errors = multi_threaded_pg, torch.distributed.HashStore(), {}, []
    batches = [inputs('unsigned', 40, 6), 2 * inputs('unsigned', 60, 6)]

    def work(rank):
        try:
            torch.distributed.init_process_group('threaded', rank=rank, world_size=2, store=store)
            model = nn.Sequential(nn.Linear(6, 6))
            quantize_model(nn.Sequential(model), Quantization.from_dict(everywhere(method, method)))
            calibrate(model, [batches[rank]])
            found[rank] = float(model[0].input_quant.step())
            torch.distributed.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            group.ProcessLocalGroup.exception_handle(error)

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    group._install_threaded_pg()
    try:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        group._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    assert not errors and found[0] == found[1]
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
    quantizer.set_state(stage=Stage.OBSERVE)
    model(x)
    assert torch.equal(quantizer.samples, seen[0].flatten())


# ---- a small network ------------------------------------------------------------------------------------------------


def few_bits(method):
    """4 bits, or the most that the method has."""
    return min(4, WEIGHT_METHODS[method].allowed_bits[-1])


def everywhere(weight, activation, **weight_options):
    """A quantization dict with these methods in all layers, the first and the last one too."""
    sides = dict(
        weight=dict(method=weight, bits=few_bits(weight), **weight_options), activation=dict(method=activation, bits=4)
    )
    return dict(**sides, overrides={'*': sides})


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
    assert {layer.bits for layer in layers} == {(few_bits(methods[0]), 4)}
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
        for quantizer in activation_quantizers(model).values():
            if quantizer.follows:
                move_thresholds([quantizer], collected([quantizer]))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name: not torch.equal(parameters[name].detach(), start[name]) for name in learned}
    expected = {name: not name.endswith('beta') or learned[name].kind == 'zero_point' for name in learned}
    assert taken == moved == expected
    with torch.no_grad():
        assert float(cross_entropy(model.eval()(x), labels)) < 0.7 * losses[0]


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


# ---- runs on digits -------------------------------------------------------------------------------------------------

RUNS = {
    'lsq': {},
    'lsq_plus': dict(activation=dict(bits=4, range='zero_point', lsq_plus=dict(lr_mult=2.0))),
    'pact': dict(activation=dict(bits=4, pact=dict(lr_mult=0.5, decay_mult=3.0))),
    'ttq': dict(weight=dict(bits=2, ttq=dict(lr_mult=0.5))),
    'syq': dict(weight=dict(bits=2)),
    'minmax': {},
    'hwgq': {},
}
MULTIPLES = dict(lsq=(1.0, 0.0), lsq_plus=(2.0, 0.0), pact=(0.5, 3.0), ttq=(0.5, 0.0), syq=(1.0, 0.0))
"""Learning rate and weight decay of what is learned, as multiples of those of weights."""
RESUMED = ['lsq_plus', 'pact', 'ttq', 'minmax', 'hwgq']
EMA = dict(type='EMAHook', momentum=0.3)


def run_config(method, **schedule):
    return dict(method=method, calibration_batches=1, schedule=schedule, **copy.deepcopy(RUNS[method]))


@pytest.fixture(scope='module')
def whole(digits_root, tmp_path_factory):
    """Trains a method for 2 epochs with EMA, once: its runner, learned Parameters and scores by iteration."""

    @functools.cache
    def run(method):
        cfg = tiny_config(
            digits_root, tmp_path_factory.mktemp(method), run_config(method), 2, custom_hooks=[copy.deepcopy(EMA)]
        )
        runner = QuantRunner.from_cfg(cfg)
        names, history = learned_parameters(runner.model), []
        scores = scores_of(runner)
        parameters = dict(runner.model.named_parameters())
        train(runner, lambda r: history.append({name: parameters[name].detach().clone() for name in names}))
        return runner, history, scores

    return run


@pytest.mark.parametrize('method', MULTIPLES)
def test_learned_parameters_are_in_the_optimizer(method, make):
    runner = make(quantization=run_config(method))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    groups = {id(p): g for g in runner.optim_wrapper.param_groups for p in g['params']}
    parameters, base = dict(runner.model.named_parameters()), runner.cfg.optim_wrapper.optimizer
    learned = learned_parameters(runner.model)
    assert learned and base.weight_decay > 0
    for name, quantizer in learned.items():
        of_activations = method == 'lsq_plus' and isinstance(quantizer, WeightQuantizer)  # were given to them only
        lr_mult, decay_mult = (1.0, 0.0) if of_activations else MULTIPLES[method]
        group = groups[id(parameters[name])]
        assert (group['lr'], group['weight_decay']) == (lr_mult * base.lr, decay_mult * base.weight_decay)
    others = {id(p) for name, p in parameters.items() if name not in learned}
    assert {(groups[i]['lr'], groups[i]['weight_decay']) for i in others} == {(base.lr, base.weight_decay)}


def test_the_optimizer_settings_of_a_config_are_kept(make):
    given = dict(norm_decay_mult=0.0, custom_keys={'head.fc': dict(lr_mult=3.0)})
    runner = make(quantization=run_config('lsq'), **{'optim_wrapper.paramwise_cfg': given})
    wrapper, base = runner.build_optim_wrapper(runner.cfg.optim_wrapper), runner.cfg.optim_wrapper.optimizer
    groups = {id(p): (g['lr'], g['weight_decay']) for g in wrapper.param_groups for p in g['params']}
    found = {name: groups[id(p)] for name, p in runner.model.named_parameters()}
    assert found['backbone.bn1.weight'] == (base.lr, 0) and found['backbone.conv1.weight'] == (base.lr, 5e-4)
    assert found['head.fc.weight'] == (3 * base.lr, base.weight_decay)
    assert {found[name] for name in learned_parameters(runner.model)} == {(base.lr, 0)}
    assert runner.cfg.optim_wrapper.paramwise_cfg == given, 'the config is left as it was'


@pytest.mark.parametrize('method', RESUMED)
def test_a_resumed_run_equals_an_undisturbed_one(method, whole, make):
    runner, history, _ = whole(method)
    learned = learned_parameters(runner.model)
    assert len(history) == 8 and bool(learned) == (method in MULTIPLES)
    last = [torch.cat([value.flatten() for value in history[i].values()]) for i in (3, 7)] if learned else [0, 1]
    assert not same(*last), 'they move after the interruption'
    checkpoint = checkpoint_of(runner)
    changes = dict(quantization=run_config(method), epochs=2, custom_hooks=[copy.deepcopy(EMA)])
    resumed = make(**changes, resume=True, load_from=checkpoint)
    train(resumed)
    assert same(contents(runner, 'epoch_2.pth'), contents(resumed, 'epoch_2.pth'))


@pytest.mark.parametrize('method', ['lsq_plus', 'pact', 'ttq'])
def test_the_average_of_ema_takes_learned_parameters_and_evaluates(method, whole, make):
    runner, history, validated = whole(method)
    saved = contents(runner, 'epoch_2.pth')
    expected = {name: double(value) for name, value in history[0].items()}
    for later in history[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * double(later[name]) for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(double(saved['state_dict'][name]), value, rtol=1e-4, atol=1e-7)
        assert torch.equal(saved['ema_state_dict'][f'module.{name}'], history[-1][name]), 'our own is kept there'
    moved = [name for name in expected if not torch.equal(saved['state_dict'][name], history[-1][name])]
    assert len(moved) > len(expected) / 3
    load = checkpoint_of(runner, 'epoch_2.pth')
    tester = make('test', quantization=run_config(method), load_from=load, **TEST_ONLY)
    tested = scores_of(tester)
    tester.test()
    assert torch.equal(tested[0], validated[-1])


@pytest.mark.parametrize('method', MULTIPLES)
def test_frozen_thresholds_stand_still_and_their_gradients_are_zeros(method, make):
    runner = make(quantization=run_config(method, freeze=0.5), epochs=1)
    learned = learned_parameters(runner.model)
    filters = {layer.weight_quant: layer.filters for layer in quant_layers(runner.model).values()}
    parameters = dict(runner.model.named_parameters())
    stages, thresholds, found = [], [], {}
    for name in learned:
        parameters[name].register_hook(lambda grad, name=name: found.setdefault(name, []).append(grad.clone()))

    def scales_of(quantizer):
        if quantizer not in filters:
            return quantizer.step().clone(), quantizer.lo, quantizer.hi
        weight = filters[quantizer]()
        return torch.unique(quantizer(weight)) if method == 'ttq' else quantizer.step(weight).clone()

    @torch.no_grad()
    def look(runner):
        stages.append({quantizer.stage for quantizer in learned.values()})
        thresholds.append({name: scales_of(quantizer) for name, quantizer in learned.items()})

    train(runner, look)
    assert stages == [{Stage.QUANTIZE}] * 2 + [{Stage.FREEZE}] * 2
    assert learned and not same(thresholds[0], thresholds[1]), 'they learn before'
    assert same(thresholds[1], thresholds[2]), 'those of this moment are kept'
    assert same(thresholds[2], thresholds[3])
    assert set(found) == set(learned)
    for grads in found.values():
        assert len(grads) == 4, 'none is missing'
        assert not grads[2].any() and not grads[3].any()
    assert any(grads[1].any() for grads in found.values())


# ---- stock models ---------------------------------------------------------------------------------------------------

FCN = dict(
    stock='mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    model={
        'backbone.stem_channels': 8,
        'backbone.base_channels': 8,
        'decode_head.in_channels': 64,
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 32,
        'auxiliary_head.channels': 16,
    },
)
STOCK = dict(
    classifier=dict(
        stock='mmpretrain::resnet/resnet18_8xb16_cifar10.py',
        size=32,
        model={'backbone.stem_channels': 8, 'backbone.base_channels': 8, 'head.in_channels': 64},
    ),
    detector=YOLOX,
    segmentor=FCN,
)


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """Builds a float model of a library once: a runner for it, the model and what feeds what."""

    @functools.cache
    def built(task):
        cfg = build(tmp_path_factory.mktemp(task), **STOCK[task]).cfg
        cfg.pop('quantization')
        cfg.experiment_name = f'{task}_float'
        runner = QuantRunner.from_cfg(cfg)
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        settle(runner)
        return runner, runner.model, record(runner.model, lambda: predict(runner))

    return built


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('task', STOCK)
def test_every_method_trains_and_predicts_in_every_task(task, method, stock):
    runner, float_model, plan = stock(task)
    model = runner.model = copy.deepcopy(float_model)
    bits = few_bits(METHODS[method][0])
    cfg = Quantization.from_dict(dict(method=method, weight=dict(bits=bits)))
    quantize_model(model, cfg, plan)
    CalibrationHook(1).before_train(runner)
    kinds = {quantizer.kind for quantizer in activation_quantizers(model).values() if quantizer.bits == 4}
    assert ('zero_point' in kinds) == (task == 'detector' and method != 'log2')
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    losses = model.train().train_step(batch_of(runner), optimizer)
    assert all(torch.isfinite(value).all() for value in losses.values())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    weights = {f'{name}.weight' for name, layer in quant_layers(model).items() if layer.weight_quant is not None}
    assert len(weights & moved) > 0.8 * len(weights) and all(value.isfinite().all() for value in model.parameters())
    assert bool(moved & set(learned_parameters(model))) == bool(learned_parameters(model))
    check_result_of(task, predict(runner))


def check_result_of(task, result):
    if task == 'classifier':
        assert all(sample.pred_score.isfinite().all() and len(sample.pred_score) == 10 for sample in result)
    else:
        check_result(result, **STOCK[task])
