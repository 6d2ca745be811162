"""How a campaign ends: a table, a figure with what it was measured on, and an exit code."""

import json
import sys
from pathlib import Path

from gdrq_mm.core.files import write_whole
from gdrq_mm.report.provenance import provenance

FIGURES = Path(__file__).resolve().parents[2] / 'docs/figures'


def report(out, rows, failures, **more):
    """Print and write what was counted: {what: number}; exit with 1 if anything failed."""
    for what, count in rows.items():
        print(f'{count:>10} {what}')
    write_whole(
        out, (json.dumps({'rows': rows, 'failures': failures, **more, **provenance()}, indent=1) + '\n').encode()
    )
    print(f'wrote {out}')
    if failures:
        sys.exit('\n'.join(['FAILED', *failures[:20]]))
