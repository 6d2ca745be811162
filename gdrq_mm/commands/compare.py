"""Compare run records: a row for each model, data set, method and bits, beside the float model."""

import argparse

from rich.console import Console

from ..core.errors import UserError
from ..core.files import check_file, write_whole
from ..report.compare import comparison_rows, recipe_notes
from ..report.formats import comparison_csv, comparison_markdown, comparison_table
from ..report.record import find_records
from ..report.text import print_whole

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
            check_file(out, f'--{name}')
            write_whole(out, table(records).encode() + b'\n' * (name == 'markdown'))
    if args.html is not None:
        from ..report.html import html_report  # with the plots: an extra of the package

        check_file(args.html, '--html')
        write_whole(args.html, html_report(records, args.paths).encode())
    console = Console()
    print_whole(console, comparison_table(records))
    for note in recipe_notes(records):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
