#!/usr/bin/env python
"""Write the tables of README.md and docs/*.md anew from the committed records and figures.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. What all its rows share stands in the line above it.
With --check nothing is written; a table that differs from what the files give is an error.
"""

import argparse
import re
from pathlib import Path

import figure_tables
import record_tables

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import write_whole
from gdrq_mm.openmmlab.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
TABLES = {**figure_tables.TABLES, **record_tables.TABLES}


def filled(text: str) -> str:
    """A page with every table made anew."""

    def replacement(match: re.Match[str]) -> str:
        return f'<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->'

    return re.sub(r'<!-- table: (\w+) -->\n.*?<!-- end -->', replacement, text, flags=re.DOTALL)


def write() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail on a difference')
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        new = filled(text)
        if args.check and new != text:
            raise UserError(f'{page.name} differs from its records; run python benchmarks/tables.py')
        if new != text:
            write_whole(page, new.encode())


if __name__ == '__main__':
    main(write)
