"""Compare run records: a row for each model, data set, method and bits, beside the float model."""

import argparse
from pathlib import Path

from rich.console import Console

from ..core.errors import UserError
from ..core.files import check_writable, write_whole
from ..report.compare import comparison_rows, recipe_notes
from ..report.formats import comparison_csv, comparison_markdown, comparison_table
from ..report.record import find_records

FORMATS = dict(markdown=comparison_markdown, csv=comparison_csv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('paths', nargs='+', metavar='PATH', help='run record, or a folder with records at any depth')
    for name in FORMATS:
        parser.add_argument(f'--{name}', metavar='FILE', help=f'write the table as {name} too')
    parser.add_argument('--html', metavar='FILE', help='write a report with plots, curves and pictures: one HTML file')
    args = parser.parse_args()
    records = find_records(args.paths)
    if not comparison_rows(records):
        raise UserError('all records are of float models: there is nothing to compare')
    for name, table in FORMATS.items():
        out = getattr(args, name)
        if out is not None:
            check_writable(Path(out).parent)
            write_whole(out, table(records).encode() + b'\n' * (name == 'markdown'))
    if args.html is not None:
        from ..report.html import html_report  # with the plots: an extra of the package

        check_writable(Path(args.html).parent)
        write_whole(args.html, html_report(records, args.paths).encode())
    console = Console()
    console.width = max(console.width, 200) if not console.is_terminal else console.width
    console.print(comparison_table(records))
    for note in recipe_notes(records):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
