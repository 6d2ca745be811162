"""The comparison table: a row for each model, data set, method and bits, with the float result of the same model."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..core.errors import UserError
from ..core.quantizers import TITLES
from .recipe import differences, reached, recipe_key
from .record import MAIN_METRICS, OTHER_METRICS, RUNTIMES, as_number

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
PUBLISHED = Path(__file__).parent / 'published.json'
"""Numbers that papers and reproductions of them report, each with its source; none was measured here."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric that tables show."""

    title: str
    factor: float = 1
    """Makes the evaluator's value a percentage."""
    known: bool = True
    """Whether it is one of MAIN_METRICS or OTHER_METRICS: in %, and more is better."""


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

    'trained on' is the float model trained on by the recipe of the row with every quantizer off (`control=True`).

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
            found = variants.setdefault(key, {}).setdefault(names[_checkpoint(record)], _Variant())
            (found.torch if backend_of(record) == 'torch' else found.runtimes[backend_of(record)]).append(record)
        metrics = _metrics(of_model)
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
                (f'float ({_file(record)})' if several else 'float')
                if record['quantization'] is None
                else 'trained on'
                if is_control(record)
                else names[_checkpoint(record)] or 'quantized',
                record,
            )
            for record in of_model
        ]
        title = f'{title_of(of_model[0])}: ' if len(groups) > 1 else ''
        notes += [printable(f'{title}{line}') for line in differences(labelled)]
    return notes


def _recipes(of_model: Sequence[Record]) -> dict[str, str]:
    """Checkpoint of a quantized record -> the letter of its recipe; '' if the model has one recipe only.

    Two checkpoints of one cell (method, bits, seed) with the same recipe are told apart by their length, as two
    checkpoints of one training are, else by their file.
    """
    quantized = _quantized(of_model)
    keys = {_checkpoint(r): (recipe_key(r), _start(r)) for r in quantized}
    extra: dict[str, Any] = dict.fromkeys(keys, '')
    for tell in (reached, lambda record: _checkpoint(record)):
        cells: dict[tuple[Any, ...], dict[str, Record]] = {}
        for r in quantized:
            mark = _checkpoint(r)
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
    """The float baselines of a model, one for each checkpoint; a runtime's result only where torch has none."""
    floats = [record for record in of_model if record['quantization'] is None]
    return _different(sorted(floats, key=lambda record: backend_of(record) == 'torch'))


def _baseline(of_model: Sequence[Record], record: Record | None) -> Record | None:
    """The float record of the checkpoint that a quantized one was trained from, or the only one if it does not say."""
    floats = _floats(of_model)
    start = None if record is None else _start(record)
    return next((before for before in floats if _checkpoint(before) == start), floats[0] if len(floats) == 1 else None)


def is_control(record: Record) -> bool:
    """Whether it is of the float model, trained on by the recipe of a quantized one with every quantizer off."""
    return bool((record['quantization'] or {}).get('control'))


def _quantized(of_model: Iterable[Record]) -> list[Record]:
    return [record for record in of_model if record['quantization'] is not None and not is_control(record)]


def _trained_on(of_model: Iterable[Record], record: Record | None) -> list[Record]:
    """The controls of a quantized record: those that were trained alike, or all of them if none was."""
    if record is None:
        return []
    controls = [r for r in of_model if is_control(r) and backend_of(r) == 'torch' and _start(r) == _start(record)]
    return _different([r for r in controls if recipe_key(r) == recipe_key(record)] or controls)


def _start(record: Record) -> str | None:
    start = record['training'].get('start')
    return (start['sha256'] or start['file']) if start else None


def backend_of(record: Record) -> str:
    """What ran the network: 'torch', or the runtime of an exported graph."""
    return record['model'].get('backend', 'torch')


