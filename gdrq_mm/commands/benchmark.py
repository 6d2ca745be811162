"""Measure an exported folder: latency, memory, file size and integer layers of each graph in each runtime.

Beside each graph stands the same one in float32, without quantizers. The runtimes and graphs take turns, so that what
else the machine does falls on all alike. Where a prediction is several graphs, one after the other, their sum is a row
too. Neither torch nor OpenMMLab is needed.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core.errors import UserError, check_least, command
from ..core.files import check_file, write_whole
from ..deploy.float_twin import float_twin
from ..deploy.measure import ExportedGraph, graphs_of, inputs_for, peak_memory, timed_rounds, traced_size
from ..deploy.runtime import (
    RUNTIMES,
    OpenVino,
    RuntimeFailed,
    installed_backends,
    integer_layers,
    layers,
    open_runtime,
)
from ..report.provenance import provenance
from ..report.text import print_whole

EXPORTED, FLOAT = 'exported', 'float32'


@dataclass
class Contestant:
    """A graph in a runtime, ready to run."""

    graph: ExportedGraph
    runtime: str
    numbers: str
    """EXPORTED or FLOAT."""
    file: Path
    inputs: list[np.ndarray]
    opened: Any

    def __call__(self) -> list[np.ndarray]:
        """One call.

        Raises:
            UserError: the runtime cannot run the graph with these inputs.
        """
        try:
            return self.opened(self.inputs)
        except RuntimeFailed as error:
            shapes = ', '.join(' x '.join(map(str, x.shape)) for x in self.inputs)
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'{self.runtime} cannot run {self.graph.path} on {shapes}: {reason}') from error

    def integer_layers(self) -> int:
        """How many layers the runtime computes with integers."""
        if self.numbers == FLOAT:
            return 0
        if isinstance(self.opened, OpenVino):
            return self.opened.integer_layers()
        return integer_layers(self.graph.model)[0]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('exported', type=Path, help=f'folder that {command("export")} or gdrq_mm.export wrote')
    parser.add_argument('--runtime', nargs='+', choices=list(RUNTIMES), help='default: those that are installed')
    parser.add_argument('--threads', type=int, help="default: the runtime's choice")
    parser.add_argument('--batch', type=int, default=1, help='pictures in a call (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('H', 'W'), help='of the pictures (default: as exported)')
    regions = 'regions of a picture that the heads of a two-stage detector get (default: %(default)s)'
    parser.add_argument('--regions', type=int, default=100, help=regions)
    parser.add_argument('--rounds', type=int, default=30, help='timed calls of each graph (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='JSON file to write')
    args = parser.parse_args()
    check_least(args, threads=1, batch=1, size=1, regions=1, rounds=1)
    for name in args.runtime or ():
        if name not in installed_backends():
            raise UserError(f"{name} is not installed: uv pip install 'gdrq-mm[deploy]'")
    if args.out:
        check_file(args.out, '--out')
    return args


def contestants(args: argparse.Namespace, folder: Path) -> list[Contestant]:
    """Every graph as exported and in float32, in every runtime, each after one call; float graphs go into `folder`."""
    graphs, found = graphs_of(args.exported), []
    usual = next((size for graph in graphs if (size := traced_size(graph.model)) and not graph.inside), None)
    for graph in graphs:
        batch = args.batch * (args.regions if graph.regions else 1)
        inputs = inputs_for(graph, batch, args.size and tuple(args.size), usual)
        files, twin = {EXPORTED: graph.path}, float_twin(graph.model)
        if twin is not None:
            files[FLOAT] = folder / graph.path.name
            onnx.save(twin, files[FLOAT])
        for runtime in args.runtime or installed_backends():
            for numbers, file in files.items():
                opened = open_runtime(runtime, file, args.threads)
                found.append(Contestant(graph, runtime, numbers, file, inputs, opened))
                found[-1]()
    return found


def measure(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each graph, runtime and kind of numbers, and for the sum of the parts."""
    with tempfile.TemporaryDirectory() as folder:
        entered = contestants(args, Path(folder))
        groups = [[each] for each in entered] + sums(entered)
        memory = [
            peak_memory(group[0].runtime, [each.file for each in group], [each.inputs for each in group], args.threads)
            for group in track(groups, 'memory', console=console, transient=True)
        ]
        calls: dict[int, Callable[[], Any]] = dict(enumerate(entered))
        times = timed_rounds(calls, args.rounds)
        rounds = list(track(times, 'time', total=args.rounds, console=console, transient=True))
        rows = []
        for group, peak in zip(groups, memory):
            members = [entered.index(each) for each in group]
            seconds = [sum(each[member] for member in members) for each in rounds]
            rows.append(row(group, seconds, peak, args.batch))
    for each in rows:
        float_row = next((r for r in rows if r['numbers'] == FLOAT and all(r[k] == each[k] for k in KEYS)), None)
        each['times_faster'] = float_row['seconds']['median'] / each['seconds']['median'] if float_row else None
    return sorted(rows, key=lambda each: [[r[k] for r in rows].index(each[k]) for k in KEYS])


