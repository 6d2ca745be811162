"""The comparison table in its formats: for a terminal, as Markdown, as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .compare import COLUMNS, NUMBERS, Record, by_model, comparison_rows, recipe_notes
from .record import RUNTIMES
from .text import literal, markdown


def comparison_table(records: Sequence[Record], narrow: bool = False) -> Table:
    """The rows as a table for a terminal.

    `narrow` fits 80 columns: it leaves columns out, and the name of a single method is the title of its results.
    """
    rows = comparison_rows(records)
    methods, metrics = ({row[key]: None for row in rows} for key in ('method', 'metric'))
    titles = {'quantized': next(iter(methods))} if narrow and len(methods) == 1 else {}
    caption = Text(f'{", ".join(metrics)} in %')
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify='left')  # type: ignore[arg-type]
    empty = {column for column in COLUMNS if not any(row[column] for row in rows)}
    of_task = {(row['task'], row['metric']) for row in rows}
    needed = len(of_task) > len({task for task, _ in of_task}) if narrow else len(metrics) > 1
    left_out = empty if needed else {'metric', *empty}
    if narrow:
        left_out |= {'seeds', 'G bit operations', 'published', *RUNTIMES, *(['method'] if titles else [])}
    shown = [c for c in COLUMNS if c not in left_out]
    for column in shown:
        justify = 'right' if column in NUMBERS else 'left'
        table.add_column(Text(titles.get(column, column)), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(row[column].replace(' → ', '→')) for column in shown))  # a name is no markup
    return table


def comparison_markdown(records: Sequence[Record]) -> str:
    """The rows as a Markdown table, and what differs in the recipes below it; empty columns are left out."""
    rows = comparison_rows(records)
    shown = [column for column in COLUMNS if any(row[column] for row in rows)]
    notes = ''.join(f'\n- {literal(note)}' for note in recipe_notes(records))
    table = markdown(shown, [[literal(row[column]) for column in shown] for row in rows])
    return f'{table}\n\nDifferences beside method, bits and seed:\n{notes}' if notes else table


def comparison_csv(records: Sequence[Record]) -> str:
    """The rows as comma-separated values; the column 'differences' says in what the recipes of a model differ."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, 'differences'], lineterminator='\n')
    writer.writeheader()
    for of_model in by_model(records):
        notes = '\n'.join(recipe_notes(of_model))
        writer.writerows({**row, 'differences': notes} for row in comparison_rows(of_model))
    return text.getvalue()
