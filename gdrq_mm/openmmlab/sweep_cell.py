"""One run of a sweep: what it is made of, whether it is finished, and how it runs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..core.files import write_whole
from ..report.recipe import NOT_SET, flat
from ..report.record import plain, read_record

SETTINGS = 'cell.json'
"""File in the work directory of a cell that holds its settings."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    command: str
    """The shell command that trains and tests; run again, it resumes an interrupted training."""
    record: Path
    log: Path
    settings: Mapping[str, Any]
    """The whole configuration as plain data, see :func:`_whole`; the record holds its digest."""
    missing: str = ''
    """Why it cannot run yet: its config or its float checkpoint is not there. Without a config it has no settings."""

    @property
    def work_dir(self) -> Path:
        """Where its log and its checkpoints are."""
        return self.log.parent

    @property
    def digest(self) -> str:
        """Equal for two cells if all their settings are."""
        return digest_of(self.settings)

    @property
    def done(self) -> Path:
        """A file that the command writes at its end."""
        return self.work_dir / 'finished'

    def finished(self) -> bool:
        """Whether the cell has a record of these settings.

        A record of an older version does not say with which settings it was made: it counts if its quantization and its
        seed are those of the cell.

        Raises:
            UserError: the record is damaged.
        """
        if not (self.record.exists() and self.settings):
            return False
        record = read_record(self.record)
        if record.get('cell') is not None:
            return record['cell'] == self.digest
        seed = self.settings['seed']
        same_seed = seed is None or record['training']['seed'] == seed
        return same_seed and plain(record['quantization']) == self.settings['config'].get('quantization')

    def changed(self) -> list[str]:
        """In what the settings differ from those that the work directory was made with, one line each."""
        before = self._before()
        if not before:
            return []
        one, other = flat(before), flat(self.settings)
        lines = (f'{key}: {one.get(key, NOT_SET)} → {other.get(key, NOT_SET)}' for key in {**one, **other})
        return [line for line, key in zip(lines, {**one, **other}) if one.get(key) != other.get(key)]

    def prepare(self) -> str:
        """Set aside what another configuration left, or a run whose record was removed; then say which cell it is.

        Returns:
            What was set aside, and why; '' if nothing was.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        left = [path for path in self.work_dir.iterdir() if path != self.log]
        before = self._before()
        again = self.done.exists() and not self.record.exists()
        stale = bool(left) and (again or before is None or digest_of(before) != self.digest)
        changes = f' ({"; ".join(self.changed()[:3])})' if self.changed() else ''
        told = []
        if stale:
            aside = _free(self.work_dir)
            aside.mkdir()
            for path in sorted(
                left, key=[self.done, self.work_dir / SETTINGS].count
            ):  # what tells that it is stale comes last
                path.rename(aside / path.name)
            told.append(str(aside))
        if self.record.exists() and not self.finished():
            aside = _free(self.record)
            self.record.rename(aside)
            told.append(str(aside))
        write_whole(self.work_dir / SETTINGS, (json.dumps(self.settings, indent=1) + '\n').encode())
        if not told:
            return ''
        reason = 'its record was removed' if again else f'other settings{changes}'
        return f' ({reason}; what was there is kept in {" and ".join(told)})'

    def _before(self) -> dict[str, Any] | None:
        """The settings that the work directory was made with; None if it does not say."""
        try:
            found = json.loads((self.work_dir / SETTINGS).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


def digest_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings as plain data, shortened."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _free(path: Path) -> Path:
    """The first of PATH.old-1, PATH.old-2, ... that does not exist; no tool takes a file of that name for a record."""
    return next(p for n in itertools.count(1) if not (p := path.with_name(f'{path.name}.old-{n}')).exists())


def run_cell(cell: Cell, threads: int) -> tuple[bool, str]:
    """Run a cell and write its output to its log, unless another sweep is running it or has finished it.

    Returns:
        Whether all went well, and one line that says what happened.
    """
    try:
        return _run_cell(cell, threads)
    except OSError as error:  # such as a full disk: the other cells still run
        return False, f'{cell.name}: {error}'


@contextlib.contextmanager
def _locked_log(cell: Cell) -> Iterator[TextIO | None]:
    """The log of a cell, locked until the end of the block; None if another sweep or job runs the cell."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, 'a', encoding='utf-8') as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the processes of the cell inherit the lock
            free = True
        except BlockingIOError:
            free = False
        yield log if free else None


def _run_cell(cell: Cell, threads: int) -> tuple[bool, str]:
    with _locked_log(cell) as log:
        if log is None:
            return True, f'{cell.name}: left to another sweep that runs it'
        if cell.finished():  # asked while we hold the lock: before, another sweep might still finish it
            return True, f'{cell.name}: done by another sweep'
        aside = cell.prepare()
        log.truncate(0)
        log.write(f'{cell.name}{aside}\n' * bool(aside))
        log.flush()
        environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        command = ['bash', '-c', cell.command]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode == 0 and cell.record.exists():
        return True, f'{cell.name}: done{aside}'
    lines = [line for line in cell.log.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
    return False, f'{cell.name}: {lines[-1] if lines else "no output"} (exit {done.returncode}, {cell.log})'


def slurm_script(cells: list[Cell], arguments: str) -> str:
    """A shell script that submits one slurm job for each cell; what other settings left is set aside now.

    A job takes the lock that a sweep takes: a cell that another sweep or job runs is left to it.
    """
    lines = [
        '#!/usr/bin/env bash',
        '# Run it in the folder where the sweep was made. Finished cells are left out.',
        'set -e',
    ]
    for cell in cells:
        with _locked_log(cell) as log:
            if log is None:
                lines.append(f'# {cell.name} is left to another sweep that runs it')
                continue
            cell.prepare()
        lines.append(f'mkdir -p {shlex.quote(str(cell.log.parent))}')
        job = ['sbatch', *shlex.split(arguments), '--job-name', cell.name, '--output', str(cell.log)]
        job.append('--open-mode=append')  # a sweep may have begun to run the cell and to write its log
        locked = ['flock', '--nonblock', '--verbose', str(cell.log), 'bash', '-c', cell.command]
        lines.append(shlex.join([*job, '--wrap', shlex.join(locked)]))
    return '\n'.join(lines) + '\n'