def method_of(record: Record) -> str:
    """The method of a quantized record and its settings that are not the default, such as 'GDRQ (clip=project)'."""
    model = record['model']
    names = '/'.join(dict.fromkeys(TITLES.get(m, m) for m in model['methods']))
    names = 'PACT' if model['methods'] == ['dorefa', 'pact'] else names  # the paper combines them so
    options = {key: value for key, value in model['options'].items() if key != 'calibration_batches'}
    if not model['deployable']:
        options['deployable'] = False
    shown = ', '.join(f'{key.removeprefix("weight.")}={value}' for key, value in options.items())
    return f'{names} ({shown})' if shown else names


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
        known = [_checkpoint(before) for before in floats]
        for record in of_model:
            if record['quantization'] is None or not floats or _start(record) in known:
                continue
            start, bases = record['training'].get('start'), ' and '.join(map(_file, floats))
            if start:
                raise UserError(
                    f'not comparable: {_file(record)} was trained from another checkpoint ({start["file"]}) than the '
                    f'float baseline of {title_of(record)}, {bases}'
                )
            if len(floats) > 1:
                raise UserError(
                    f'not comparable: {bases} are float baselines of {title_of(record)}, and {_file(record)} does not '
                    'say from which of them it was trained'
                )


def comparison_table(records: Sequence[Record], narrow: bool = False) -> Table:
    """The rows as a table for a terminal.

    `narrow` fits 80 columns: it leaves columns out, and the name of a single method is the title of its results.
    """
    rows = comparison_rows(records)
    methods, metrics = ({row[key]: None for row in rows} for key in ('method', 'metric'))
    titles = {'quantized': next(iter(methods))} if narrow and len(methods) == 1 else {}
    caption = Text(f'{", ".join(metrics)} in %')
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify='left')  # type: ignore[arg-type]
    empty = {column for column in COLUMNS if not any(row[column] for row in rows)}
    of_task = {(row['task'], row['metric']) for row in rows}
    needed = len(of_task) > len({task for task, _ in of_task}) if narrow else len(metrics) > 1
    left_out = empty if needed else {'metric', *empty}
    if narrow:
        left_out |= {'seeds', 'G bit operations', 'published', *RUNTIMES, *(['method'] if titles else [])}
    shown = [c for c in COLUMNS if c not in left_out]
    for column in shown:
        justify = 'right' if column in NUMBERS else 'left'
        table.add_column(Text(titles.get(column, column)), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(row[column].replace(' → ', '→')) for column in shown))  # a name is no markup
    return table


def comparison_markdown(records: Sequence[Record]) -> str:
    """The rows as a Markdown table, and what differs in the recipes below it; empty columns are left out."""
    rows = comparison_rows(records)
    shown = [column for column in COLUMNS if any(row[column] for row in rows)]
    notes = ''.join(f'\n- {literal(note)}' for note in recipe_notes(records))
    table = markdown(shown, [[literal(row[column]) for column in shown] for row in rows])
    return f'{table}\n\nDifferences beside method, bits and seed:\n{notes}' if notes else table


def comparison_csv(records: Sequence[Record]) -> str:
    """The rows as comma-separated values; the column 'differences' says in what the recipes of a model differ."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, 'differences'], lineterminator='\n')
    writer.writeheader()
    for of_model in by_model(records):
        notes = '\n'.join(recipe_notes(of_model))
        writer.writerows({**row, 'differences': notes} for row in comparison_rows(of_model))
    return text.getvalue()


def printable(text: str) -> str:
    """A text on one line: what is no printable character stands there as its escape."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def literal(text: str) -> str:
    """A text that Markdown shows as it is, in a cell of a table too."""
    text = re.sub(r'[\\|<&*`~]', r'\\\g<0>', text)
    text = re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\\_', text)
    return re.sub(r'\[(?=[^\]]*\](?:\(|:))', r'\\[', text)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def metrics_of(record: Record) -> dict[Metric, float]:
    """The metrics that tables show and their values, in % where the metric is known.

    All MAIN_METRICS of the task; without any of them the first of OTHER_METRICS; without that all numbers there are.
    A known metric is known under another prefix too.
    """
    numbers = {key: _float(value) for key, value in record['metrics'].items() if as_number(value) is not None}
    main, other = MAIN_METRICS[record['task']], OTHER_METRICS[record['task']]
    for known, limit in ((main, len(main)), (other, 1)):
        exact = {key: key for key in known if key in numbers}
        ends = {key.rpartition('/')[2]: key for key in reversed(known)}
        same_end = {key: ends[key.rpartition('/')[2]] for key in numbers if key.rpartition('/')[2] in ends}
        found = {}
        for key, name in list((exact or same_end).items())[:limit]:
            title, factor = known[name]
            found[Metric(title if key == name else f'{title} ({printable(key)})', factor)] = numbers[key] * factor
        if found:
            return found
    return {Metric(printable(key), known=False): value for key, value in numbers.items()}