KEYS = ('graph', 'runtime')


def sums(entered: list[Contestant]) -> list[list[Contestant]]:
    """For each runtime the parts of a prediction, as exported and in float32, where there is more than one."""
    groups = []
    for runtime in dict.fromkeys(each.runtime for each in entered):
        parts = [each for each in entered if each.graph.part and each.runtime == runtime]
        exported = {each.graph.name: each for each in parts if each.numbers == EXPORTED}
        twins = {each.graph.name: each for each in parts if each.numbers == FLOAT}
        if len(exported) > 1:  # a part without quantizers has no twin, and is float itself
            groups += [list(exported.values()), *([list({**exported, **twins}.values())] if twins else [])]
    return groups


def row(group: list[Contestant], seconds: list[float], peak: int, batch: int) -> dict[str, Any]:
    """What was measured of a graph, or of parts one after the other."""
    low, median, high = (float(found) for found in np.percentile(seconds, (5, 50, 95)))
    return dict(
        graph=group[0].graph.name if len(group) == 1 else 'sum',
        runtime=group[0].runtime,
        numbers=FLOAT if any(each.numbers == FLOAT for each in group) else EXPORTED,
        inputs=[list(x.shape) for each in group for x in each.inputs],
        seconds=dict(median=median, low=low, high=high),
        pictures_a_second=batch / median,
        bytes=sum(each.file.stat().st_size for each in group),
        peak_bytes=peak,
        integer_layers=sum(each.integer_layers() for each in group),
        layers=sum(len(layers(each.graph.model)) for each in group),
    )


def show(rows: list[dict[str, Any]], args: argparse.Namespace, console: Console) -> None:
    """Print the rows."""
    threads = f'threads {args.threads}' if args.threads else "threads: the runtime's choice"
    title = f'{args.exported}: batch {args.batch}, {threads}, {args.rounds} rounds'
    table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ('graph', 'runtime', 'numbers')
    columns = (*names, 'ms', '5 to 95 %', 'pictures/s', 'faster', 'MB', 'peak MB', 'integer layers')
    for column in columns:
        table.add_column(column, justify='left' if column in names else 'right', no_wrap=column != 'graph')
    for each in rows:
        low, median, high = (1000 * each['seconds'][key] for key in ('low', 'median', 'high'))
        table.add_row(
            *(each[name] for name in names),
            f'{median:.2f}',
            f'{low:.2f} to {high:.2f}',
            f'{each["pictures_a_second"]:.1f}',
            f'{each["times_faster"]:.2f}' if each['times_faster'] else '-',
            f'{each["bytes"] / 1e6:.2f}',
            f'{each["peak_bytes"] / 1e6:.0f}',
            f'{each["integer_layers"]} of {each["layers"]}',
        )
    print_whole(console, table)
    inputs = dict.fromkeys((each['graph'], ', '.join(' x '.join(map(str, x)) for x in each['inputs'])) for each in rows)
    for graph, shapes in inputs:
        console.print(f'{graph}: {shapes}', highlight=False, soft_wrap=True)


def main() -> None:
    args = parse_args()
    console = Console(markup=False)  # a path is none
    rows = measure(args, console)
    show(rows, args, console)
    if args.out:
        about = provenance()
        about['versions'].update({name: version(name) for name in ('onnx', *{each['runtime'] for each in rows})})
        settings = {name: getattr(args, name) for name in ('threads', 'batch', 'regions', 'rounds')}
        write_whole(args.out, (json.dumps(dict(**settings, rows=rows, **about), indent=1) + '\n').encode())
        console.print(f'wrote {args.out}', soft_wrap=True)
