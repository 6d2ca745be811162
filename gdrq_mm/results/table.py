"""The comparison table: a row for each quantized record, beside the float record of the same model and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..errors import UserError
from ..tasks import MAIN_METRICS

TASK_NAMES = {'cls': 'classification', 'det': 'detection', 'seg': 'segmentation'}
COLUMNS = ('task', 'model', 'data', 'metric', 'float', 'method', 'quantized', 'drop', 'bits', 'size in MB')


def comparison_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A dict by COLUMNS for each quantized record. A float record without a quantized one has no row."""
    rows = []
    baselines = {_identity(r): main_metric(r)[1] for r in records if r['quantization'] is None}
    for record in records:
        if record['quantization'] is None:
            continue
        model, before = record['model'], baselines.get(_identity(record))
        title, value = main_metric(record)
        cells = (
            TASK_NAMES[record['task']],
            model['name'],
            record['data']['name'],
            title,
            'not run' if before is None else f'{before:.2f}',
            '/'.join(dict.fromkeys(m.upper() for m in model['methods'])),
            f'{value:.2f}',
            '' if before is None else f'{before - value:.2f}',
            'W{}A{}'.format(*model['bits']),
            f'{model["float_bytes"] / 1e6:.2f} → {model["bytes"] / 1e6:.2f}',
        )
        rows.append(dict(zip(COLUMNS, cells)))
    return rows


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a screen of 80 columns: the metrics stand below, a single method heads its column."""
    rows = comparison_rows(records)
    methods, metrics = ({row[key]: None for row in rows} for key in ('method', 'metric'))
    titles = {'quantized': next(iter(methods))} if len(methods) == 1 else {}
    caption = f'{", ".join(metrics)} in %'
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify='left')
    shown = [c for c in COLUMNS if c != 'metric' and not (c == 'method' and titles)]
    for column in shown:
        justify = 'right' if column in ('float', 'quantized', 'drop') else 'left'
        table.add_column(titles.get(column, column), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(row[column].replace(' → ', '→') for column in shown))
    return table


def comparison_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    return markdown(COLUMNS, [[row[column] for column in COLUMNS] for row in comparison_rows(records)])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main_metric(record: Mapping[str, Any]) -> tuple[str, float]:
    """Title and value, in %, of the metric that tables show.

    Raises:
        UserError: the record has none of those of its task.
    """
    known = MAIN_METRICS[record['task']]
    for key, (title, factor) in known.items():
        if key in record['metrics']:
            return title, record['metrics'][key] * factor
    if record['task'] == 'det' and not record['metrics']:  # mmdet's answer when a model detects nothing at all
        return 'box AP', 0.0
    raise UserError(f'a record of {record["data"]["name"]} has none of the metrics {", ".join(known)}')


def _identity(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What two records share that may stand in one row: architecture, data and evaluation."""
    return record['task'], record['model']['config_sha256'], record['data']['evaluation_sha256']
