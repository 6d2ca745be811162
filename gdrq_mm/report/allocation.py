"""Mixed precision as a page and a picture: bits beside sensitivity, size and operations; what other budgets cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..core.mixed.allocation import Allocation, LayerBits
from ..core.mixed.budgets import UNITS
from .plots import png
from .templates import TEMPLATES

Cell = tuple[str, str, bool]
"""Sort key, text, and whether it is bold."""


def allocation_page(allocation: Allocation, unit: str, title: str, facts: Mapping[str, str]) -> str:
    """One HTML page that loads nothing from elsewhere.

    Args:
        unit: what the sensitivities are, such as 'expected rise of the loss'.
        facts: name -> what is told below the table.
    """
    tables = [table for layer in allocation.layers for table in layer.sensitivities]
    widths = sorted({bits for table in tables for bits in table})
    columns = ['layer', 'W', 'A', *(f'{side}{b}' for side in 'WA' for b in widths), 'bytes', '% size', '% ops', 'given']
    rows = [_row(layer, widths) for layer in allocation.layers]
    used = [column for column in range(len(columns)) if any(cells[column][1] for cells in rows)]
    picture = base64.b64encode(curve_picture(allocation, unit)).decode()
    return TEMPLATES.get_template('allocation.html.j2').render(
        title=title,
        lines=allocation.summary(unit),
        picture=f'data:image/png;base64,{picture}',
        unit=unit,
        columns=[columns[i] for i in used],
        rows=[[cells[i] for i in used] for cells in rows],
        facts=facts,
    )


def _row(layer: LayerBits, widths: Sequence[int]) -> list[Cell]:
    cells: list[Cell] = [(layer.name, layer.name, False), *((str(b), str(b), True) for b in layer.bits)]
    for table, chosen in zip(layer.sensitivities, layer.bits):
        for b in widths:
            text = f'{table[b]:.3g}' if b in table else ''
            cells.append((text, text, bool(text) and b == chosen))
    cells.append((f'{layer.bytes:.0f}', f'{layer.bytes:,.0f}', False))
    cells += [(f'{share:.6f}', f'{share:.1%}', False) for share in (layer.share_of_size, layer.share_of_operations)]
    given = ', '.join(f'{letter} {why}' for letter, why in zip('WA', layer.why) if why)
    return [*cells, (given, given, False)]


def curve_picture(allocation: Allocation, unit: str) -> bytes:
    """A PNG: the least loss over the first budget, the answer on it, and uniform bits as points beside it."""
    budget = allocation.program.budgets[0]
    name, divisor = UNITS[budget.kind]

    def amount(solution: Any) -> float:
        return solution.used[budget.kind] / divisor

    figure = Figure(figsize=(7, 4.4), dpi=110, layout='constrained')
    axis = figure.subplots()
    curve = sorted(allocation.curve, key=amount)
    axis.plot([amount(s) for s in curve], [s.loss for s in curve], '.-', color='tab:blue', label='mixed, by budget')
    axis.plot([amount(s) for s in allocation.uniform], [s.loss for s in allocation.uniform], 's', color='tab:orange')
    axis.plot([], [], 's', color='tab:orange', label='uniform')
    for each in allocation.uniform:
        axis.annotate(each.name, (amount(each), each.loss), xytext=(4, 4), textcoords='offset points', fontsize=7)
    best = allocation.best
    axis.plot([amount(best)], [best.loss], '*', color='tab:red', markersize=13, label='this config')
    axis.axvline(budget.limit / divisor, color='black', linewidth=0.8, linestyle='--', label='budget')
    losses = [s.loss for s in (*curve, *allocation.uniform, best)]
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        axis.set_yscale('log')
    axis.set_xlabel(f'{budget.kind} in {name}')
    axis.set_ylabel(unit)
    axis.grid(linewidth=0.4)
    axis.legend(fontsize=8)
    return png(figure)
