"""gdrq_mm/core/oscillation.py against Algorithm 1 of the paper, written in NumPy."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.oscillation import Oscillations, _begun, _moved
from gdrq_mm.core.quantizers import WEIGHT_METHODS
from tests.core.builders import few_bits, weight_quantizer

MIDDLE = 1
"""Name of the middle one of three layers: it has the low bits."""


def model_of(method='lsq', bits=3):
    """Three linear layers; the one in the middle has 2 x 3 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    quantize_model(model, Quantization.from_dict(dict(method=method, weight=dict(bits=bits))))
    calibrate(model, [torch.randn(8, 4)])
    model.train()(torch.randn(8, 4))
    return model


def algorithm_1(sequence, lo, hi, momentum, limit, apart):
    """Codes (T, ...) as the optimizer leaves them -> codes after freezing, frequency and average of the last step."""
    frequency, direction = np.zeros(sequence[0].shape, np.float32), np.zeros(sequence[0].shape)
    average, codes = sequence[0].astype(np.float32), sequence[0].copy()
    frozen = np.zeros(codes.shape, bool)
    for new in sequence[1:]:
        new = np.where(frozen, codes, new)
        change = np.sign(new - codes)
        oscillated = change * direction < 0
        frequency = momentum * oscillated + (1 - momentum) * frequency
        average = momentum * new + (1 - momentum) * average
        direction = np.where(change, change, direction)
        nearest = np.round(average) if apart == 1 else 2 * np.floor(average / 2) + 1
        chosen = (frequency > limit) & ~frozen
        codes = np.where(chosen, np.clip(nearest, lo, hi), new)
        frozen |= chosen
    return codes, frequency, average, frozen


@given(
    steps=arrays(np.int64, st.tuples(st.integers(2, 12), st.just(2), st.just(3)), elements=st.integers(-3, 3)),
    momentum=st.sampled_from([0.0625, 0.25, 0.5]),  # exact in float32
    limit=st.sampled_from([0.05, 0.2, 0.6]),
    bits=st.sampled_from([2, 3]),
)
def test_it_is_algorithm_1(steps, momentum, limit, bits):
    model = model_of('gdrq', 2) if bits == 2 else model_of(bits=bits)  # codes -3, -1, 1, 3; or -3 to 3
    layer = model[MIDDLE]
    quantizer = layer.weight_quant
    model.eval()
    quantizer.freeze(layer.filters())  # one step size for all
    steps = np.where(steps >= 0, 1, -1) * (1 + 2 * (abs(steps) > 1)) if bits == 2 else steps
    oscillations = Oscillations(model, (limit, limit), momentum)
    for codes in steps:
        state = oscillations.states.get(str(MIDDLE))
        with torch.no_grad():
            free = torch.tensor(codes) * quantizer.step(layer.filters())
            layer.weight.copy_(free if state is None else torch.where(state.frozen, layer.weight, free))
        oscillations.step()
    expected = algorithm_1(steps, quantizer.lo, quantizer.hi, momentum, limit, quantizer.apart)
    state = oscillations.states[str(MIDDLE)]
    for ours, theirs in zip((state.codes, state.frequency, state.average, state.frozen), expected):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    assert torch.equal(quantizer.codes(layer.filters()), state.codes), 'the weights hold what is frozen'


def alternate(model, oscillations, count):
    """Steps of an optimizer that moves one weight over the edge of a cell and back."""
    layer = model[MIDDLE]
    for number in range(count):
        with torch.no_grad():
            step = layer.weight_quant.step(layer.filters())
            layer.weight[0, 0] = (0.6 if number % 2 else 0.4) * step.flatten()[0]
            layer.weight[0, 1] += 0.1 * step.flatten()[0]
        oscillations.step()


def test_a_jump_across_all_codes_of_8_bits_has_its_direction():
    codes = torch.tensor([-100], dtype=torch.int8)
    assert _moved(_begun(codes), -codes, 0.01).direction.tolist() == [1]


def test_what_oscillates_is_frozen_and_what_drifts_is_not():
    model = model_of()
    oscillations = Oscillations(model, (0.3, 0.1), 0.1)
    alternate(model, oscillations, 8)
    state = oscillations.states[str(MIDDLE)]
    assert state.frozen.tolist() == [[True, False, False], [False] * 3]
    assert oscillations.shares() == (0.0, 1 / 22)
    drifted = model[MIDDLE].weight[0, 1].item()
    alternate(model, oscillations, 4)
    assert model[MIDDLE].weight[0, 1].item() > drifted
    assert model[MIDDLE].weight[0, 0] == state.codes[0, 0] * model[MIDDLE].weight_quant.step(None).flatten()[0]


