"""Budgets: what the layers of a model cost with each number of bits, in bytes, bit operations or milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn as nn

from ..convert import LayerReport, Report
from ..errors import UserError
from ..modules import quant_layers
from ..products import factor_bits
from ..typed import FLOAT_BITS, near
from .choices import Candidates, Choice

FLOAT_BYTES = 4
UNITS = {'size': ('bytes', 1.0), 'bitops': ('G bit operations', 1e9), 'ms': ('ms', 1.0)}
"""Kind of a budget -> its unit as it is shown, and by what to divide."""


class Pair(NamedTuple):
    """Bits of a layer's weight and of its input; 32 is float."""

    weight: int
    input: int


@dataclass(frozen=True)
class Budget:
    """What the bits of all layers together may cost."""

    kind: str
    """A key of UNITS."""
    limit: float
    whole: float
    """What the float model costs."""
    fixed: float
    """What is the same whatever the bits."""
    costs: Mapping[str, Mapping[Pair, float]]
    """Layer -> bits -> cost."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """Layer or product without a choice, as a message names it -> its part of `fixed`."""

    def used(self, bits: Mapping[str, Pair]) -> float:
        """What these bits cost; layer -> bits."""
        return self.fixed + sum(costs[bits[layer]] for layer, costs in self.costs.items())

    def text(self, value: float, up: bool = False) -> str:
        """An amount with its unit and its share of the float model; both rounded up where it is a limit to take."""
        unit, divisor = UNITS[self.kind]
        share = value / self.whole if self.whole else 0.0
        if up and math.isfinite(value):
            places = 0 if self.kind == 'size' else 3 - math.floor(math.log10(value / divisor)) if value > 0 else 0
            value = math.ceil(value / divisor * 10**places - 1e-9) / 10**places * divisor
            share = math.ceil(share * 1e4 - 1e-9) / 1e4
        number = f'{value:,.0f}' if self.kind == 'size' else f'{value / divisor:,.4g}'
        return f'{number} {unit} ({share:.4f} of float)' if self.whole else f'{number} {unit}'

    def impossible(self, least: float, most: float) -> str:
        """The message for a limit below the least, given what the fewest and the most bits cost."""
        said = f'budget {self.kind}: {self.text(self.limit)} is impossible; the least is {self.text(least, up=True)}'
        if self.kind == 'ms':
            return (
                f'{said}, the most bits take {self.text(most)}: bits alone cannot meet it, as a runtime computes all '
                'of them in 8-bit integers'
            )
        given = {
            layer: next(iter(costs.values())) for layer, costs in self.costs.items() if len(set(costs.values())) == 1
        }
        total = self.fixed + sum(given.values())
        given |= self.kept
        dearest = ', '.join(sorted(given, key=lambda name: -given[name])[:3])
        names = f' (layers {dearest}{", ..." if len(given) > 3 else ""})' if given else ''
        return f'{said}, of which {self.text(total)} is given by the config{names}'


def read_budgets(given: Iterable[str] | Mapping[str, Any]) -> dict[str, float]:
    """Kind -> limit, from texts such as 'size=0.125' or a dict.

    Raises:
        UserError: a kind is unknown or given twice, or a limit is no positive number.
    """
    pairs = given.items() if isinstance(given, Mapping) else [text.partition('=')[::2] for text in given]
    found: dict[str, float] = {}
    for kind, value in pairs:
        if kind not in UNITS:
            raise UserError(f'budget {kind!r} is not one of {", ".join(UNITS)}{near(kind, UNITS)}')
        if kind in found:
            raise UserError(f'budget {kind} is given twice')
        try:
            found[kind] = float(value)
        except (TypeError, ValueError):
            raise UserError(f'budget {kind}={value!r} is no number') from None
        if not (math.isfinite(found[kind]) and found[kind] > 0):
            raise UserError(f'budget {kind}={value} is not above 0')
    if not found:
        raise UserError(f'no budget is given; write {", ".join(f"{kind}=..." for kind in UNITS)}')
    return found


def choices_of_layers(choices: Iterable[Choice]) -> dict[str, tuple[str, str]]:
    """Layer -> name of the choice of its weight, and of its input."""
    sides: dict[str, dict[str, str]] = {'weight': {}, 'activation': {}}
    for choice in choices:
        sides[choice.side].update(dict.fromkeys(choice.layers, choice.name))
    return {layer: (weight, sides['activation'][layer]) for layer, weight in sides['weight'].items()}


class Costs:
    """Makes the budgets of one model.

    Args:
        model, report: quantized, and what quantize_model returned.
        choices: all, open or given.
        candidates: quantizers for the open ones.
        float_bytes: size of the deployed model in float32.
        times: layer -> milliseconds by the bits of its weight and input, of float layers too; only a budget in ms needs
            it.
    """

    def __init__(
        self,
        model: nn.Module,
        report: Report,
        choices: Sequence[Choice],
        candidates: Candidates,
        float_bytes: int,
        times: Mapping[str, Callable[[Pair], float]] | None = None,
    ) -> None:
        self.model, self.report, self.float_bytes, self.times = model, report, float_bytes, times or {}
        bits = {choice.name: choice.bits for choice in choices}
        self.pairs = {
            layer: [Pair(w, a) for w in bits[weight] for a in bits[input]]
            for layer, (weight, input) in choices_of_layers(choices).items()
        }
        self.layers = quant_layers(model)
        weights = [place for place in candidates.places if place.choice.side == 'weight']
        self.scales = {place.layer: {b: other.scale_count for b, other in place.others.items()} for place in weights}

    def budget(self, kind: str, limit: float) -> Budget:
        """A budget; the limit of a size or of bit operations up to 1 is a share of the float model.

        Raises:
            UserError: there are no bit operations to count.
        """
        whole, fixed, costs, kept = {'size': self._size, 'bitops': self._operations, 'ms': self._times}[kind]()
        if not whole:
            raise UserError(f'budget {kind}: no layer of this model is known to cost any')
        return Budget(kind, limit * whole if kind != 'ms' and limit <= 1 else limit, whole, fixed, costs, kept)

    def weight_bytes(self, name: str, bits: int) -> float:
        """Bytes of a layer's weight, with its float32 scales; as report.layers.totals counts them."""
        layer = self.layers[name]
        if bits == FLOAT_BITS:
            return layer.weight.numel() * FLOAT_BYTES
        scales = self.scales[layer][bits] if layer in self.scales else layer.weight_quant.scale_count
        return layer.weight.numel() * bits / 8 + scales * FLOAT_BYTES

    def _size(self) -> Any:
        first: dict[tuple[int, int], str] = {}  # a weight that two layers have counts once
        for name in self.pairs:
            first.setdefault(self.layers[name].weight_key, name)
        costs = {n: {pair: self.weight_bytes(n, pair.weight) for pair in self.pairs[n]} for n in first.values()}
        chosen = sum(self.layers[name].weight.numel() for name in costs) * FLOAT_BYTES
        others = [row for row in self._others() if self.report.plan.deployed(row.name)]
        kept = {f'{row.name} in float': row.weights * FLOAT_BYTES for row in others}
        return self.float_bytes, self.float_bytes - chosen, costs, kept

    def _operations(self) -> Any:
        macs = {row.name: row.macs for row in (*self.report.layers, *self.report.products)}
        costs = {n: {pair: macs[n] * pair.weight * pair.input for pair in pairs} for n, pairs in self.pairs.items()}
        kept = {}
        for row in self._others():
            weight, activation = self.layers[row.name].bits if row.name in self.layers else (FLOAT_BITS, FLOAT_BITS)
            kept[_named(row.name, (weight, activation))] = row.macs * weight * activation
        for row in self.report.products:
            bits = factor_bits(self.model, row.name)
            kept[_named(row.name, bits)] = row.macs * math.prod(bits)
        return sum(macs.values()) * FLOAT_BITS**2, sum(kept.values()), costs, kept

    def _times(self) -> Any:
        costs = {n: {p: self.times[n](p) for p in pairs} for n, pairs in self.pairs.items() if n in self.times}
        others = [row.name for row in self._others() if row.name in self.times and self.report.plan.deployed(row.name)]
        kept = {f'{n} in float': self.times[n](Pair(FLOAT_BITS, FLOAT_BITS)) for n in others}
        whole = sum(self.times[n](Pair(FLOAT_BITS, FLOAT_BITS)) for n in (*costs, *others))
        return whole, sum(kept.values()), costs, kept

    def _others(self) -> list[LayerReport]:
        """The layers that are in no choice: float ones, and those that are not deployed."""
        return [row for row in self.report.layers if row.name not in self.pairs]


def _named(name: str, bits: Sequence[int]) -> str:
    return f'{name} in float' if set(bits) == {FLOAT_BITS} else name
