"""The HTML report: the comparison table, plots, training curves and pictures of the runs, in one file."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from ..core.errors import UserError
from .changes import changes_of_two
from .compare import (
    COLUMNS,
    NOT_MEASURED,
    NOT_RUN,
    TASK_NAMES,
    Record,
    by_model,
    check_comparable,
    comparison_lines,
    recipe_notes,
)
from .html_plots import Points, bits_key, curve_plot, drawable, metric_plot, series, sparkline
from .identity import backend_of, title_of
from .metrics import main_metric
from .record import as_number
from .templates import TEMPLATES
from .text import number_text, printable
from .train_log import QUANTITIES, TrainLog, read_log

TEXT_COLUMNS = ('task', 'model', 'data', 'metric', 'method', 'recipe')
PICTURES = 24
"""How many pictures of a folder are shown at most."""
WIDTH, HEIGHT, SMALL = 1400, 5000, 150_000
"""Pictures that are wider, higher or of more bytes are made smaller."""
NOT_RECORDED = 'not recorded'


@dataclass
class Picture:
    """A picture of a run. `source` is a data URI; it is '' if the file cannot be read, and `note` says why."""

    name: str
    source: str
    note: str = ''


@dataclass
class Run:
    """What the page shows about a record."""

    path: str
    facts: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    """Says what is missing."""
    same_folder: str = ''
    """Anchor of the entry that shows this work directory already."""
    sources: list[str] = field(default_factory=list)
    """Folders that the curves were read from."""
    plots: list[tuple[str, list[Markup]]] = field(default_factory=list)
    """'weights' or 'activations', and a plot of each quantity."""
    layers: list[tuple[str, list[tuple[Markup, str, str]]]] = field(default_factory=list)
    """Each layer, with a small curve, the first and last value and the sort key of each quantity."""
    sheets: list[tuple[int, Picture]] = field(default_factory=list)
    """Pictures of all distributions with their iteration: the first, the first after reshape, the last."""
    pictures: list[Picture] = field(default_factory=list)
    analysis: list[Picture] = field(default_factory=list)


@dataclass
class Entry:
    """A row of the table or the float baseline of a model, with the records behind it."""

    anchor: str
    title: str
    value: str
    records: list[Record]
    group: int
    """Number of the pair of model and data set; all rows of a group are of one architecture."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """One for each metric; none for a float baseline."""
    before: str = ''
    """The anchor of its float baseline."""


def html_report(records: Sequence[Record], folders: Iterable[str | Path] = ()) -> str:
    """The report as one HTML page that loads nothing from elsewhere.

    Args:
        records: what find_records returns; the training curves are read from the folder that a record lies in.
        folders: where the records were searched. The pictures in these folders, and in the folders between them and a
            work directory, are shown too.

    Raises:
        UserError: the records are not comparable.
    """
    check_comparable(records)
    entries = _entries(records)
    rows = [(entry, row) for entry in entries for row in entry.rows]
    shown: dict[Path, str] = {}
    runs = [(entry, [_run(record, entry.anchor, shown) for record in entry.records]) for entry in entries]
    return TEMPLATES.get_template('report.html.j2').render(
        columns=[c for c in COLUMNS if any(row[c] for _, row in rows)],
        text_columns=TEXT_COLUMNS,
        missing=(NOT_RUN, NOT_MEASURED),
        notes=recipe_notes(records),
        changed=changes_of_two(records),
        sort_key=sort_key,
        rows=rows,
        metrics=_metric_plots(entries),
        runs=runs,
        folders=[(printable(str(f)), found) for f in _between(folders, shown) if (found := pictures(f.glob('*.png')))],
        quantities=list(QUANTITIES.values()),
        count=len(records),
        time=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
    )


def sort_key(column: str, cell: str) -> str:
    """The sort key of a cell: its text in TEXT_COLUMNS, else a number; '' comes last."""
    if cell in ('', NOT_RUN, NOT_MEASURED):
        return ''
    if column in TEXT_COLUMNS:
        return cell
    if column == 'bits':
        weight, activation = bits_key(cell)
        return str(100 * weight + activation)
    numbers = re.findall(r'-?\d+(?:\.\d+)?(?:e[-+]?\d+)?', cell)  # none in 'nan'
    return numbers[-1 if column == 'size in MB' else 0] if numbers else ''


def _entries(records: Sequence[Record]) -> list[Entry]:
    """The float baseline and the rows of each model and data set, in the order of the table."""
    once = {record.get('path', id(record)): record for record in records}.values()
    found: list[Entry] = []
    for number, group in enumerate(by_model(once)):
        name = printable(title_of(group[0]))
        # The result of a runtime is in the row of its checkpoint; it has no training of its own.
        floats = [record for record in group if record['quantization'] is None and backend_of(record) == 'torch']
        anchors: dict[int, str] = {}
        bases: Sequence[Record | None] = floats or [None]
        for before in bases:
            anchor = f'run-{len(found)}'
            value = NOT_RUN if before is None else _value(before)
            anchors[id(before)] = anchor
            found.append(Entry(anchor, f'{name}: float', value, [] if before is None else [before], number))
        for line in comparison_lines(group):
            row = line.rows[0]
            recipe = f', recipe {row["recipe"]}' if row['recipe'] else ''
            title = f'{name}: {row["method"]} {row["bits"]}{recipe}'
            value = ', '.join(f'{row["metric"]} {row["quantized"]} %' for row in line.rows) if line.records else NOT_RUN
            before_anchor = anchors.get(id(line.before), next(iter(anchors.values())))
            found.append(Entry(f'run-{len(found)}', title, value, line.records, number, line.rows, before_anchor))
    return found


def _value(record: Record) -> str:
    try:
        metric, value = main_metric(record)
    except UserError:  # it has no metric
        return NOT_MEASURED
    return f'{metric} {number_text(value)} %'


def _metric_plots(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """For each task, data set and metric: plots against size and bits, and the models without a baseline."""
    parts: dict[tuple[str, ...], list[tuple[int, dict[str, str]]]] = {}
    for entry in entries:
        for row in entry.rows if entry.records else []:
            if row['quantized'] != NOT_MEASURED:
                parts.setdefault((row['task'], row['data'], row['metric']), []).append((entry.group, row))
    methods = list(dict.fromkeys(series(row) for rows in parts.values() for _, row in rows))
    found = []
    for (task, data, metric), rows in parts.items():
        plots = [(against, metric_plot(rows, against, methods)) for against in ('size in MB', 'bits')]
        missing = list(dict.fromkeys(row['model'] for _, row in rows if row['float'] in (NOT_RUN, NOT_MEASURED)))
        found.append(dict(task=task, data=data, metric=metric, plots=plots, missing=missing))
    return sorted(found, key=lambda part: list(TASK_NAMES.values()).index(part['task']))


def _run(record: Record, anchor: str, shown: dict[Path, str]) -> Run:
    """What the page shows about one record.

    Args:
        shown: work directory -> anchor of the entry that shows it; this record's folder is added.
    """
    path = record.get('path')
    run = Run(printable(path or NOT_RECORDED), _facts(record))
    folder = Path(path).parent if path else None
    log = None if folder is None else read_log(folder)
    if folder is None or log is None:
        run.notes.append('no training log beside this record')
    elif folder in shown:
        run.same_folder = shown[folder]
    else:
        shown[folder] = anchor
        _show_log(run, log, f'{anchor} {run.path}', _reshape_end(record))
        run.pictures = pictures(folder.glob('*.png'))
        run.analysis = pictures((folder / 'analysis').rglob('*.png'))
    return run


def _reshape_end(record: Record) -> float:
    """The iteration at which the reshape stage ended and rounding began."""
    schedule = (record['quantization'] or {}).get('schedule')
    reshape = schedule.get('reshape') if isinstance(schedule, dict) else None
    part, whole = (as_number(value) or 0 for value in (reshape, record['training'].get('iter')))
    return float(part) * whole


def _show_log(run: Run, log: TrainLog, name: str, reshape_end: float) -> None:
    """Add the curves and distributions of a training to a run."""
    if log.damaged:
        run.notes.append(f'{log.damaged} damaged line{"s" * (log.damaged > 1)} of the training log left out')
    steps = sorted(log.sheets)
    rounded = [step for step in steps if step >= reshape_end]
    run.sheets = [(step, picture(log.sheets[step])) for step in sorted({*steps[:1], *rounded[:1], *steps[-1:]})]
    curves = log.curves()
    if not curves:
        run.notes.append('the training log has no statistics of quantizers')
        return
    run.sources = list(dict.fromkeys(map(printable, log.sources.values())))
    for kind in ('weights', 'activations'):
        of_kind = {layer: c for layer, c in curves.items() if layer.endswith('.weight') == (kind == 'weights')}
        plots = []
        for quantity, title in QUANTITIES.items():
            lines = {layer: drawable(curve[quantity]) for layer, curve in of_kind.items() if quantity in curve}
            left_out = sum(len(of_kind[layer][quantity]) - len(points) for layer, points in lines.items())
            if left_out:
                run.notes.append(f'{kind}, {title}: {left_out} values that are not finite or too large are not drawn')
            lines = {layer: points for layer, points in lines.items() if points}
            rates = drawable(sorted(log.rates.items())) if quantity == 'threshold' else []
            plots += [curve_plot(lines, title, f'{name} {kind} {quantity}', rates)] if lines else []
        if plots:
            run.plots.append((kind, plots))
    for layer, curve in curves.items():
        run.layers.append((layer, [_layer_cell(curve.get(quantity, [])) for quantity in QUANTITIES]))


def _layer_cell(points: Points) -> tuple[Markup, str, str]:
    if not points:
        return Markup(''), NOT_RECORDED, ''
    first, last = points[0][1], points[-1][1]
    return sparkline(points), f'{first:.3g} → {last:.3g}' if len(points) > 1 else f'{last:.3g}', f'{last:.6g}'


def _facts(record: Record) -> list[tuple[str, str]]:
    """Name and value of what a record says about how its numbers were obtained."""
    training, git, hardware = (record.get(key) or {} for key in ('training', 'git', 'hardware'))
    start = training.get('start')
    dirty = git.get('dirty')
    changed = ', with uncommitted changes' if dirty else ', uncommitted changes: not recorded' if dirty is None else ''
    facts = {
        'metrics': ', '.join(f'{key} {_metric_text(value)}' for key, value in record['metrics'].items()),
        'other results': json.dumps(record['other_metrics']) if record.get('other_metrics') else None,
        'tested': record.get('time'),
        'config': (record.get('config') or {}).get('file'),
        'quantization': json.dumps(record['quantization']) if record['quantization'] else 'none: a float model',
        'checkpoint': record['checkpoint']['file'],
        'SHA-256 of the checkpoint': record['checkpoint']['sha256'],
        'trained from': f'{start["file"]}, SHA-256 {start["sha256"] or NOT_RECORDED}' if start else None,
        **{f'training {key}': training.get(key) for key in ('seed', 'epoch', 'iter')},
        'git revision': f'{git["commit"]}{changed}' if git.get('commit') else None,
        'versions': ', '.join(f'{name} {found or "absent"}' for name, found in (record.get('versions') or {}).items()),
        'processor': hardware.get('cpu'),
        'cores, threads': f'{hardware.get("cores")}, {hardware.get("threads")}' if hardware else None,
        'GPUs': (', '.join(map(str, hardware['gpus'])) or 'none') if hardware.get('gpus') is not None else None,
    }
    facts = {name: value for name, value in facts.items() if value or name != 'other results'}
    return [(name, NOT_RECORDED if value in (None, '') else printable(str(value))) for name, value in facts.items()]


def _metric_text(value: Any) -> str:
    number = as_number(value)
    return json.dumps(value) if number is None else f'{number:.6g}' if abs(number) < 1e300 else str(number)


def _between(folders: Iterable[str | Path], work_dirs: Iterable[Path]) -> Iterator[Path]:
    """`folders`, and every folder between one of them and a work directory; each once, without the work directories."""
    asked = set(map(Path, folders))
    above = [folder for work_dir in work_dirs for folder in reversed(work_dir.parents)]
    wanted = (f for f in dict.fromkeys(above) if f in asked or asked.intersection(f.parents))
    return (folder for folder in wanted if folder not in set(work_dirs))


def pictures(files: Iterable[Path]) -> list[Picture]:
    """The first PICTURES files in the order of their names, and a note if there are more."""
    files = sorted(files)
    rest = len(files) - PICTURES
    found = [picture(file) for file in files[:PICTURES]]
    return found + [Picture(f'{rest} more', '', 'not shown')] * (rest > 0)


def picture(file: Path) -> Picture:
    """A PNG as a data URI, made smaller if it is large."""
    name = printable(file.name)
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=['PNG']) as image:
            image.load()  # a damaged file raises here
            size, kind, note = image.size, 'png', ''
            if len(data) > SMALL or size[0] > WIDTH or size[1] > HEIGHT:
                smaller = image.convert('RGBA')
                smaller.thumbnail((WIDTH, HEIGHT))
                buffer = io.BytesIO()
                smaller.save(buffer, 'WEBP', quality=90)
                data, kind = buffer.getvalue(), 'webp'
                note = 'compressed' if smaller.size == size else f'scaled down from {size[0]} x {size[1]} pixels'
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        return Picture(name, '', f'cannot be read: {type(error).__name__}')
    return Picture(name, f'data:image/{kind};base64,{base64.b64encode(data).decode()}', note)