def test_without_limits_it_only_counts():
    model = model_of()
    oscillations = Oscillations(model, None, 0.1)
    alternate(model, oscillations, 8)
    assert oscillations.shares() == (1 / 22, 0.0)


def test_the_limit_falls_by_a_cosine():
    oscillations = Oscillations(model_of(), (0.1, 0.02))
    assert [oscillations.limit(p) for p in (0, 0.5, 1)] == pytest.approx([0.1, 0.06, 0.02])


def test_a_frozen_weight_keeps_its_code_while_the_threshold_follows():
    model = model_of('gdrq', 4)
    oscillations = Oscillations(model, (0.3, 0.1), 0.1)
    alternate(model, oscillations, 8)
    layer, state = model[MIDDLE], oscillations.states[str(MIDDLE)]
    assert state.frozen[0, 0]
    for _ in range(5):
        with torch.no_grad():
            layer.weight.mul_(1.3)
        oscillations.step()
        assert layer.weight_quant.codes(layer.filters())[0, 0] == state.codes[0, 0]


@pytest.mark.parametrize('method', ['dorefa', 'pact', 'balanced'])
def test_weights_that_would_not_keep_their_codes_are_counted_alone(method):
    model = model_of(method, 4)
    with pytest.raises(UserError, match=f'layer {MIDDLE} cannot be held at their codes; limits=None'):
        Oscillations(model)
    Oscillations(model, limits=None).step()


@pytest.mark.parametrize('method', WEIGHT_METHODS)
def test_whether_a_weight_keeps_its_code(method):
    torch.manual_seed(0)
    weight = torch.randn(8, 16, 3, 3)
    quantizer = weight_quantizer(method, weight, few_bits(method))
    if not quantizer.uneven:
        codes, held = quantizer.round(weight, quantizer.step(weight)), torch.rand(weight.shape) < 0.1
        moved = torch.where(held, codes * quantizer.step(weight), weight)
        again = quantizer.round(moved, quantizer.step(moved))
        assert torch.equal(again[held], codes[held]) == quantizer.keeps


def test_lbw_with_3_bits_would_move_a_weight_that_is_held():
    """The cut goes by the largest weight, the value by the scale."""
    torch.manual_seed(0)
    moved = set()
    for scale in torch.logspace(-1, 0, 10):
        weight = scale * torch.randn(1, 64)
        quantizer = weight_quantizer('lbw', weight, 3, groups=1)
        step = quantizer.step(weight)
        codes = quantizer.round(weight, step)
        for place in (codes == 2).nonzero():
            held = weight.clone()
            held[tuple(place)] = 2 * step
            moved.add(float(quantizer.round(held, quantizer.step(held))[tuple(place)]))
    assert moved > {2.0} and not quantizer.keeps
    assert weight_quantizer('lbw', weight, 2, groups=1).keeps


def test_it_goes_on_where_its_state_was_taken():
    model = model_of()
    whole = Oscillations(model, (0.3, 0.1), 0.1)
    alternate(model, whole, 3)
    weights, state = model[MIDDLE].weight.detach().clone(), whole.state_dict()
    alternate(model, whole, 6)
    expected = whole.states[str(MIDDLE)]
    with torch.no_grad():
        model[MIDDLE].weight.copy_(weights)
    resumed = Oscillations(model, (0.3, 0.1), 0.1)
    resumed.load_state_dict(state)
    alternate(model, resumed, 1)
    alternate(model, resumed, 6)
    assert resumed.states[str(MIDDLE)].frozen.tolist() == expected.frozen.tolist()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0.1,), 'limits=0.1 is neither two numbers nor None'),
        (((0.1,),), r'limits=\(0.1,\) is neither'),
        ((('a', 'b'),), r"limits='a' is not in \(0, 1\]"),
        (((0, 0.1),), r'limits=0 is not in \(0, 1\]'),
        (((0.1, 2),), r'limits=2 is not in \(0, 1\]'),
        (((0.1, 0.01), 0.0), r'momentum=0.0 is not in \(0, 1\]'),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        Oscillations(model_of(), *arguments)


@pytest.mark.parametrize('wrong', [{'9': {}}, {'1': 3}, {'1': dict(codes=torch.zeros(2, 3))}])
def test_the_state_of_another_model(wrong):
    with pytest.raises(UserError, match='is not one of this model'):
        Oscillations(model_of()).load_state_dict(wrong)


def test_a_model_without_such_weights():
    with pytest.raises(UserError, match='no layer has weights'):
        Oscillations(nn.Linear(2, 2))
