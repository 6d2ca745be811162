"""The comparison table: a row for each model, data set, method and bits, with the float result of the same model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from .identity import (
    backend_of,
    bits_of,
    checkpoint_of,
    extras_of,
    file_of,
    identity_of,
    is_control,
    method_of,
    start_of,
    starts_of,
    title_of,
)
from .metrics import Metric, all_metrics, number_of, value_of
from .recipe import differences, reached, recipe_key, tested
from .record import RUNTIMES
from .text import number_text, printable

TASK_NAMES = {'cls': 'classification', 'det': 'detection', 'seg': 'segmentation'}
COLUMNS = (
    'task',
    'model',
    'data',
    'metric',
    'float',
    'trained on',
    'method',
    'bits',
    'recipe',
    'quantized',
    'seeds',
    'drop',
    'drop, trained on',
    *RUNTIMES,
    'size in MB',
    'G bit operations',
    'published',
)
NUMBERS = ('float', 'trained on', 'quantized', 'drop', 'drop, trained on', 'seeds', 'G bit operations')
NOT_RUN = 'not run'
NOT_MEASURED = 'not measured'
"""Stands where there is a record, but without this metric."""
PUBLISHED_METRIC = 'top-1'
PUBLISHED = Path(__file__).parent / 'published.json'
"""Numbers that papers and reproductions of them report, each with its source; none was measured here."""

Record = Mapping[str, Any]


@dataclass
class Line:
    """One setting of a model: the records of all its seeds, and a row of the table for each metric."""

    rows: list[dict[str, str]]
    records: list[Record]
    """Those that torch ran."""
    before: Record | None
    """The float baseline."""


@dataclass
class _Variant:
    """The quantized records of a model with one method, one choice of bits and one recipe."""

    torch: list[Record] = field(default_factory=list)
    runtimes: dict[str, list[Record]] = field(default_factory=lambda: {runtime: [] for runtime in RUNTIMES})


def comparison_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """A dict by COLUMNS for each model, data set, method, bits, recipe and metric, averaged over seeds.

    'float' is the model that the training started from, also where a quantized one lies between. 'trained on' is the
    float model trained on by the recipe of the row, as long, with every quantizer off (`control=True`); empty if there
    is no such record.

    Every method of a model has a row for all bits that any method was run with; 'not run' stands where there is no
    record. A model with a float record only has no row. Where the records of a model were trained in several ways, a
    letter names each way in the column 'recipe'; :func:`recipe_notes` says in what they differ.

    Raises:
        UserError: the records are not comparable, see :func:`check_comparable`.
    """
    return [row for line in comparison_lines(records) for row in line.rows]


def comparison_lines(records: Sequence[Record]) -> list[Line]:
    """The rows of the table with the records behind them; see :func:`comparison_rows`."""
    check_comparable(records)
    lines = []
    for of_model in by_model(records):
        quantized = _quantized(of_model)
        names = _recipes(of_model)
        variants: dict[tuple[str, tuple[int, ...]], dict[str, _Variant]] = {}
        for record in quantized:
            key = method_of(record), tuple(record['model']['bits'])
            found = variants.setdefault(key, {}).setdefault(names[_result(record)], _Variant())
            (found.torch if backend_of(record) == 'torch' else found.runtimes[backend_of(record)]).append(record)
        metrics = all_metrics(of_model)
        for method in dict.fromkeys(method for method, _ in variants):
            for bits in sorted({bits for _, bits in variants}, reverse=True):
                for recipe, found in sorted(variants.get((method, bits), {'': _Variant()}).items()):
                    rows = [_row(of_model, metric, method, bits, recipe, found) for metric in metrics]
                    one = next(iter([*found.torch, *(r for ran in found.runtimes.values() for r in ran)]), None)
                    base = _baseline(of_model, one)
                    lines.append(Line(rows, found.torch, base))
    return lines


def by_model(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each model on a data set."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(identity_of(record), []).append(record)
    return list(groups.values())


def recipe_notes(records: Sequence[Record]) -> list[str]:
    """What differs between the records of a model beside method, bits and seed, one line a difference.

    The lines name a record by its recipe's letter in the table, by 'quantized' if there is one recipe only, or by
    'float'.
    """
    notes = []
    groups = by_model(records)
    for of_model in groups:
        if not _quantized(of_model):
            continue
        names, floats = _recipes(of_model), _floats(of_model)
        several = len(floats) > 1
        labelled = [
            (
                (f'float ({file_of(record)})' if several else 'float')
                if record['quantization'] is None
                else 'trained on'
                if is_control(record)
                else names[_result(record)] or 'quantized',
                record,
            )
            for record in of_model
        ]
        title = f'{title_of(of_model[0])}: ' if len(groups) > 1 else ''
        notes += [printable(f'{title}{line}') for line in differences(labelled)]
    return notes + [printable(line) for line in _apart(records)]


def _apart(records: Sequence[Record]) -> Iterator[str]:
    """The quantized records whose float model is there and has another model config."""
    floats: dict[str | None, Record] = {checkpoint_of(r): r for r in records if r['quantization'] is None}
    for record in _different(_quantized(records)):
        before = floats.get(start_of(record))
        if before is not None and before['model']['config_sha256'] != record['model']['config_sha256']:
            yield (
                f'{file_of(record)} was trained from {file_of(before)}, and they are not compared: the `model` of '
                'their configs differs, as by another loss. Test the float model with that of the quantized config'
            )


def _recipes(of_model: Sequence[Record]) -> dict[tuple[str, str, int], str]:
    """What was tested by a quantized record -> the letter of its recipe; '' if the model has one recipe only.

    Two checkpoints of one cell (method, bits, seed) with the same recipe are told apart by their length, as two
    checkpoints of one training are, else by their file.
    """
    quantized = _quantized(of_model)
    keys = {_result(r): (recipe_key(r), start_of(r), json.dumps(extras_of(r))) for r in quantized}
    extra: dict[tuple[str, str, int], Any] = dict.fromkeys(keys, '')
    for tell in (reached, lambda record: checkpoint_of(record)):
        cells: dict[tuple[Any, ...], dict[tuple[str, str, int], Record]] = {}
        for r in quantized:
            mark = _result(r)
            cells.setdefault((method_of(r), tuple(r['model']['bits']), keys[mark], extra[mark]), {})[mark] = r
        for cell in cells.values():
            seeds = [record['training']['seed'] for record in cell.values()]
            if len(set(seeds)) < len(seeds):
                extra |= {mark: tell(record) for mark, record in cell.items()}
    kinds = {(keys[mark], extra[mark]): None for mark in keys}
    if len(kinds) < 2:
        return dict.fromkeys(keys, '')
    letters = {kind: _letter(number) for number, kind in enumerate(kinds)}
    return {mark: letters[keys[mark], extra[mark]] for mark in keys}


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letter(number // 26 - 1) if number >= 26 else '') + chr(ord('A') + number % 26)


def _floats(of_model: Iterable[Record]) -> list[Record]:
    """The float baselines of a model, one for each result; a runtime's result only where torch has none."""
    floats = [record for record in of_model if record['quantization'] is None]
    return _different(sorted(floats, key=lambda record: backend_of(record) == 'torch'))


