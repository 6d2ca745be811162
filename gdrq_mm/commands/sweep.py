"""Run a grid of methods x bits x seeds x configs from one file (gdrq_mm/openmmlab/sweep.py explains it).

Finished cells are skipped, interrupted ones go on where they stopped. Compare with `gdrq compare RECORDS`.
"""

import argparse
import os
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.errors import UserError
from ..core.files import check_file, check_writable, write_whole
from ..openmmlab.sweep import read_sweep
from ..openmmlab.sweep_cell import Cell, run_cell, slurm_script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', help='sweep file')
    parser.add_argument('--jobs', type=int, default=1, help='cells that run at once (default: 1)')
    cores = len(os.sched_getaffinity(0))
    parser.add_argument('--cores', type=int, default=cores, help='cores that they share (default: all)')
    parser.add_argument('--only', help='run the cells in whose name this regular expression matches')
    parser.add_argument('--list', action='store_true', help='list the cells and which are finished, run nothing')
    slurm = 'write the unfinished cells as slurm jobs, run nothing; what other settings left is set aside now'
    parser.add_argument('--slurm', metavar='SCRIPT', help=slurm)
    parser.add_argument('--slurm-args', default='', help='options of sbatch, such as "-p gpu --gres=gpu:1"')
    args = parser.parse_args()
    if args.jobs < 1 or args.cores < 1:
        raise UserError('--jobs and --cores are at least 1')
    try:
        shlex.split(args.slurm_args)
    except ValueError as error:
        raise UserError(f'--slurm-args {args.slurm_args!r}: {error}') from None
    return args


def run_all(cells: list[Cell], jobs: int, threads: int, console: Console) -> list[str]:
    """Run the cells; returns what went wrong, a line each."""
    problems: list[str] = []
    start = time.time()
    columns = (TextColumn('{task.completed}/{task.total} cells'), BarColumn(20), TimeElapsedColumn())
    with (
        Progress(*columns, TextColumn('{task.description}'), console=console) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        bar = progress.add_task('', total=len(cells))
        waiting = [pool.submit(run_cell, cell, threads) for cell in cells]
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                left = (time.time() - start) / done * (len(cells) - done)
                progress.update(bar, advance=1, description=f'about {left / 60:.0f} min left')
                fine, line = future.result()
                problems += [] if fine else [line]
                progress.console.print(line, soft_wrap=True, highlight=False, markup=False)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return problems


def main() -> None:
    args = parse_args()
    cells = read_sweep(args.file)
    try:
        chosen = [cell for cell in cells if args.only is None or re.search(args.only, cell.name)]
    except re.error as error:
        raise UserError(f'--only {args.only} is not a regular expression: {error}') from None
    if not chosen:
        raise UserError(f'--only {args.only} matches none of the {len(cells)} cells')
    finished = {cell.name for cell in chosen if cell.finished()}
    console = Console()
    if args.list:
        for cell in chosen:
            state = 'not run'
            if cell.name in finished:
                state = 'finished'
            elif cell.missing:
                state = f'cannot run, {cell.missing}'
            elif cell.record.exists():
                state = f'not run with these settings; {cell.record} is of other ones and will be kept aside'
            console.print(f'{cell.name}: {state}', highlight=False, markup=False, soft_wrap=True)
        return
    todo = [cell for cell in chosen if cell.name not in finished]
    missing = dict.fromkeys(cell.missing for cell in todo if cell.missing)
    if missing:
        raise UserError(f'{len(missing)} errors in {args.file}:\n  ' + '\n  '.join(missing))
    console.print(f'{len(chosen)} cells, {len(finished)} finished, {len(todo)} to run')
    if args.slurm:
        check_file(args.slurm, '--slurm')
        write_whole(args.slurm, slurm_script(todo, args.slurm_args).encode())
        return
    for cell in todo:
        check_writable(cell.record.parent)
    problems = run_all(todo, args.jobs, max(1, args.cores // args.jobs), console)
    if problems:
        raise UserError(f'{len(problems)} of {len(todo)} cells failed:\n  ' + '\n  '.join(problems))
