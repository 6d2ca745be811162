"""What the benchmarks of time and memory share."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gdrq_mm.core.files import write_whole
from gdrq_mm.report.record import provenance


def write_figure(path: Path, found: dict[str, Any], console: Console) -> None:
    """Write what was found, with when, with what and on what."""
    about = provenance()
    about['versions'].update(found.pop('versions', {}))
    write_whole(path, (json.dumps({**found, **about}, indent=1) + '\n').encode())
    console.print(f'wrote {path}', soft_wrap=True)
