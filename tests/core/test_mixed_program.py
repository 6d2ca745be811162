"""Mixed precision: the laws of the integer program and its budgets, on programs of any kind."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.mixed import program as program_module
from gdrq_mm.core.mixed.budgets import Budget, Pair, read_budgets
from gdrq_mm.core.mixed.program import Program, monotone

WIDTHS = (2, 3, 4, 8)


@st.composite
def programs(draw):
    """A few layers, some of which share an input or a weight, with a budget of size and one of operations."""
    number = draw(st.integers(1, 4))
    inputs = [draw(st.integers(0, i)) for i in range(number)]
    weights = [draw(st.sampled_from([i, i, 0])) for i in range(number)]
    layers = {f'l{i}': (f'w{weights[i]}', f'a{inputs[i]}') for i in range(number)}
    options = st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3, unique=True).map(sorted)
    value = st.integers(0, 1000).map(lambda n: n / 7)
    choices = {c: {b: draw(value) for b in draw(options)} for c in dict.fromkeys(c for p in layers.values() for c in p)}
    kinds = [draw(st.sampled_from(['size', 'bitops'])), 'ms'][: draw(st.integers(1, 2))]
    budgets = []
    for kind in kinds:
        costs = {}
        for layer, (weight, input) in layers.items():
            count = draw(st.integers(0, 50))
            pairs = [Pair(w, a) for w in choices[weight] for a in choices[input]]
            costs[layer] = {p: float(count * p.weight * (p.input if kind != 'size' else 1)) for p in pairs}
        fixed = float(draw(st.integers(0, 100)))
        budgets.append(Budget(kind, float(draw(st.integers(1, 4000))), 4000.0, fixed, costs))
    return Program(choices, layers, budgets)


def every_solution(program):
    names = list(program.choices)
    for bits in itertools.product(*(program.choices[name] for name in names)):
        yield program.solution('any', dict(zip(names, bits)))


@settings(max_examples=60, deadline=None)
@given(programs())
def test_the_program_is_as_good_as_any_bits_that_fit(program):
    """Brute force; uniform bits are among them. If none fit, the message names a least that is right."""
    fitting = [each for each in every_solution(program) if program.fits(each)]
    if not fitting:
        with pytest.raises(UserError, match='impossible') as refused:
            program.solve()
        for budget in program.budgets:
            least = min(each.used[budget.kind] for each in every_solution(program))
            if least > budget.limit:
                said = str(refused.value)
                assert f'budget {budget.kind}: ' in said and budget.text(least, up=True) in said
                break
        return
    found = program.solve()
    assert program.fits(found)
    assert found.loss == pytest.approx(min(each.loss for each in fitting), rel=1e-5, abs=1e-4)
    for uniform in program.uniform():
        assert not program.fits(uniform) or found.loss <= uniform.loss + 1e-4


@settings(max_examples=30, deadline=None)
@given(programs(), st.integers(0, 1))
def test_no_answer_of_the_same_loss_has_more_bits(program, losses):
    """Brute force, with sensitivities that are all 0, or 0 and 1."""
    tables = {c: {b: float(losses and b < 4) for b in options} for c, options in program.choices.items()}
    program = Program(tables, program.layers, program.budgets)
    fitting = [each for each in every_solution(program) if program.fits(each)]
    if fitting:
        found, least = program.solve(), min(each.loss for each in fitting)
        assert found.loss == least
        assert sum(found.bits.values()) == max(sum(each.bits.values()) for each in fitting if each.loss == least)


@settings(max_examples=20, deadline=None)
@given(programs())
def test_a_larger_budget_loses_less(program):
    curve = program.curve(5)
    first = program.budgets[0].kind
    assert [each.loss for each in curve] == sorted((each.loss for each in curve), reverse=True)
    least = min((each.used[first] for each in every_solution(program) if fits_others(program, each)), default=None)
    assert (not curve) == (least is None)
    if curve:
        assert curve[0].used[first] == pytest.approx(least)


def fits_others(program, solution):
    return all(solution.used[each.kind] <= each.limit for each in program.budgets[1:])


def test_two_budgets_that_do_not_go_together():
    """Fewer bytes mean more operations here: the message tells what is left."""
    pairs = (Pair(2, 4), Pair(8, 4))
    size = Budget('size', 3, 10, 0, {'l': dict(zip(pairs, (2.0, 8.0)))})
    operations = Budget('bitops', 3, 10, 0, {'l': dict(zip(pairs, (8.0, 2.0)))})
    program = Program({'w': {2: 1.0, 8: 0.0}, 'a': {4: 0.0}}, {'l': ('w', 'a')}, [size, operations])
    with pytest.raises(UserError, match=r'budget bitops: .* is impossible together with size within 3 bytes'):
        program.solve()


def test_what_costs_far_too_much_does_not_blur_the_rest():
    """The tie-break allowed a share of the largest sensitivity."""
    choices = {'w1': {2: 100.0, 8: 1e-9}, 'w2': {2: 9e-5, 4: 0.0}, 'w3': {2: 1e-9, 8: 0.0}, 'a': {8: 0.0}}
    layers = {f'l{i}': (f'w{i}', 'a') for i in (1, 2, 3)}
    costs = {f'l{i}': {Pair(b, 8): size * b for b in choices[f'w{i}']} for i, size in ((1, 1), (2, 10), (3, 10))}
    found = Program(choices, layers, [Budget('size', 108, 500, 0, costs)]).solve()
    assert found.bits == {'w1': 8, 'w2': 4, 'w3': 2, 'a': 8} and found.loss == pytest.approx(2e-9)


def large_program(count=24, share=0.3):
    random = np.random.default_rng(0)
    choices = {f'w{i}': {b: float(random.exponential(4.0**-b)) for b in range(2, 9)} for i in range(count)}
    choices |= {f'a{i}': {b: float(random.exponential(4.0**-b)) for b in range(2, 9)} for i in range(count)}
    layers = {f'l{i}': (f'w{i}', f'a{i}') for i in range(count)}
    pairs = [Pair(w, a) for w in range(2, 9) for a in range(2, 9)]
    costs = {layer: {p: float(random.integers(9, 99)) * p.weight * p.input for p in pairs} for layer in layers}
    whole = sum(max(each.values()) for each in costs.values())
    return Program(choices, layers, [Budget('bitops', share * whole, whole, 0, costs)])


def test_a_program_without_time_does_not_call_its_budget_impossible(monkeypatch):
    monkeypatch.setattr(program_module, 'SECONDS', 1e-6)
    with pytest.raises(UserError, match='no bits were found within 1e-06 s'):
        large_program().solve()


def test_a_program_that_stops_early_says_how_far_it_may_be_off(monkeypatch):
    monkeypatch.setattr(program_module, 'SECONDS', 0.5)
    with pytest.warns(UserWarning, match=r'the time of 0\.5 s ran out: the best bits may lose up to .*% less'):
        assert large_program(60).solve().loss > 0


@pytest.mark.parametrize(('kind', 'unit'), [('size', 1), ('bitops', 1e9), ('ms', 1)])
@pytest.mark.parametrize('value', [1234567.2, 166812345.4, 0.00012345, 7.0])
def test_the_least_that_a_message_names_is_enough(kind, unit, value):
    whole = 123.4 * value * unit
    text = Budget(kind, 1, whole, 0, {}).text(value * unit, up=True)
    number, share = float(text.split()[0].replace(',', '')), float(text.split('(')[1].split()[0])
    assert value <= number <= max(value * 1.001, value + (kind == 'size')) and share * whole >= value * unit


def test_a_sensitivity_that_is_no_number_is_refused():
    for value in (float('nan'), float('inf')):
        with pytest.raises(UserError, match=f'the sensitivity of w to 2 bits is {value}'):
            monotone({'w': {2: value, 4: 0.1, 8: 0.0}})


def test_more_bits_never_cost_more():
    assert monotone({'w': {2: 0.5, 3: 0.1, 4: 0.3, 8: -0.2}}) == {'w': {8: 0.0, 4: 0.3, 3: 0.3, 2: 0.5}}


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (['size'], "budget size='' is no number"),
        (['sise=0.1'], "budget 'sise' is not one of size, bitops, ms; did you mean 'size'"),
        (['size=big'], "budget size='big' is no number"),
        (['size=nan'], 'budget size=nan is not above 0'),
        (['bitops=-1'], 'budget bitops=-1 is not above 0'),
        (['size=0.1', 'size=0.2'], 'budget size is given twice'),
        ({}, 'no budget is given'),
    ],
)
def test_budgets_that_are_none(given, message):
    with pytest.raises(UserError) as refused:
        read_budgets(given)
    assert message in str(refused.value)
