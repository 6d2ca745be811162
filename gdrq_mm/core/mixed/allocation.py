"""The answer: bits of each layer, as overrides of a config that people can read and change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from ..config import Quantization, settings_of
from ..convert import Report
from .budgets import Costs, Pair, choices_of_layers
from .choices import Candidates, Choice, choices_of
from .program import Program, Sensitivities, Solution


@dataclass(frozen=True)
class LayerBits:
    """A layer of the answer."""

    name: str
    bits: Pair
    why: Pair | tuple[str, str]
    """Why the bits of the weight and of the input are given; '' if they were chosen."""
    sensitivities: tuple[Mapping[int, float], Mapping[int, float]]
    """Bits -> sensitivity, of the weight and of the input; empty where they are given, or those of a layer before."""
    bytes: float
    share_of_size: float
    """Of the weights of all layers."""
    share_of_operations: float
    """Of the bit operations of all layers."""


@dataclass(frozen=True)
class Allocation:
    """Bits of each layer, and how they compare with the same bits everywhere."""

    choices: Sequence[Choice]
    program: Program
    best: Solution
    uniform: Sequence[Solution]
    curve: Sequence[Solution]
    """Answers for other limits of the first budget, from the least to the most."""
    layers: Sequence[LayerBits]

    @property
    def overrides(self) -> dict[str, dict[str, dict[str, int]]]:
        """What to add to `quantization.overrides`: layer -> its bits, as far as the config does not give them."""
        found: dict[str, dict[str, dict[str, int]]] = {layer.name: {} for layer in self.layers}
        for choice in self.choices:
            for name in choice.layers if choice.ours else ():
                found[name][choice.side] = dict(bits=self.best.bits[choice.name])
        return {name: sides for name, sides in found.items() if sides}

    def config(self, config: str | Mapping[str, Any]) -> dict[str, Any]:
        """A `quantization` dict with these bits, or that of a name such as 'w4a4'; what it says of a layer stays."""
        quantization = settings_of(config)
        overrides = dict(quantization.get('overrides') or {})
        for name, sides in self.overrides.items():
            own = overrides.get(name, {})
            overrides[name] = {**own, **{side: {**own.get(side, {}), **bits} for side, bits in sides.items()}}
        return {**quantization, 'overrides': overrides}

    def summary(self, unit: str) -> list[str]:
        """Lines that tell the budget, what is used of it, and how uniform bits compare.

        Args:
            unit: what the sensitivities are, such as 'expected rise of the loss'.
        """
        lines = [
            f'Budget {each.kind}: {each.text(each.limit)}; used: {each.text(self.best.used[each.kind])}.'
            for each in self.program.budgets
        ]
        lines.append(f'Mixed: {unit} {self.best.loss:.4g}.')
        within = [each for each in self.uniform if self.program.fits(each)]
        as_good = [each for each in self.uniform if each.loss <= self.best.loss]
        first = self.program.budgets[0]
        for title, uniform in (
            ('The best uniform bits within the budget', min(within, key=lambda each: each.loss, default=None)),
            ('The cheapest uniform bits as good', min(as_good, key=lambda each: each.used[first.kind], default=None)),
        ):
            if uniform is None:
                lines.append(f'{title}: none.')
            else:
                used = ', '.join(each.text(uniform.used[each.kind]) for each in self.program.budgets)
                lines.append(f'{title}: {uniform.name}, {unit} {uniform.loss:.4g}, {used}.')
        return lines


class Chooser:
    """The choices of a model, quantizers for them, what they cost, and the program over them.

    Args:
        model: quantized and calibrated.
        config: what it was quantized by.
        report: what quantize_model returned.
        float_bytes: size of the deployed model in float32.
        bits, inputs: see choices_of.
        times: see Costs.

    Raises:
        UserError: there is nothing to choose, or a method does not have the bits.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Quantization,
        report: Report,
        float_bytes: int,
        bits: Sequence[int] | None = None,
        inputs: bool = True,
        times: Mapping[str, Callable[[Pair], float]] | None = None,
    ) -> None:
        self.choices = choices_of(model, config, report, bits, inputs)
        self.candidates = Candidates(model, self.choices, config, report)
        self.costs = Costs(model, report, self.choices, self.candidates, float_bytes, times)

    def program(self, sensitivities: Sensitivities, limits: Mapping[str, float]) -> Program:
        """The integer program.

        Args:
            sensitivities: of the open choices.
            limits: kind of a budget -> its limit, see :meth:`Costs.budget`.
        """
        tables = {
            c.name: {b: sensitivities[c.name][b] if len(c.bits) > 1 else 0.0 for b in c.bits} for c in self.choices
        }
        budgets = [self.costs.budget(kind, limit) for kind, limit in limits.items()]
        return Program(tables, choices_of_layers(self.choices), budgets)

    def check(self, limits: Mapping[str, float]) -> None:
        """Raise UserError if a budget is impossible, before anything is measured."""
        self.program({choice.name: dict.fromkeys(choice.bits, 0.0) for choice in self.choices}, limits).solve()

    def allocate(self, sensitivities: Sensitivities, limits: Mapping[str, float]) -> Allocation:
        """Choose the bits; arguments as for :meth:`program`.

        Raises:
            UserError: a budget is impossible.
        """
        program = self.program(sensitivities, limits)
        best = program.solve()
        layers = _layers(self.choices, program, best, self.costs)
        return Allocation(self.choices, program, best, program.uniform(), program.curve(), layers)


