"""A grid of runs from one file: methods x bits x seeds x configs, each cell trained and tested by the project's tools.

A sweep file is a Python config:

    work_dir = 'work_dirs/sweep'          # training logs and checkpoints, one folder for each cell
    records = 'docs/records/sweep'        # run records, one file for each cell; a cell that has one is finished
    runs = [
        dict(
            name='cifar10',               # how the names of its cells begin
            config='configs/cls/resnet18_width16_gdrq_w4a4_cifar10.py',     # load_from is its float checkpoint
            float_config='configs/cls/resnet18_width16_cifar10.py',         # optional: tested once, the baseline
            methods=['gdrq', 'lsq'],
            bits=['w4a4', 'w2a4'],
            seeds=[0, 1, 2],
            variants={'': {}, 'project': {'quantization.weight.gdrq.clip': 'project'}},     # optional
            options={'train_cfg.max_epochs': 3},                        # optional: settings of every cell
            amp=True)]                                                  # optional
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..core.config import Quantization, near
from ..core.errors import UserError
from ..report.record import read_record
from .cli import read_config

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
KEYS = dict(work_dir=str, records=str, runs=list)
RUN_KEYS = dict(
    name=str, config=str, float_config=str, methods=list, bits=list, seeds=list, variants=dict, options=dict, amp=bool
)
OPTIONAL = {'float_config', 'variants', 'options', 'amp'}


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    command: str
    """The shell command that trains and tests; run again, it resumes an interrupted training."""
    record: Path
    log: Path
    quantization: Mapping[str, Any] | None
    """The quantization dict that the record must have; None for the float baseline."""
    seed: int | None

    def finished(self) -> bool:
        """Whether the cell has a record.

        Raises:
            UserError: the record is damaged, or of a run with other settings.
        """
        if not self.record.exists():
            return False
        record = read_record(self.record)
        if record['quantization'] != self.quantization or (
            self.seed is not None and record['training']['seed'] != self.seed
        ):
            raise UserError(f'cell {self.name}: {self.record} is of other settings; remove it to run the cell again')
        return True


def read_sweep(path: str) -> list[Cell]:
    """The cells of a sweep file in the order of its runs, the float baseline of a run first.

    Raises:
        UserError: lists everything that is wrong with the file, one line each.
    """
    if not Path(path).is_file():
        raise UserError(f'sweep file {path} does not exist')
    try:
        sweep = Config.fromfile(path).to_dict()
    except Exception as error:  # it is Python code: anything can go wrong in it
        raise UserError(f'sweep file {path} cannot be read: {type(error).__name__}: {error}'.splitlines()[0]) from None
    problems = list(_wrong_keys(sweep, KEYS, path))
    runs = sweep.get('runs') if isinstance(sweep.get('runs'), list) else []
    whole = not problems
    cells: list[Cell] = []
    for number, run in enumerate(runs):
        place = f'runs[{number}]'
        found = list(_wrong_keys(run, RUN_KEYS, place)) if isinstance(run, dict) else [f'{place} is not a dict']
        problems += found
        if whole and not found:
            for cell in _cells(sweep, run, place):
                if isinstance(cell, str):
                    problems.append(cell)
                else:
                    cells.append(cell)
    names = [cell.name for cell in cells]
    problems += [f'two cells are called {name}' for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise UserError(f'{len(problems)} errors in {path}:\n  ' + '\n  '.join(problems))
    return cells


def _wrong_keys(found: Mapping[str, Any], keys: Mapping[str, type], place: str) -> Iterator[str]:
    for key in found:
        if key not in keys:
            yield f"{place} has no key '{key}'{near(key, keys)}"
    for key, kind in keys.items():
        if key in found and not isinstance(found[key], kind):
            yield f'{place}.{key}={found[key]!r} is not a {kind.__name__}'
        elif key in found and kind is list and not found[key]:
            yield f'{place}.{key} is empty'
        elif key not in found and key not in OPTIONAL:
            yield f'{place} has no {key}'


def _cells(sweep: Mapping[str, Any], run: Mapping[str, Any], place: str) -> Iterator[Cell | str]:
    """The cells of a run, or what is wrong with them."""
    try:
        cfg = read_config(run['config'], run.get('options'))
        if 'float_config' in run:
            read_config(run['float_config'])
    except UserError as error:
        yield f'{place}: {error}'
        return
    if not cfg.get('load_from'):
        yield f'{place}: {run["config"]} has no load_from: a quantized run starts from a float checkpoint'
        return
    if '://' not in cfg.load_from and not Path(cfg.load_from).is_file():
        yield f'{place}: the float checkpoint {cfg.load_from} of {run["config"]} does not exist'
    if 'float_config' in run:
        name = f'{run["name"]}-float'
        work = Path(sweep['work_dir']) / name
        command = _test(run['float_config'], cfg.load_from, work, Path(sweep['records']) / f'{name}.json')
        yield Cell(name, command, Path(sweep['records']) / f'{name}.json', work / 'log.txt', None, None)
    variants = run.get('variants', {'': {}})
    for bits, method, variant, seed in itertools.product(run['bits'], run['methods'], variants, run['seeds']):
        name = '-'.join(filter(None, [run['name'], str(method), variant, str(bits), f'seed{seed}']))
        yield _cell(sweep, run, name, method, bits, variants[variant], seed, f'{place}: {name}')


def _cell(
    sweep: Mapping[str, Any],
    run: Mapping[str, Any],
    name: str,
    method: Any,
    bits: Any,
    variant: Any,
    seed: Any,
    place: str,
) -> Cell | str:
    match = re.fullmatch(r'w(\d+)a(\d+)', str(bits))
    if match is None:
        return f'{place}: bits {bits!r} are not written like w4a4'
    if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(variant, dict):
        return f'{place}: the seed is not an integer, or the variant is not a dict of settings'
    options = {
        'quantization.method': method,
        'quantization.weight.bits': int(match[1]),
        'quantization.activation.bits': int(match[2]),
        'randomness.seed': seed,
        'default_hooks.checkpoint.max_keep_ckpts': 1,
        **run.get('options', {}),
        **variant,
    }
    try:
        cfg = read_config(run['config'], options)
        Quantization.from_dict(cfg.quantization)
    except UserError as error:
        return f'{place}: {error}'
    work, record = Path(sweep['work_dir']) / name, Path(sweep['records']) / f'{name}.json'
    checkpoint = f'{work}/calibrated.pth'
    if method == 'ptq':
        first = [_python('calibrate'), run['config'], cfg.load_from, '--out', checkpoint]
    else:
        first = [_python('train'), run['config'], '--resume', *(['--amp'] if run.get('amp') else [])]
    chosen = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    train = ' '.join([first[0], shlex.join([*first[1:], '--work-dir', str(work), *chosen])])
    test = _test(run['config'], checkpoint if method == 'ptq' else None, work, record, chosen)
    return Cell(name, f'{train} && {test}', record, work / 'log.txt', cfg.quantization.to_dict(), seed)


def _python(tool: str) -> str:
    return shlex.join([sys.executable, str(TOOLS / f'{tool}.py')])


def _test(config: str, checkpoint: str | None, work: Path, record: Path, options: list[str] | None = None) -> str:
    """The command that tests a checkpoint; None: the last one that training wrote into the work directory."""
    tested = shlex.quote(checkpoint) if checkpoint else f'"$(cat {shlex.quote(str(work / "last_checkpoint"))})"'
    rest = ['--work-dir', str(work), '--record', str(record), *(options or [])]
    return f'{_python("test")} {shlex.quote(config)} {tested} {shlex.join(rest)}'


def run_cell(cell: Cell, threads: int) -> tuple[bool, str]:
    """Run a cell and write its output to its log, unless another sweep is running it or has finished it.

    Returns:
        Whether all went well, and one line that says what happened.
    """
    try:
        return _run_cell(cell, threads)
    except OSError as error:  # such as a full disk: the other cells still run
        return False, f'{cell.name}: {error}'


def _run_cell(cell: Cell, threads: int) -> tuple[bool, str]:
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, 'a') as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes of the cell inherit the lock
        except BlockingIOError:
            return True, f'{cell.name}: left to another sweep that runs it'
        if cell.finished():  # asked while we hold the lock: before, another sweep might still finish it
            return True, f'{cell.name}: done by another sweep'
        log.truncate(0)
        environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        command = ['bash', '-c', cell.command]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode == 0 and cell.record.exists():
        return True, f'{cell.name}: done'
    lines = [line for line in cell.log.read_text(errors='replace').splitlines() if line.strip()]
    return False, f'{cell.name}: {lines[-1] if lines else "no output"} (exit {done.returncode}, {cell.log})'


def slurm_script(cells: list[Cell], arguments: str) -> str:
    """A shell script that submits one slurm job for each cell."""
    lines = [
        '#!/usr/bin/env bash',
        '# Run it in the folder where the sweep was made. Finished cells are left out.',
        'set -e',
    ]
    for cell in cells:
        lines.append(f'mkdir -p {shlex.quote(str(cell.log.parent))}')
        job = ['sbatch', *shlex.split(arguments), '--job-name', cell.name, '--output', str(cell.log)]
        lines.append(shlex.join([*job, '--wrap', cell.command]))
    return '\n'.join(lines) + '\n'
