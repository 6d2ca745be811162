"""The integer program of mixed precision: bits of the least summed sensitivity that fit the budgets."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..errors import UserError
from .budgets import Budget, Pair

Sensitivities = Mapping[str, Mapping[int, float]]
"""Name of a choice -> bits -> what these bits cost, in any unit that adds up."""

SCALE = 1e4
"""Largest coefficient of the objective: the solver's gap of 1e-6 is absolute."""
GAP = 1e-6
"""How far from the optimum an answer may be, as a share of it."""
SECONDS, BRIEFLY = 60, 5
"""Time for the program that chooses, and for each of the others; the best answer until then counts."""


class OutOfTime(UserError):
    """A program found nothing in its time."""


@dataclass(frozen=True)
class Solution:
    """Bits for every choice."""

    name: str
    """'mixed', or uniform bits such as 'W3A4'."""
    bits: Mapping[str, int]
    """Choice -> bits."""
    loss: float
    """Sum of the sensitivities."""
    used: Mapping[str, float]
    """Kind of each budget -> what the bits cost."""


@dataclass(frozen=True)
class Program:
    """The choices, which layers they belong to, and the budgets."""

    choices: Sensitivities
    """One bit width: nothing to choose."""
    layers: Mapping[str, tuple[str, str]]
    """Layer -> the choice of its weight, and that of its input. Layers may share a choice."""
    budgets: Sequence[Budget]

    def pairs(self, bits: Mapping[str, int]) -> dict[str, Pair]:
        """Layer -> bits, given those of the choices."""
        return {layer: Pair(bits[weight], bits[input]) for layer, (weight, input) in self.layers.items()}

    def solution(self, name: str, bits: Mapping[str, int]) -> Solution:
        """These bits, with their loss and their costs."""
        loss = sum(self.choices[choice][b] for choice, b in bits.items())
        return Solution(name, bits, loss, {each.kind: each.used(self.pairs(bits)) for each in self.budgets})

    def fits(self, solution: Solution) -> bool:
        """Whether bits are within every budget."""
        return all(solution.used[each.kind] <= each.limit for each in self.budgets)

    def solve(self) -> Solution:
        """The bits of least loss.

        Raises:
            UserError: a budget is below the least possible, which the message names; or two cannot be met together; or
                there was no time to find any bits.
        """
        bits = self._minimize(seconds=SECONDS)
        if bits is None:
            self._refuse()
            raise AssertionError('a budget is impossible')
        return self.solution('mixed', bits)

    def extreme(self, kind: str, most: bool = False) -> float:
        """The least that bits can cost, of one kind, within the other budgets; or the most, whatever the budgets."""
        (budget,) = (each for each in self.budgets if each.kind == kind)
        if most:
            free = replace(self, budgets=())
            return budget.used(free.pairs({c: max(options) for c, options in self.choices.items()}))
        others = replace(self, budgets=[each for each in self.budgets if each is not budget])
        bits = others._minimize(budget)
        return budget.used(others.pairs(bits)) if bits is not None else np.inf

    def uniform(self) -> list[Solution]:
        """The same bits in all layers that have a choice, such as 'W3A4': the points to compare with.

        A choice without these bits has the nearest that it has.
        """
        sides = [dict.fromkeys(choices) for choices in zip(*self.layers.values())]
        usual, free = [], []
        for side in sides:
            usual.append(Counter(min(self.choices[c]) for c in side if len(self.choices[c]) == 1))
            free.append(sorted({b for c in side if len(self.choices[c]) > 1 for b in self.choices[c]}))
        weights, inputs = (own or [common.most_common(1)[0][0]] for own, common in zip(free, usual))
        found = []
        for w in weights:
            for a in inputs:
                wanted = {**dict.fromkeys(sides[1], a), **dict.fromkeys(sides[0], w)}
                bits = {c: min((abs(own - b), own) for own in self.choices[c])[1] for c, b in wanted.items()}
                found.append(self.solution(f'W{w}A{a}', bits))
        return found

    def curve(self, count: int = 16) -> list[Solution]:
        """Answers for limits of the first budget from the least to the most possible, without those no better."""
        first, *others = self.budgets
        low, high = self.extreme(first.kind), self.extreme(first.kind, most=True)
        found: list[Solution] = []
        for limit in np.linspace(low, high, count) if np.isfinite(low) else ():
            bits = None
            with contextlib.suppress(OutOfTime):
                bits = replace(self, budgets=[replace(first, limit=limit * (1 + 1e-9)), *others])._minimize()
            if bits is not None:
                each = self.solution('mixed', bits)
                if not found or each.loss < found[-1].loss:
                    found.append(each)
        return found

    def _refuse(self) -> None:
        """Raise the UserError that tells which budget is impossible."""
        for budget in self.budgets:
            alone = replace(self, budgets=[budget])
            least, most = alone.extreme(budget.kind), alone.extreme(budget.kind, most=True)
            if least > budget.limit:
                raise UserError(budget.impossible(least, most))
        last = self.budgets[-1]
        others = ' and '.join(f'{each.kind} within {each.text(each.limit)}' for each in self.budgets[:-1])
        raise UserError(
            f'budget {last.kind}: {last.text(last.limit)} is impossible together with {others}; the least is then '
            f'{last.text(self.extreme(last.kind), up=True)}'
        )

    def _minimize(self, budget: Budget | None = None, seconds: float = BRIEFLY) -> dict[str, int] | None:
        """The bits of each choice with the least loss, or the least cost in `budget`; None if no bits fit.

        Of several answers with the least loss it is one with the most bits: fewer would save what nobody asked for.
        """
        shrink = 0.0
        while shrink < 1e-3:
            bits = self._try(budget, shrink, seconds)
            if bits is None:
                return None
            found = self.solution('', bits)
            if self.fits(found):
                more = None
                with contextlib.suppress(OutOfTime):
                    more = self._try(None, shrink, BRIEFLY, found.loss) if budget is None else None
                other = found if more is None else self.solution('', more)
                as_good = other.loss <= found.loss + 2 * GAP * abs(found.loss)
                return dict(other.bits) if as_good and self.fits(other) else bits
            shrink = 4 * shrink + 1e-6  # beyond the limit by less than what the solver tolerates
        return None

    def _try(
        self, budget: Budget | None, shrink: float, seconds: float, loss: float | None = None
    ) -> dict[str, int] | None:
        """One variable for each choice and its bits, 0 or 1, and one for each layer and pair of bits.

        The second are the products of the first where these are whole, so that costs of pairs are linear.

        Args:
            loss: find the most bits that lose no more than this, up to GAP of it.

        Raises:
            OutOfTime: no bits were found, and it is not known whether there are any.
        """
        names = [(choice, b) for choice, options in self.choices.items() for b in options]
        start: dict[str, dict[int, int]] = {choice: {} for choice in self.choices}
        for number, (choice, b) in enumerate(names):
            start[choice][b] = number
        pairs: dict[tuple[str, Pair], int] = {}
        for layer, (weight, input) in self.layers.items():
            for w in self.choices[weight]:
                for a in self.choices[input]:
                    pairs[layer, Pair(w, a)] = len(names) + len(pairs)
        rows = _Rows(len(names) + len(pairs))
        for options in start.values():
            rows.add(dict.fromkeys(options.values(), 1.0), 1, 1)
        for layer, (weight, input) in self.layers.items():
            for w, number in start[weight].items():
                rows.add({number: -1.0, **{pairs[layer, Pair(w, a)]: 1.0 for a in start[input]}}, 0, 0)
            for a, number in start[input].items():
                rows.add({number: -1.0, **{pairs[layer, Pair(w, a)]: 1.0 for w in start[weight]}}, 0, 0)
        for each in self.budgets:
            rows.add(_scaled(each, pairs), -np.inf, (each.limit * (1 - shrink) - each.fixed) / abs(each.limit or 1))
        objective, losses = np.zeros(rows.columns), [self.choices[choice][b] for choice, b in names]
        most = np.ones(rows.columns)
        if loss is not None:
            if min(losses) >= 0:  # else a gain could pay for what alone would be too much
                most[: len(names)] = [value <= loss * (1 + GAP) for value in losses]
            unit = abs(loss) or 1.0
            small = {number: value / unit for number, value in enumerate(losses) if most[number]}
            rows.add(small, -np.inf, loss / unit + GAP)
            objective[: len(names)] = [-b for _, b in names]
        elif budget is None:
            objective[: len(names)] = losses
        else:
            for number, value in _scaled(budget, pairs).items():
                objective[number] = value
        objective *= SCALE / (np.abs(objective).max() or 1)
        whole = np.arange(rows.columns) < len(names)
        values = rows.solve(objective, whole, most, seconds)
        if values is None:
            return None
        return {choice: max(options, key=lambda b: values[options[b]]) for choice, options in start.items()}


