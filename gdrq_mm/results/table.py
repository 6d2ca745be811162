"""The comparison table: a row for each quantized record, beside the float record of the same model and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..tasks import MAIN_METRICS

TASK_NAMES = {'cls': 'classification', 'det': 'detection', 'seg': 'segmentation'}


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Task, model, data, float, quantized, drop, bits, size. A float model without a quantized one is not shown."""
    methods = sorted({m.upper() for r in records if r['quantization'] for m in r['model']['methods']})
    metrics = {MAIN_METRICS[r['task']][1]: None for r in records}
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=f'{", ".join(metrics)} in %',
        caption_justify='left',
    )
    quantized = methods[0] if len(methods) == 1 else 'quantized'
    for column in ('task', 'model', 'data', 'float', quantized, 'drop', 'bits', 'size in MB'):
        justify = 'right' if column in ('float', quantized, 'drop', 'size in MB') else 'left'
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    baselines = {_identity(r): r for r in records if r['quantization'] is None}
    for record in records:
        if record['quantization'] is None:
            continue
        model, value, baseline = record['model'], _metric(record), baselines.get(_identity(record))
        table.add_row(
            TASK_NAMES[record['task']],
            model['name'],
            record['data']['name'],
            f'{_metric(baseline):.2f}' if baseline else 'not run',
            f'{value:.2f}',
            f'{_metric(baseline) - value:.2f}' if baseline else '',
            'W{}A{}'.format(*model['bits']),
            f'{model["float_bytes"] / 1e6:.2f} → {model["bytes"] / 1e6:.2f}',
        )
    return table


def _metric(record: Mapping[str, Any]) -> float:
    return record['metrics'][MAIN_METRICS[record['task']][0]]


def _identity(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What two records share that may stand in one row: architecture, data and evaluation."""
    return record['task'], record['model']['config_sha256'], record['data']['evaluation_sha256']