def main_metric(record: Record) -> tuple[str, float]:
    """Title and value, in %, of the first metric that tables show.

    Raises:
        UserError: the record has no metric.
    """
    found = metrics_of(record)
    if not found and _found_nothing(record):
        return 'box AP', 0.0
    if not found:
        raise UserError(f'a record of {record["data"]["name"]} has no metric')
    metric = next(iter(found))
    return metric.title, found[metric]


def _found_nothing(record: Record) -> bool:
    """Whether it is of a detector that detects nothing: mmdet returns no metrics then."""
    return record['task'] == 'det' and not record['metrics']


def _metrics(of_model: Sequence[Record]) -> list[Metric]:
    """All metrics of the records of a model."""
    found = list(dict.fromkeys(metric for record in of_model for metric in metrics_of(record)))
    detected_nothing = any(map(_found_nothing, of_model))
    return found or [Metric('box AP', 100) if detected_nothing else Metric('none', known=False)]


def value_of(record: Record, metric: Metric) -> float | None:
    """The value of a metric in a record; None if it was not measured."""
    return 0.0 if _found_nothing(record) and metric.known else metrics_of(record).get(metric)


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
        published=_published(model, method, bits_of(bits)),
    )
    if records:
        sizes = [_float(records[0]['model'][key]) for key in ('float_bytes', 'bytes', 'bit_operations')]
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
            cells[runtime] = number_text(float(np.mean(values))) if values else ''
    return {column: printable(cell) for column, cell in cells.items()}


def _mean(values: Sequence[float]) -> float:
    with np.errstate(all='ignore'):  # nan and values near the largest float are shown as they come out
        return float(np.mean(values))


def _with_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation if there are several."""
    with np.errstate(all='ignore'):
        spread = f' ± {number_text(float(np.std(values, ddof=1)))}' if len(values) > 1 else ''
    return f'{number_text(_mean(values))}{spread}'


def number_text(value: float) -> str:
    """A number with two decimals; a huge one in a few letters."""
    return f'{value:.2f}' if not math.isfinite(value) or abs(value) < 1e9 else f'{value:.6g}'


def _float(value: Any) -> float:
    """A number as a float; an integer that is too large becomes infinite."""
    number = as_number(value)
    try:
        return float(math.nan if number is None else number)
    except OverflowError:
        return math.inf if number and number > 0 else -math.inf


def _published(record: Record, method: str, bits: str) -> str:
    wanted = (record['model']['name'], record['data']['name'].split('/')[0], method, bits)
    return '; '.join(
        f'{entry["value"]} ({entry["source"]})'
        for entry in json.loads(PUBLISHED.read_text())
        if (entry['model'], entry['data'], entry['method'], entry['bits']) == wanted
    )


def _different(records: Iterable[Record]) -> list[Record]:
    """One record for each checkpoint: the user may have given a record twice."""
    return list({_checkpoint(record): record for record in records}.values())


def bits_of(bits: Sequence[int]) -> str:
    """Such as 'W4A4'."""
    return 'W{}A{}'.format(*bits)


def _checkpoint(record: Record) -> str:
    return record['checkpoint']['sha256'] or record['checkpoint']['file']


def title_of(record: Record) -> str:
    """Model and data set, for messages and titles."""
    return f'{record["model"]["name"]} on {record["data"]["name"]}'


def _file(record: Record) -> str:
    return record.get('path') or record['checkpoint']['file']


def _two(one: Record, other: Record) -> str:
    return f'{_file(one)} and {_file(other)}'


def identity_of(record: Record) -> tuple[str, ...]:
    """What records must have in common to be compared: task, architecture, data and evaluation settings."""
    return record['task'], record['model']['config_sha256'], record['data']['evaluation_sha256']
