"""What the benchmarks of time and memory share."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import write_whole
from gdrq_mm.report.record import provenance


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse options below the least value of each."""
    for name, value in least.items():
        given = getattr(args, name)
        for each in given if isinstance(given, list) else [given]:
            if each is not None and each < value:
                raise UserError(f'--{name} {each} is less than {value}')


def peak_of_process() -> int:
    """The most resident memory of this process so far, in bytes.

    The same counter as getrusage's ru_maxrss, but that one starts from the memory of the parent process.
    """
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024


def write_figure(path: Path, found: dict[str, Any], console: Console) -> None:
    """Write what was found, with when, with what and on what."""
    about = provenance()
    about['versions'].update(found.pop('versions', {}))
    write_whole(path, (json.dumps({**found, **about}, indent=1) + '\n').encode())
    console.print(f'wrote {path}', soft_wrap=True)