def _layers(choices: Sequence[Choice], program: Program, best: Solution, costs: Costs) -> list[LayerBits]:
    by_name = {choice.name: choice for choice in choices}
    pairs = program.pairs(best.bits)
    macs = {row.name: row.macs for row in costs.report.layers}
    sizes = {name: costs.weight_bytes(name, pair.weight) for name, pair in pairs.items()}
    operations = {name: macs[name] * pair.weight * pair.input for name, pair in pairs.items()}
    found = []
    for name, pair in pairs.items():
        own = [by_name[choice] for choice in program.layers[name]]
        tables = [program.choices[c.name] if len(c.bits) > 1 and c.layers[0] == name else {} for c in own]
        found.append(
            LayerBits(
                name,
                pair,
                (own[0].why, own[1].why if name == own[1].layers[0] else f'as {own[1].layers[0]}'),
                (tables[0], tables[1]),
                sizes[name],
                sizes[name] / (sum(sizes.values()) or 1),
                operations[name] / (sum(operations.values()) or 1),
            )
        )
    return found


def config_text(
    allocation: Allocation, base: str, about: Sequence[str], unit: str, settings: Mapping[str, Any] = {}
) -> str:
    """The Python text of a config with these bits.

    Args:
        base: path of the config that it inherits, as seen from where it will lie.
        about: comment lines for its head.
        unit: see :meth:`Allocation.summary`.
        settings: further assignments, name -> value; `quantization` of it is completed.
    """
    lines = [f'# {line}' for line in (*about, *allocation.summary(unit))]
    lines += ['', f'_base_ = [{base!r}]']
    lines += [f'{name} = {value!r}' for name, value in settings.items() if name != 'quantization']
    layers = {layer.name: layer for layer in allocation.layers}
    quantization = allocation.config(settings.get('quantization') or {})
    overrides = quantization.pop('overrides')
    written = {name: f'{name!r}: {_as_call(sides)},' for name, sides in overrides.items()}
    width = max(map(len, written.values()), default=0)
    lines.append('quantization = dict(')
    lines += [f'    {name}={value!r},' for name, value in quantization.items()]
    lines.append('    overrides={')
    for name, text in written.items():
        comment = f'  # {_comment(layers[name])}' if name in allocation.overrides else ''
        lines.append(f'        {text:{width}}{comment}'.rstrip())
    return '\n'.join([*lines, '    },', ')']) + '\n'


def _as_call(value: Any) -> str:
    """A dict as people write it; its keys are names."""
    if not isinstance(value, Mapping):
        return repr(value)
    return f'dict({", ".join(f"{key}={_as_call(each)}" for key, each in value.items())})'


def _comment(layer: LayerBits) -> str:
    parts = []
    for letter, table, bits, why in zip('WA', layer.sensitivities, layer.bits, layer.why):
        told = f'{table[bits]:.2g}' if table else '' if why == 'by config' else why
        parts.append(f'{letter} {told}' if told else '')
    shares = f'{layer.share_of_size:.1%} of size, {layer.share_of_operations:.1%} of operations'
    return '; '.join([', '.join(filter(None, parts)), shares])