class _Rows:
    """Linear constraints, row by row."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.low: list[float] = []
        self.high: list[float] = []
        self.entries: list[tuple[int, int, float]] = []

    def add(self, values: Mapping[int, float], low: float, high: float) -> None:
        """low <= sum(value * variable) <= high, for number of a variable -> value."""
        self.entries += [(len(self.low), column, value) for column, value in values.items()]
        self.low.append(low)
        self.high.append(high)

    def solve(self, objective: np.ndarray, whole: np.ndarray, most: np.ndarray, seconds: float) -> np.ndarray | None:
        """The variables from 0 to `most`, some of them `whole`, of the least objective; None if there are none.

        Raises:
            OutOfTime: none were found, and it is not known whether there are any.
        """
        row, column, value = zip(*self.entries)
        matrix = coo_array((value, (row, column)), shape=(len(self.low), self.columns)).tocsc()
        found = milp(
            objective,
            integrality=whole,
            bounds=Bounds(0, most),
            constraints=LinearConstraint(matrix, self.low, self.high),
            options=dict(mip_rel_gap=GAP, time_limit=seconds),
        )
        out_of_time = found.status == 1
        if found.x is None and out_of_time:
            raise OutOfTime(f'no bits were found within {seconds} s; give fewer to choose from (bits)')
        if found.x is not None and out_of_time and seconds == SECONDS:  # of the other programs any answer will do
            warnings.warn(
                f'the time of {SECONDS} s ran out: the best bits may lose up to {found.mip_gap:.1%} less than these',
                stacklevel=2,
            )
        return found.x


def _scaled(budget: Budget, pairs: Mapping[tuple[str, Pair], int]) -> dict[int, float]:
    """Number of a variable -> what its layer costs with its bits, as a share of the limit."""
    unit = abs(budget.limit or 1)
    return {
        number: budget.costs[layer][pair] / unit for (layer, pair), number in pairs.items() if layer in budget.costs
    }


def monotone(sensitivities: Sensitivities) -> dict[str, dict[int, float]]:
    """Sensitivities of at least 0 that do not grow with the bits: a measured gain by fewer bits is taken for chance.

    Raises:
        UserError: one is not finite.
    """
    found: dict[str, dict[int, float]] = {}
    for choice, options in sensitivities.items():
        worst, found[choice] = 0.0, {}
        for b in sorted(options, reverse=True):
            if not math.isfinite(options[b]):
                raise UserError(f'the sensitivity of {choice} to {b} bits is {options[b]}')
            worst = found[choice][b] = max(worst, options[b])
    return found
