"""The training log in a work directory: curves and pictures that StatisticsHook wrote through LocalVisBackend."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

QUANTITIES = dict(
    threshold='threshold',
    clip_ratio='clip ratio',
    quantized_loss='quantized loss',
    distance_to_uniform='distance to uniform',
)
"""What StatisticsHook writes for each layer -> title."""
SCALAR = re.compile(rf'quant/(.+)/({"|".join(QUANTITIES)})')
LAST_STEP = 2**53
"""Iterations above it are damage."""
SHEET = re.compile(r'distributions_(\d+)\.png')


@dataclass
class TrainLog:
    """The statistics of one training, over all its resumed runs."""

    steps: dict[int, dict[tuple[str, str], float]] = field(default_factory=dict)
    """Iteration -> layer and quantity -> value."""
    rates: dict[int, float] = field(default_factory=dict)
    """Iteration -> learning rate, of the first group of the optimizer."""
    sheets: dict[int, Path] = field(default_factory=dict)
    """Iteration -> picture of all distributions."""
    sources: dict[int, str] = field(default_factory=dict)
    """Iteration -> folder in the work directory that its values were read from."""
    damaged: int = 0
    """How many lines could not be read."""

    def curves(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Layer -> quantity -> iterations and values."""
        found: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for step, values in sorted(self.steps.items()):
            for (layer, quantity), value in values.items():
                found.setdefault(layer, {}).setdefault(quantity, []).append((step, value))
        return found


def read_log(work_dir: Path) -> TrainLog | None:
    """The log of a work directory; None if mmengine wrote none there."""
    folders = [f for f in (work_dir / 'vis_data', *sorted(work_dir.glob('*/vis_data'))) if f.is_dir()]
    runs = []
    for folder in folders:
        steps, rates, damaged = _read_scalars(folder / 'scalars.json')
        sheets = {int(m[1]): f for f in (folder / 'vis_image').glob('*.png') if (m := SHEET.fullmatch(f.name))}
        runs.append(_Run(folder, steps, rates, sheets, damaged))
    log = TrainLog()
    for run in _in_order(runs):
        # What an earlier folder has from this iteration on was computed again: drop it.
        log.steps = {step: values for step, values in log.steps.items() if step < run.begin} | run.steps
        log.rates = {
            step: rate for step, rate in log.rates.items() if step < min(run.rates, default=run.begin)
        } | run.rates
        log.sheets = {step: file for step, file in log.sheets.items() if step < run.begin} | run.sheets
        log.sources.update(dict.fromkeys(run.steps, str(run.folder.relative_to(work_dir))))
        log.damaged += run.damaged
    log.sources = {step: log.sources[step] for step in sorted(log.steps)}
    return log if folders else None


@dataclass
class _Run:
    """What a training wrote until it ended or was killed."""

    folder: Path
    steps: dict[int, dict[tuple[str, str], float]]
    rates: dict[int, float]
    sheets: dict[int, Path]
    damaged: int

    @property
    def begin(self) -> float:
        return min([*self.steps, *self.sheets], default=math.inf)

    @property
    def end(self) -> float:
        return max([*self.steps, *self.sheets], default=-math.inf)


def _in_order(runs: list[_Run]) -> list[_Run]:
    """The runs in the order in which they were made.

    That is the order of their names, which are times, as long as the clock was right. A run that begins where no run
    before it came to was resumed from one with a later name: the clock had been set back meanwhile. It comes behind
    the run that reaches its begin.
    """
    written = [run for run in runs if run.begin < math.inf]
    first = min((run.begin for run in written), default=0)
    steps = [sorted({*run.steps, *run.sheets}) for run in written]
    interval = max((b - a for found in steps for a, b in itertools.pairwise(found)), default=math.inf)
    ordered: list[_Run] = []
    waiting: list[_Run] = []
    for place, run in enumerate(written):
        if ordered:
            begins, gap = first + 1, run.begin > ordered[-1].end + interval  # what may fill the gap was resumed too
        else:
            begins, gap = first, run.begin > first
        if gap and any(begins <= other.begin < run.begin and other.end < run.end for other in written[place + 1 :]):
            waiting.append(run)
            continue
        ordered.append(run)
        for late in sorted(waiting, key=lambda run: run.begin):
            if ordered[-1].end < late.end and late.begin <= ordered[-1].end + interval:
                waiting.remove(late)
                ordered.append(late)
    return [*(run for run in runs if run.begin == math.inf), *ordered, *sorted(waiting, key=lambda run: run.begin)]


def _read_scalars(file: Path) -> tuple[dict[int, dict[tuple[str, str], float]], dict[int, float], int]:
    """The statistics and the learning rate by iteration, and the number of damaged lines with statistics.

    A killed training may leave half a line.
    """
    steps: dict[int, dict[tuple[str, str], float]] = {}
    rates: dict[int, float] = {}
    damaged = 0
    if not file.is_file():
        return steps, rates, damaged
    with open(file, errors='replace') as lines:
        for line in lines:
            statistics = '"quant/' in line
            if not statistics and '"lr"' not in line:
                continue
            try:
                values = json.loads(line)
                step = int(values['step'])
                if not 0 <= step < LAST_STEP:
                    raise ValueError(step)
                found = {match.groups(): float(values[key]) for key in values if (match := SCALAR.fullmatch(key))}
                rate = float(values['lr']) if 'lr' in values else None
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged += statistics
                continue
            if statistics:
                steps.setdefault(step, {}).update(found)  # type: ignore[arg-type]
            if rate is not None:
                rates[step] = rate
    return steps, rates, damaged
