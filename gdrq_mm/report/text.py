"""Texts of tables: numbers, cells and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDEST = 10_000
"""Columns of a terminal that no table reaches."""


def printable(text: str) -> str:
    """A text on one line: what is no printable character stands there as its escape."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def literal(text: str) -> str:
    """A text that Markdown shows as it is, in a cell of a table too."""
    text = re.sub(r'[\\|<&*`~]', r'\\\g<0>', text)
    text = re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\\_', text)
    return re.sub(r'\[(?=[^\]]*\](?:\(|:))', r'\\[', text)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def number_text(value: float) -> str:
    """A number with two decimals; a huge one in a few letters."""
    return f'{value:.2f}' if not math.isfinite(value) or abs(value) < 1e9 else f'{value:.6g}'


def print_whole(console: Console, table: Table) -> None:
    """Print a table with all of its cells: rich cuts those for which a terminal has no room, numbers too.

    A line that is wider than the terminal goes on in its next line.
    """
    width, console.width = console.width, WIDEST
    console.width = max(width, console.measure(table).maximum)
    console.print(table, highlight=False)
    console.width = width
