"""The comparison table: a row for each model, data set, method and bits, with the float result of the same model."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..core.errors import UserError
from ..core.quantizers import TITLES
from .record import MAIN_METRICS, RUNTIMES

TASK_NAMES = {'cls': 'classification', 'det': 'detection', 'seg': 'segmentation'}
COLUMNS = (
    'task',
    'model',
    'data',
    'metric',
    'float',
    'method',
    'bits',
    'quantized',
    'seeds',
    'drop',
    *RUNTIMES,
    'size in MB',
    'G bit operations',
    'published',
)
NOT_RUN = 'not run'
PUBLISHED = Path(__file__).parent / 'published.json'
"""Numbers that papers and reproductions of them report, each with its source; none was measured here."""

Record = Mapping[str, Any]
Group = dict[tuple[str, tuple[int, int]], list[Record]]
"""The quantized records of a model on a data set by method and bits."""


def comparison_rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """A dict by COLUMNS for each model, data set, method and bits, averaged over seeds.

    Every method of a model has a row for all bits that any method was run with; 'not run' stands where there is no
    record. A model with a float record only has no row.

    Raises:
        UserError: the records are not comparable, see :func:`check_comparable`.
    """
    check_comparable(records)
    rows = []
    for identity in dict.fromkeys(identity_of(r) for r in records):
        of_model = [r for r in records if identity_of(r) == identity]
        before = next((r for r in of_model if r['quantization'] is None), None)
        cells: Group = {}
        ran: dict[str, Group] = {runtime: {} for runtime in RUNTIMES}
        for record in of_model:
            if record['quantization'] is not None:
                group = cells if backend_of(record) == 'torch' else ran[backend_of(record)]
                group.setdefault((method_of(record), tuple(record['model']['bits'])), []).append(record)
        keys = [key for group in (cells, *ran.values()) for key in group]
        for method in dict.fromkeys(method for method, _ in keys):
            for bits in sorted({bits for _, bits in keys}, reverse=True):
                row = _row(of_model[0], before, method, bits, _different(cells.get((method, bits), [])))
                for runtime, group in ran.items():
                    values = [main_metric(r)[1] for r in _different(group.get((method, bits), []))]
                    row[runtime] = f'{statistics.fmean(values):.2f}' if values else ''
                rows.append(row)
    return rows


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
        UserError: a model was tested on one data set with two evaluation settings, has two float baselines, or was
            quantized from another float checkpoint than its baseline; or two checkpoints belong to one cell.
    """
    ways: dict[tuple[str, ...], Record] = {}
    floats: dict[tuple[str, ...], Record] = {}
    cells: dict[tuple[Any, ...], Record] = {}
    for record in records:
        name = title_of(record)
        other = ways.setdefault((record['task'], record['model']['config_sha256'], record['data']['name']), record)
        if identity_of(other) != identity_of(record):
            raise UserError(f'not comparable: {_two(other, record)} test {name} with different evaluation settings')
        if record['quantization'] is None:
            other = floats.setdefault(identity_of(record), record)
            if _checkpoint(other) != _checkpoint(record):
                raise UserError(f'not comparable: {_two(other, record)} are two float baselines of {name}')
            continue
        bits, seed = tuple(record['model']['bits']), record['training']['seed']
        other = cells.setdefault((identity_of(record), method_of(record), bits, seed), record)
        if _checkpoint(other) != _checkpoint(record):
            raise UserError(
                f'{_two(other, record)} claim the same cell: {name}, {method_of(record)}, {bits_of(bits)}, '
                f'seed {seed}; compare folders with one of them'
            )
    for record in records:
        start, before = record['training'].get('start'), floats.get(identity_of(record))
        if record['quantization'] is not None and start and before and start['sha256'] != _checkpoint(before):
            raise UserError(
                f'not comparable: {_file(record)} was trained from another checkpoint ({start["file"]}) than the float '
                f'baseline of {title_of(record)}, {_file(before)}'
            )


def comparison_table(records: Sequence[Record], narrow: bool = False) -> Table:
    """The rows as a table for a terminal.

    `narrow` fits 80 columns: it leaves columns out, and the name of a single method is the title of its results.
    """
    rows = comparison_rows(records)
    methods, metrics = ({row[key]: None for row in rows} for key in ('method', 'metric'))
    titles = {'quantized': next(iter(methods))} if narrow and len(methods) == 1 else {}
    caption = f'{", ".join(metrics)} in %'
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify='left')
    empty = {column for column in COLUMNS if not any(row[column] for row in rows)}
    left_out = {'metric', *empty}
    if narrow:
        left_out |= {'seeds', 'G bit operations', 'published', *RUNTIMES, *(['method'] if titles else [])}
    shown = [c for c in COLUMNS if c not in left_out]
    for column in shown:
        justify = 'right' if column in ('float', 'quantized', 'drop', 'seeds', 'G bit operations') else 'left'
        table.add_column(titles.get(column, column), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(row[column].replace(' → ', '→') for column in shown))
    return table


def comparison_markdown(records: Sequence[Record]) -> str:
    """The rows as a Markdown table; columns that are empty everywhere are left out."""
    rows = comparison_rows(records)
    shown = [column for column in COLUMNS if any(row[column] for row in rows)]
    return markdown(shown, [[row[column] for column in shown] for row in rows])


def comparison_csv(records: Sequence[Record]) -> str:
    """The rows as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(comparison_rows(records))
    return text.getvalue()


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main_metric(record: Record) -> tuple[str, float]:
    """Title and value, in %, of the metric that tables show.

    Raises:
        UserError: the record has none of the metrics of its task.
    """
    known = MAIN_METRICS[record['task']]
    for key, (title, factor) in known.items():
        if key in record['metrics']:
            return title, record['metrics'][key] * factor
    if record['task'] == 'det' and not record['metrics']:  # mmdet returns no metrics if a model detects nothing
        return 'box AP', 0.0
    raise UserError(f'a record of {record["data"]["name"]} has none of the metrics {", ".join(known)}')


def _row(
    model: Record, before: Record | None, method: str, bits: tuple[int, ...], found: list[Record]
) -> dict[str, str]:
    """One row of the table.

    Args:
        model: any record of the model: it tells task, model, data and metric.
        before: the float record.
        found: the records with this method and these bits, one a seed.
    """
    title, _ = main_metric(model)
    base = None if before is None else main_metric(before)[1]
    values = [main_metric(record)[1] for record in found]
    cells = dict.fromkeys(COLUMNS, '')
    cells.update(
        task=TASK_NAMES[model['task']],
        model=model['model']['name'],
        data=model['data']['name'],
        metric=title,
        float=NOT_RUN if base is None else f'{base:.2f}',
        method=method,
        bits=bits_of(bits),
        quantized=NOT_RUN,
        published=_published(model, method, bits_of(bits)),
    )
    if values:
        mean = statistics.fmean(values)
        spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
        sizes = found[0]['model']
        cells.update(quantized=f'{mean:.2f}{spread}', seeds=str(len(values)))
        cells['drop'] = '' if base is None else f'{base - mean:.2f}'
        cells['size in MB'] = f'{sizes["float_bytes"] / 1e6:.2f} → {sizes["bytes"] / 1e6:.2f}'
        cells['G bit operations'] = f'{sizes["bit_operations"] / 1e9:.2f}'
    return cells


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