def _baseline(of_model: Sequence[Record], record: Record | None) -> Record | None:
    """The float record of the checkpoint that a quantized one was trained from, or the only one if it does not say.

    That training may have started from a quantized checkpoint, which started from the float one.
    """
    floats = _floats(of_model)
    if record is None or len(floats) == 1:
        return floats[0] if len(floats) == 1 else None
    start = next((each for each in starts_of(record) if each in map(checkpoint_of, floats)), None)
    own = [before for before in floats if checkpoint_of(before) == start]
    return next((before for before in own if tested(before) == tested(record)), next(iter(own), None))


def _quantized(of_model: Iterable[Record]) -> list[Record]:
    return [record for record in of_model if record['quantization'] is not None and not is_control(record)]


def _trained_on(of_model: Iterable[Record], record: Record | None) -> list[Record]:
    """The controls of a quantized record: trained alike and as long, one for each seed.

    If none has the distillation of the record, those without any stand for it.
    """
    if record is None:
        return []
    controls = [r for r in of_model if is_control(r) and backend_of(r) == 'torch' and start_of(r) == start_of(record)]
    alike = [r for r in controls if (recipe_key(r), reached(r)) == (recipe_key(record), reached(record))]
    alike = [r for r in alike if _epilogue(r) == _epilogue(record)]
    own = [r for r in alike if _taught(r) == _taught(record)]
    return _different(own or [r for r in alike if not _taught(r)])


def _epilogue(record: Record) -> dict[str, Any]:
    """The stages at the end of a training that a control has too."""
    schedule = record['quantization'].get('schedule') or {}
    return {key: schedule[key] for key in ('freeze', 'settle') if key in schedule}


def _taught(record: Record) -> Any:
    """The distillation of a training; None if it had none."""
    return record['quantization'].get('distill')


