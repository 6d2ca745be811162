"""The result of the analysis, which says what each layer costs, as a table, JSON and pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from .damage import Damage
from .plots import png

VERSION = 1
"""Version of the JSON's layout."""
BINS = 121
"""Bins of a histogram of weights: enough to show each code of 4 bits as a spike of its own."""

EMPTY = 0.5
"""Height of an empty bin: a logarithmic axis has no 0."""


@dataclass(frozen=True)
class Row:
    """What is known of a unit: what is quantized alone. Every quantizer is in one unit, so its effect counts once."""

    name: str
    kind: str
    """'layer': a weight, with the input of the layer unless other layers read it too; 'shared input': an input that
    several layers read; 'output': what a module returns."""
    readers: tuple[str, ...]
    """The layers that read the input; of an output the module that returns it."""
    weight: Damage | None
    input: Damage | None
    """Of the input, or the output, as the quantized model computes it."""
    metric: float | None = None
    """The metric with only this unit quantized, or with only this unit float, as Metric.reference says."""
    cost: float | None = None
    """How much worse quantizing this unit makes the metric; see Metric.cost."""

    @property
    def sqnr(self) -> float:
        """That of the weight or of the input, whichever is lower, in dB; inf if no test picture reached the unit."""
        return min((damage.sqnr for damage in (self.weight, self.input) if damage is not None), default=math.inf)

    @property
    def bits(self) -> str:
        """Such as 'W4A4'; 'W4' or 'A4' if the unit has no input or no weight."""
        sides = (('W', self.weight), ('A', self.input))
        return ''.join(f'{letter}{damage.bits}' for letter, damage in sides if damage is not None)


@dataclass(frozen=True)
class Metric:
    """The metric that tells what a unit costs; higher is better."""

    key: str
    """Its key in what the evaluator returns."""
    title: str
    factor: float
    """What the evaluator's values are multiplied by: 100 to make a share a percentage."""
    reference: str
    """'float': a unit costs what the float model loses when only this unit is quantized. 'quantized': it costs what the
    quantized model gains when only this unit is float."""
    unquantized: float
    """The metric with the weights of the checkpoint and nothing quantized."""
    quantized: float
    """The metric with everything quantized: what `gdrq test` finds."""
    of_pictures: bool = False
    """Whether it is a share of the pictures, in %, as an accuracy is: then one picture is its smallest step."""

    def cost(self, value: float) -> float:
        """The cost of a unit, given the metric with only this unit quantized, or only this unit float."""
        return self.unquantized - value if self.reference == 'float' else value - self.quantized

    @property
    def meaning(self) -> str:
        """One sentence that says what the cost is."""
        if self.reference == 'float':
            return f'{self.title} that the float model loses with only this quantized'
        return f'{self.title} that the quantized model gains with only this float'


@dataclass(frozen=True)
class Analysis:
    """The whole result."""

    rows: list[Row]
    metric: Metric | None
    pictures: int
    """How many test pictures were used."""
    available: int
    """How many test pictures the config has."""

    def summary(self) -> str:
        """The title of the table and of the picture."""
        data = f'{self.pictures} of {self.available} test pictures'
        if self.metric is None:
            return f'Inputs of {data}, no metric.'
        m, total = self.metric, sum(row.cost or 0 for row in self.rows)
        drop = m.unquantized - m.quantized
        lines = [
            f'{m.title} on {data}: {m.unquantized:.2f} float, {m.quantized:.2f} quantized, drop {drop:.2f}.',
            f'Cost: {m.meaning}; each unit alone, so the costs (in sum {total:.2f}) do not add up to the drop.',
        ]
        if self.one_picture is not None:
            lines.append(
                f'One picture is {self.one_picture:.2f}: what costs up to {self.chance:.2f} may be chance (gray bars); '
                'more pictures tell more.'
            )
        return '\n'.join(lines)

    @property
    def one_picture(self) -> float | None:
        """How much one picture changes the metric; None if the metric is not a share of the pictures."""
        return 100 / self.pictures if self.metric is not None and self.metric.of_pictures else None

    @property
    def chance(self) -> float:
        """Costs up to this may be chance: two pictures, or two standard deviations of the pictures that are wrong.

        With n pictures of which a share p is wrong, a change that moves as many pictures to the right as to the wrong
        side has a standard deviation of at most sqrt(p (1 - p) / n) (ours; a bound, as most pictures do not move).
        """
        one = self.one_picture
        if one is None or self.metric is None:
            return 0.0
        wrong = min(max(1 - self.metric.quantized / 100, 0.0), 1.0)
        return max(2 * one, 200 * math.sqrt(wrong * (1 - wrong) / self.pictures))


@dataclass(frozen=True)
class Weights:
    """The weights of a layer; each array is (N,)."""

    name: str
    now: np.ndarray
    quantized: np.ndarray
    """The same weights, quantized and dequantized."""
    ends: np.ndarray
    """Lower and upper end of the range of each group."""
    start: np.ndarray | None
    """The weights of the checkpoint that training started from."""


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """The dearest first; among equal or unknown costs the lowest SQNR first."""
    return sorted(rows, key=lambda row: (-(row.cost or 0), row.sqnr))


