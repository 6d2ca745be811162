#!/usr/bin/env python
"""Time and memory of a quantization-aware training step over those of the float step.

Models are those of configs, with 4-bit weights and activations, 8 bits in the first and the last layers. Contestants:
float; gdrq, with `deployable` off and on; gdrq without its kernels; torch.ao's FakeQuantize with moving min/max
observers; Brevitas, if it is installed (see BREVITAS in contestants.py); float and gdrq by torch.compile, if asked for.
All of them quantize the input and the weight of the same layers, and only `deployable` more, the operands of additions
and what activation functions read. gdrq has 4 groups a layer as in configs/_base_/quantization/gdrq_w4a4.py, the others
one range a layer. A step is forward, loss, backward, SGD with momentum and, for gdrq, core.step.after_step. Classifiers
get noise, the others pictures of the digits.

Every round runs one step of each contestant in each memory format, in an order drawn anew. The ratio is that of the
medians, within a memory format. Peak memory is what two steps add to a fresh process. Prints a table for each model,
precision and number of threads, and writes a JSON.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from contestants import BREVITAS, COMPILED, CONTESTANTS, DEVICE, FORMATS, MODELS, PRECISIONS, build
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from shared import write_figure

from gdrq_mm.core.errors import UserError, check_least
from gdrq_mm.core.kernels import native
from gdrq_mm.deploy.measure import peak_of_process
from gdrq_mm.openmmlab.cli import check_writable, main

WARM_UP = 3
"""Steps that are not timed: observers and Brevitas's scales have started after them."""


# ---- memory -------------------------------------------------------------------------------------------------------


def peak() -> int:
    """The most memory of this process so far, in bytes: of the accelerator if there is one, else resident."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == 'cuda' else peak_of_process()


def memory_of_steps(which: list[str], batch: int | None, size: int | None) -> int:
    """Bytes that two training steps add to the peak of this process."""
    contestant = build(*which, batch=batch, size=size)
    before = peak()
    contestant.step()
    contestant.step()  # with the optimizer's momentum in memory
    return peak() - before


def memory_in_fresh_process(which: list[str], args: argparse.Namespace) -> int:
    """The same, in a process of its own."""
    options = dict(threads=torch.get_num_threads(), batch=args.batch, size=args.size)
    given = [f'--{key}={value}' for key, value in options.items() if value is not None]
    command = [sys.executable, __file__, *given, '--memory-of', *which]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{which}: {done.stderr[-2000:]}')
    return int(done.stdout.splitlines()[-1])


# ---- the command --------------------------------------------------------------------------------------------------


def measure(
    names: list[str], title: str, precision: str, args: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """A row for each contestant and memory format: seconds of each round and peak memory."""
    keys = list(itertools.product(args.formats, names))
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        memory = {
            (layout, name): memory_in_fresh_process([name, layout, precision, title], args)
            for layout, name in progress.track(keys, description=f'{title}: peak memory')
        }
        contestants = {
            (layout, name): build(name, layout, precision, title, args.batch, args.size)
            for layout, name in progress.track(keys, description='building')
        }
        for contestant in progress.track(list(contestants.values()), description='warming up'):
            for _ in range(WARM_UP):
                contestant.step()
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
        shuffle = random.Random(0).shuffle
        for _ in progress.track(range(args.rounds), description='timing'):
            shuffle(keys)
            for key in keys:
                seconds[key].append(contestants[key].step())
    where = dict(model=title, precision=precision, threads=torch.get_num_threads())
    return [
        dict(**where, memory_format=layout, contestant=name, seconds=times, peak_bytes=memory[layout, name])
        for (layout, name), times in seconds.items()
    ]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add medians and ratios to the float row of the same memory format; the quartiles are those of single rounds."""
    for row in rows:
        base = next(r for r in rows if r['contestant'] == 'float' and r['memory_format'] == row['memory_format'])
        row['median_seconds'] = statistics.median(row['seconds'])
        row['ratio'] = row['median_seconds'] / statistics.median(base['seconds'])
        single = [ours / theirs for ours, theirs in zip(row['seconds'], base['seconds'])]
        low, _, high = statistics.quantiles(single, n=4) if len(single) > 1 else single * 3
        row['ratio_quartiles'] = [low, high]
        row['memory_ratio'] = row['peak_bytes'] / base['peak_bytes'] if base['peak_bytes'] else None


