"""The metrics that tables show: which of those that an evaluator returned, in %, and their values in a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError
from .record import MAIN_METRICS, OTHER_METRICS, as_number
from .text import printable

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A metric that tables show."""

    title: str
    factor: float = 1
    """Makes the evaluator's value a percentage."""
    known: bool = True
    """Whether it is one of MAIN_METRICS or OTHER_METRICS: in %, and more is better."""


def metrics_of(record: Record) -> dict[Metric, float]:
    """The metrics that tables show and their values, in % where the metric is known.

    All MAIN_METRICS of the task; without any of them the first of OTHER_METRICS; without that all numbers there are.
    A known metric is known under another prefix too, also beside itself, as several evaluators give it.
    """
    numbers = {key: number_of(value) for key, value in record['metrics'].items() if as_number(value) is not None}
    main, other = MAIN_METRICS[record['task']], OTHER_METRICS[record['task']]
    for known, limit in ((main, len(main)), (other, 1)):
        exact = {key: key for key in known if key in numbers}
        ends = {key.rpartition('/')[2]: key for key in reversed(known)}
        same_end = {key: ends[key.rpartition('/')[2]] for key in numbers if key.rpartition('/')[2] in ends}
        found = {}
        for key, name in list((exact | same_end | exact).items())[:limit]:
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


def value_of(record: Record, metric: Metric) -> float | None:
    """The value of a metric in a record; None if it was not measured."""
    return 0.0 if _found_nothing(record) and metric.known else metrics_of(record).get(metric)


def _found_nothing(record: Record) -> bool:
    """Whether it is of a detector that detects nothing: mmdet returns no metrics then."""
    return record['task'] == 'det' and not record['metrics']


def all_metrics(of_model: Sequence[Record]) -> list[Metric]:
    """All metrics of the records of a model."""
    found = list(dict.fromkeys(metric for record in of_model for metric in metrics_of(record)))
    detected_nothing = any(map(_found_nothing, of_model))
    return found or [Metric('box AP', 100) if detected_nothing else Metric('none', known=False)]


def number_of(value: Any) -> float:
    """A number as a float; an integer that is too large becomes infinite."""
    number = as_number(value)
    try:
        return float(math.nan if number is None else number)
    except OverflowError:
        return math.inf if number and number > 0 else -math.inf