def analysis_table(analysis: Analysis) -> Table:
    """The table. Columns W are of the weight, columns A of the input or output."""
    title = analysis.metric.title if analysis.metric else ''
    table = Table(title=Text(analysis.summary()), title_justify='left', title_style='', box=None, pad_edge=False)
    table.add_column('layer', min_width=max((len(row.name) for row in analysis.rows), default=0))
    pairs = [f'{name} {side}' for name in ('SQNR', 'clip %', 'loss', 'uniform') for side in 'WA']
    for name in (*(['cost', title] if title else []), 'bits', *pairs):
        table.add_column(name, justify='left' if name == 'bits' else 'right')
    table.add_column('note', overflow='fold', max_width=60)
    for row in analysis.rows:
        values = [f'{row.cost:.2f}', f'{row.metric:.2f}'] if title else []
        sides = zip(_cells(row.weight), _cells(row.input))
        note = f'read by {", ".join(row.readers)}' if row.kind == 'shared input' else ''
        cells = (row.name, *values, row.bits, *(cell for pair in sides for cell in pair), note)
        table.add_row(*map(Text, cells))  # a name is no markup
    return table


def _cells(damage: Damage | None) -> list[str]:
    if damage is None:
        return [''] * 4
    shares = f'{damage.clip_ratio:.2%}'.rstrip('%'), f'{damage.quantized_loss:.3f}', f'{damage.distance_to_uniform:.2f}'
    return [f'{damage.sqnr:.1f}', *shares]


def analysis_dict(analysis: Analysis, **about: Any) -> dict[str, Any]:
    """The result as plain data for JSON, after the entries `about` it; nan and inf become None."""
    return _finite(dict(analysis_version=VERSION, **about, **dataclasses.asdict(analysis)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cost_picture(analysis: Analysis) -> bytes:
    """A PNG: a bar for the cost of each unit, and beside it the SQNR of its weight and input."""
    rows, metric = analysis.rows, analysis.metric
    figure = Figure(figsize=(12 if metric else 8, 1.3 + 0.22 * len(rows)), dpi=110, layout='constrained')
    figure.suptitle(analysis.summary(), fontsize=9)
    *left, right = figure.subplots(1, 2 if metric else 1, sharey=True, squeeze=False)[0]
    places = np.arange(len(rows))
    for axis in left:
        costs = [row.cost or 0.0 for row in rows]
        bars = axis.barh(places, costs, color=['tab:red' if cost > analysis.chance else 'tab:gray' for cost in costs])
        axis.bar_label(bars, [f'{cost:.2f}' for cost in costs], padding=3, fontsize=7)
        axis.axvline(0, color='black', linewidth=0.8)
        axis.set_xlabel(f'cost in {metric.title if metric else ""}')
        axis.margins(x=0.12)
    for label, marker, color in (('weight', 'o', 'tab:blue'), ('input', 's', 'tab:orange')):
        found = [row.weight if label == 'weight' else row.input for row in rows]
        ratios = [each.sqnr if each and math.isfinite(each.sqnr) else math.nan for each in found]
        right.plot(ratios, places, marker, color=color, markersize=5, label=label)
    right.set_xlabel('SQNR in dB')
    right.legend(fontsize=8, loc='lower right')
    right.grid(axis='both', linewidth=0.4)
    first = (left or [right])[0]
    first.set_yticks(places, [f'{row.name}  {row.bits}' for row in rows], fontsize=8)
    first.set_ylim(len(rows) - 0.4, -0.6)
    return png(figure)


def weight_sheet(layers: Sequence[Weights], rows: Mapping[str, Row], columns: int = 4) -> bytes:
    """A PNG with a panel for the weights of each layer.

    Args:
        layers: at least one, in the order of the panels.
        rows: the row of each layer by its name.
    """
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.1 * lines + 0.5), dpi=100, layout='constrained')
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for layer, axis in zip(layers, axes):
        _draw_weights(axis, layer)
        damage = rows[layer.name].weight
        assert damage is not None
        axis.set_title(f'{layer.name[-44:]}  W{damage.bits}', fontsize=8, pad=3)
        told = f'SQNR {damage.sqnr:.1f} dB, clipped {damage.clip_ratio:.1%}, loss {damage.quantized_loss:.3f}'
        axis.set_xlabel(told, fontsize=7, labelpad=2)
    for axis in axes[len(layers) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=4, fontsize=9)
    return png(figure)


def _draw_weights(axis: Any, layer: Weights) -> None:
    """Histograms over the same bins, on a logarithmic axis."""
    shown = [values for values in (layer.start, layer.now, layer.quantized) if values is not None]
    top = max(float(np.abs(values).max()) for values in shown) or 1.0
    bins = np.linspace(-top, top, BINS + 1)

    def draw(values: np.ndarray, **style: Any) -> None:
        counts = np.histogram(values, bins)[0]
        axis.stairs(np.maximum(counts, EMPTY), bins, baseline=EMPTY, **style)

    draw(layer.now, fill=True, color='tab:blue', alpha=0.5, label='weights')
    draw(layer.quantized, color='tab:red', linewidth=0.8, label='dequantized')
    if layer.start is not None:
        draw(layer.start, color='black', linewidth=0.6, label='start of training')
    axis.set_yscale('log')
    low, high = EMPTY, axis.get_ylim()[1]
    axis.vlines(layer.ends, low, high, colors='tab:green', linestyles='--', linewidth=0.7, label='ends of the range')
    axis.set_ylim(low, high)
    axis.tick_params(labelsize=6, length=2, pad=1)
    axis.minorticks_off()
