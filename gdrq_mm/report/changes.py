"""What changed between two records: settings, accuracy, size, and speed where `gdrq benchmark` measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .identity import file_of
from .metrics import all_metrics, number_of, value_of
from .recipe import flat
from .text import number_text, printable

Record = Mapping[str, Any]

SPEED = 'benchmark.json'
"""File beside a record that `gdrq benchmark EXPORTED --out WORK_DIR/benchmark.json` wrote."""
NOT_SET, NOT_MEASURED = 'not set', 'not measured'
SIZES = {'size in MB': ('bytes', 1e6), 'G bit operations': ('bit_operations', 1e9)}
"""Title -> key in a record's model, and its unit."""


class Row(NamedTuple):
    """Something that two records have, or one of them, and what became of it."""

    name: str
    first: str
    second: str
    change: str = ''


def changes_of_two(records: Sequence[Record]) -> tuple[list[str], dict[str, list[Row]]] | None:
    """The files of two records and what changed between them; None if there are more or fewer."""
    once = list({record.get('path', id(record)): record for record in records}.values())
    if len(once) != 2:
        return None
    return [printable(str(file_of(record))) for record in once], changes(*once)


def changes(first: Record, second: Record) -> dict[str, list[Row]]:
    """Part ('settings', 'accuracy', 'size', 'speed') -> its rows; a part without any is left out.

    Settings are those that differ; the others are shown in any case. Speed is the median time of a call, from a file
    SPEED beside a record; a float model that has none is as fast as the float32 graphs of the other's file.
    """
    found = dict(
        settings=_settings(first, second),
        accuracy=_accuracy(first, second),
        size=_sizes(first, second),
        speed=_speed(first, second),
    )
    return {part: [Row(*map(printable, row)) for row in rows] for part, rows in found.items() if rows}


def _settings(first: Record, second: Record) -> list[Row]:
    """The settings of quantization and training that differ, and where the trainings started."""

    def settings(record: Record) -> dict[str, str]:
        training = {key: record['training'].get(key) for key in ('seed', 'epoch', 'iter', 'recipe')}
        start = record['training'].get('start') or {}
        found = dict(
            quantization=record['quantization'],
            **training,
            start=f'{start.get("file")} {(start.get("sha256") or "")[:8]}' if start else None,
            backend=record['model'].get('backend'),
        )
        return flat({key: value for key, value in found.items() if value})

    one, other = settings(first), settings(second)
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [Row(key.removeprefix('recipe.'), one.get(key, NOT_SET), other.get(key, NOT_SET)) for key in keys]


def _accuracy(first: Record, second: Record) -> list[Row]:
    """Every metric that tables show."""
    rows = []
    for metric in all_metrics([first, second]):
        one, other = (value_of(record, metric) for record in (first, second))
        texts = [NOT_MEASURED if value is None else number_text(value) for value in (one, other)]
        change = '' if one is None or other is None else f'{other - one:+.2f}'
        rows.append(Row(metric.title, texts[0], texts[1], change))
    return rows


def _sizes(first: Record, second: Record) -> list[Row]:
    rows = []
    for title, (key, unit) in SIZES.items():
        one, other = (number_of(record['model'][key]) / unit for record in (first, second))
        rows.append(Row(title, number_text(one), number_text(other), _times(one, other)))
    return rows


def _speed(first: Record, second: Record) -> list[Row]:
    """Milliseconds of a call for each graph and runtime that both have; what they were measured with if that differs.

    Then there is no ratio.
    """
    benchmarks = [_benchmark_of(record) for record in (first, second)]
    files, ways = [_measured(each) for each in benchmarks], [_measured_with(each) for each in benchmarks]
    differing = [key for key in ways[0] if key in ways[1] and ways[0][key] != ways[1][key]]
    for number, record in enumerate((first, second)):
        if record['quantization'] is None and not files[number]:
            files[number] = {key: value for key, value in files[1 - number].items() if key[2] == 'float32'}
    times = [
        {key[:2]: value for key, value in file.items() if key[2] == 'exported'}
        or {key[:2]: value for key, value in file.items()}
        for file in files
    ]
    found = [
        Row(
            f'{graph} in {runtime}, ms',
            number_text(times[0][graph, runtime]),
            number_text(times[1][graph, runtime]),
            '' if differing else _times(times[0][graph, runtime], times[1][graph, runtime]),
        )
        for graph, runtime in times[0]
        if (graph, runtime) in times[1]
    ]
    return [*(Row(f'speed: {key}', ways[0][key], ways[1][key]) for key in differing if found), *found]


def _benchmark_of(record: Record) -> Any:
    """The content of the benchmark beside a record; None without one that can be read."""
    if not record.get('path'):
        return None
    try:
        return json.loads((Path(record['path']).parent / SPEED).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _measured_with(about: Any) -> dict[str, str]:
    """What decides the times of a benchmark: its settings, the processor and the runtimes; nothing without one."""
    try:
        found = {key: about[key] for key in ('threads', 'batch', 'regions') if key in about}
        found |= {'processor': about['hardware']['cpu']} if 'hardware' in about else {}
        versions = about.get('versions', {})
        return flat(found | {name: versions[name] for name in ('onnxruntime', 'openvino') if name in versions})
    except (KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _measured(about: Any) -> dict[tuple[str, str, str], float]:
    """Graph, runtime and numbers ('exported' or 'float32') -> milliseconds; nothing without a whole benchmark."""
    try:
        return {
            (str(row['graph']), str(row['runtime']), str(row['numbers'])): 1000 * float(row['seconds']['median'])
            for row in about['rows']
        }
    except (ValueError, KeyError, TypeError, OverflowError):
        return {}


def _times(one: float, other: float) -> str:
    """A ratio in words: what is less, and by how much."""
    if not (math.isfinite(one) and math.isfinite(other) and one > 0 and other > 0):
        return ''
    return '' if one == other else f'1/{one / other:.2f}' if other < one else f'{other / one:.2f} times'