def check_comparable(records: Sequence[Record]) -> None:
    """Refuse records that differ in more than what the table shows.

    Raises:
        UserError: a model was tested on one data set with two evaluation settings, or was quantized from another float
            checkpoint than its baselines; or it does not say from which of several.
    """
    ways: dict[tuple[str, ...], Record] = {}
    for record in records:
        other = ways.setdefault((record['task'], record['model']['config_sha256'], record['data']['name']), record)
        if identity_of(other) != identity_of(record):
            raise UserError(
                f'not comparable: {_two(other, record)} test {title_of(record)} with different evaluation settings'
            )
    for of_model in by_model(records):
        floats = _floats(of_model)
        known = [checkpoint_of(before) for before in floats]
        for record in of_model:
            if record['quantization'] is None or not floats or set(starts_of(record)) & set(known):
                continue
            start, bases = record['training'].get('start'), ' and '.join(map(file_of, floats))
            if start:
                raise UserError(
                    f'not comparable: {file_of(record)} was trained from another checkpoint ({start["file"]}) than the '
                    f'float baseline of {title_of(record)}, {bases}'
                )
            if len(floats) > 1:
                raise UserError(
                    f'not comparable: {bases} are float baselines of {title_of(record)}, and {file_of(record)} does '
                    'not say from which of them it was trained'
                )


def _row(
    of_model: Sequence[Record], metric: Metric, method: str, bits: tuple[int, ...], recipe: str, found: _Variant
) -> dict[str, str]:
    """One row of the table.

    Args:
        found: the records with this method, these bits and this recipe, several for each seed if a runtime ran it.
    """
    model, records = of_model[0], _different(found.torch)
    measured = [value for value in (value_of(record, metric) for record in records) if value is not None]
    of_row = [*found.torch, *(record for ran in found.runtimes.values() for record in ran)]
    before = _baseline(of_model, of_row[0] if of_row else None)
    base = None if before is None else value_of(before, metric)
    controls = _trained_on(of_model, of_row[0] if of_row else None)
    control = [value for value in (value_of(r, metric) for r in controls) if value is not None]
    cells = dict.fromkeys(COLUMNS, '')
    cells.update(
        task=TASK_NAMES[model['task']],
        model=model['model']['name'],
        data=model['data']['name'],
        metric=metric.title,
        float=NOT_RUN if before is None else NOT_MEASURED if base is None else number_text(base),
        method=method,
        bits=bits_of(bits),
        recipe=recipe,
        quantized=NOT_MEASURED if records else NOT_RUN,
        published=_published(model, method, bits_of(bits)) if metric.title == PUBLISHED_METRIC else '',
    )
    if records:
        sizes = [number_of(records[0]['model'][key]) for key in ('float_bytes', 'bytes', 'bit_operations')]
        cells['seeds'] = str(len(records))
        cells['size in MB'] = f'{number_text(sizes[0] / 1e6)} → {number_text(sizes[1] / 1e6)}'
        cells['G bit operations'] = number_text(sizes[2] / 1e9)
    if measured:
        mean = _mean(measured)
        cells['quantized'] = _with_spread(measured)
        cells['drop'] = number_text(base - mean) if base is not None and metric.known else ''
        cells['drop, trained on'] = number_text(_mean(control) - mean) if control and metric.known else ''
    if control:
        cells['trained on'] = _with_spread(control)
    for runtime, ran in found.runtimes.items():
        values = [value for value in (value_of(r, metric) for r in _different(ran)) if value is not None]
        with np.errstate(all='ignore'):
            some = f' ({len(values)} of {len(records)} seeds)' if 0 < len(values) < len(records) else ''
            if not {checkpoint_of(r) for r in ran} <= {checkpoint_of(r) for r in records or ran}:
                some = ' (other checkpoints)'
            cells[runtime] = f'{number_text(float(np.mean(values)))}{some}' if values else ''
    return {column: printable(cell) for column, cell in cells.items()}


def _mean(values: Sequence[float]) -> float:
    with np.errstate(all='ignore'):  # nan and values near the largest float are shown as they come out
        return float(np.mean(values))


def _with_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation if there are several."""
    with np.errstate(all='ignore'):
        spread = f' ± {number_text(float(np.std(values, ddof=1)))}' if len(values) > 1 else ''
    return f'{number_text(_mean(values))}{spread}'


def _published(record: Record, method: str, bits: str) -> str:
    wanted = (record['model']['name'], record['data']['name'].split('/')[0], method, bits)
    return '; '.join(
        f'{entry["value"]} ({entry["source"]})'
        for entry in json.loads(PUBLISHED.read_text())
        if (entry['model'], entry['data'], entry['method'], entry['bits']) == wanted
    )


def _different(records: Iterable[Record]) -> list[Record]:
    """One record for each result: the user may have given a record twice, or tested the parts of an export too."""
    whole_last = sorted(records, key=lambda record: not record['model'].get('parts'))
    return list({_result(record): record for record in whole_last}.values())


def _result(record: Record) -> tuple[str, str, int]:
    """What was tested: a checkpoint, on which data, and how many with it (`gdrq test --last`)."""
    return checkpoint_of(record), record['data']['name'], tested(record)


def _two(one: Record, other: Record) -> str:
    return f'{file_of(one)} and {file_of(other)}'
