"""What the benchmarks of time and memory share."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gdrq_mm.core.files import write_whole
from gdrq_mm.report.record import provenance


def write_figure(path: Path, found: dict[str, Any], console: Console | None = None) -> None:
    """Write what was found, with when, with what and on what; say so on the console, if there is one."""
    about = provenance()
    about['versions'].update(found.pop('versions', {}))
    write_whole(path, (json.dumps({**found, **about}, indent=1) + '\n').encode())
    if console is not None:
        console.print(f'wrote {path}', soft_wrap=True)