def show(rows: list[dict[str, Any]], title: str) -> Table:
    """The table."""
    table = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column('format', no_wrap=True)
    table.add_column('contestant', no_wrap=True)
    for column in ('step ms', 'ratio', 'quartiles', 'peak MB', 'ratio'):
        table.add_column(column, justify='right')
    for layout, group in itertools.groupby(rows, lambda row: row['memory_format']):
        for number, row in enumerate(group):
            low, high = row['ratio_quartiles']
            table.add_row(
                layout if number == 0 else '',
                row['contestant'],
                f'{row["median_seconds"] * 1000:.1f}',
                f'{row["ratio"]:.3f}',
                f'{low:.2f} - {high:.2f}',
                f'{row["peak_bytes"] / 1e6:.0f}',
                '-' if row['memory_ratio'] is None else f'{row["memory_ratio"]:.2f}',
            )
        table.add_section()
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS), help='default: all')
    parser.add_argument('--batch', type=int, help='pictures a step (default: those of the model)')
    parser.add_argument('--size', type=int, help='pixels of pictures of noise (default: those of the model)')
    parser.add_argument('--rounds', type=int, default=9, help='timed steps of each contestant (default: %(default)s)')
    threads = torch.get_num_threads()
    parser.add_argument('--threads', type=int, nargs='+', default=[threads], help=f'of torch (default: {threads})')
    parser.add_argument(
        '--precisions', nargs='+', default=['float32'], choices=list(PRECISIONS), help='default: float32'
    )
    parser.add_argument(
        '--contestants', nargs='+', default=None, choices=list(CONTESTANTS), help='default: those that are not compiled'
    )
    parser.add_argument('--formats', nargs='+', default=list(FORMATS), choices=list(FORMATS), help='default: both')
    out = Path('docs/figures/train_step.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    hidden = ('CONTESTANT', 'FORMAT', 'PRECISION', 'MODEL')
    parser.add_argument('--memory-of', nargs=4, metavar=hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1, batch=1, size=32)
    return args


def chosen(args: argparse.Namespace, console: Console) -> list[str]:
    """The contestants, float first; without Brevitas if it is not installed and was not asked for by name."""
    wanted = args.contestants or [name for name in CONTESTANTS if name not in COMPILED]
    names = [name for name in CONTESTANTS if name == 'float' or name in wanted]
    if 'brevitas' in names and find_spec('brevitas') is None:
        if args.contestants:
            raise UserError(f'brevitas is not installed; to install it: {BREVITAS}')
        console.print(f'without Brevitas, which is not installed; to install it: {BREVITAS}', soft_wrap=True)
        names.remove('brevitas')
    return names


def save(rows: list[dict[str, Any]], names: list[str], args: argparse.Namespace) -> None:
    """Write what was measured so far."""
    about = dict(
        settings=dict(rounds=args.rounds, batch=args.batch, size=args.size),
        device=DEVICE.type,
        kernels=native.description(),
        rows=rows,
        versions=dict(brevitas=version('brevitas') if 'brevitas' in names else None),
    )
    write_figure(args.out, about)


def run() -> None:
    args = parse_args()
    if args.memory_of:
        torch.set_num_threads(args.threads[0])
        print(memory_of_steps(args.memory_of, args.batch, args.size))
        return
    check_writable(args.out.parent)
    console = Console()
    names = chosen(args, console)
    where = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'
    rows = []
    for threads, precision, title in itertools.product(args.threads, args.precisions, args.models):
        torch.set_num_threads(threads)
        found = measure(names, title, precision, args, console)
        add_ratios(found)
        rows += found
        save(rows, names, args)  # what was measured is not lost if a later model cannot be
        count = args.batch or MODELS[title][1]
        console.print(show(found, f'{title}, {count} pictures a step, {precision}, threads {threads}, {where}'))
    console.print(f'wrote {args.out}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main(run)
