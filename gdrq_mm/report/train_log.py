"""The training log in a work directory: curves and pictures that StatisticsHook wrote through LocalVisBackend."""

from __future__ import annotations

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
SHEET = re.compile(r'distributions_(\d+)\.png')


@dataclass
class TrainLog:
    """The statistics of one training, over all its resumed runs."""

    steps: dict[int, dict[tuple[str, str], float]] = field(default_factory=dict)
    """Iteration -> layer and quantity -> value."""
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
    log = TrainLog()
    for folder in folders:
        steps, damaged = _read_scalars(folder / 'scalars.json')
        sheets = {int(m[1]): f for f in (folder / 'vis_image').glob('*.png') if (m := SHEET.fullmatch(f.name))}
        # What an earlier folder has from this iteration on was computed again: drop it.
        begin = min([*steps, *sheets], default=math.inf)
        log.steps = {step: values for step, values in log.steps.items() if step < begin} | steps
        log.sheets = {step: file for step, file in log.sheets.items() if step < begin} | sheets
        log.sources.update(dict.fromkeys(steps, str(folder.relative_to(work_dir))))
        log.damaged += damaged
    log.sources = {step: log.sources[step] for step in sorted(log.steps)}
    return log if folders else None


def _read_scalars(file: Path) -> tuple[dict[int, dict[tuple[str, str], float]], int]:
    """The statistics by iteration, and the number of damaged lines: a killed training may leave half a line."""
    steps: dict[int, dict[tuple[str, str], float]] = {}
    damaged = 0
    if not file.is_file():
        return steps, damaged
    with open(file, errors='replace') as lines:
        for line in lines:
            if '"quant/' not in line:
                continue
            try:
                values = json.loads(line)
                step = int(values['step'])
                found = {match.groups(): float(values[key]) for key in values if (match := SCALAR.fullmatch(key))}
            except (ValueError, TypeError, KeyError):
                damaged += 1
                continue
            steps.setdefault(step, {}).update(found)  # type: ignore[arg-type]
    return steps, damaged
