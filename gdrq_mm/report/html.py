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

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .compare import (
    COLUMNS,
    NOT_RUN,
    TASK_NAMES,
    Record,
    backend_of,
    bits_of,
    check_comparable,
    comparison_rows,
    identity_of,
    main_metric,
    method_of,
    title_of,
)
from .html_plots import Points, bits_key, curve_plot, metric_plot, sparkline
from .train_log import QUANTITIES, TrainLog, read_log

TEXT_COLUMNS = ('task', 'model', 'data', 'metric', 'method')
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
    row: dict[str, str] | None = None
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
    rows = [entry for entry in entries if entry.row is not None]
    shown: dict[Path, str] = {}
    runs = [(entry, [_run(record, entry.anchor, shown) for record in entry.records]) for entry in entries]
    options: dict[str, Any] = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    return environment.get_template('report.html.j2').render(
        columns=[c for c in COLUMNS if any(entry.row and entry.row[c] for entry in rows)],
        text_columns=TEXT_COLUMNS,
        not_run=NOT_RUN,
        sort_key=sort_key,
        rows=rows,
        metrics=_metric_plots(rows),
        runs=runs,
        folders=[(str(f), found) for f in _between(folders, shown) if (found := pictures(f.glob('*.png')))],
        quantities=list(QUANTITIES.values()),
        count=len(records),
        time=datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    )


def sort_key(column: str, cell: str) -> str:
    """The sort key of a cell: its text in TEXT_COLUMNS, else a number; '' comes last."""
    if cell in ('', NOT_RUN):
        return ''
    if column in TEXT_COLUMNS:
        return cell
    if column == 'bits':
        weight, activation = bits_key(cell)
        return str(100 * weight + activation)
    numbers = re.findall(r'-?\d+(?:\.\d+)?', cell)
    return numbers[-1 if column == 'size in MB' else 0]


def _entries(records: Sequence[Record]) -> list[Entry]:
    """The float baseline and the rows of each model and data set, in the order of the table."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in {record.get('path', id(record)): record for record in records}.values():
        groups.setdefault(identity_of(record), []).append(record)
    found: list[Entry] = []
    for number, group in enumerate(groups.values()):
        name = title_of(group[0])
        metric, _ = main_metric(group[0])
        # The result of a runtime is in the row of its checkpoint; it has no training of its own.
        trained = [record for record in group if backend_of(record) == 'torch']
        floats = [record for record in trained if record['quantization'] is None]
        value = f'{metric} {main_metric(floats[0])[1]:.2f} %' if floats else NOT_RUN
        before = f'run-{len(found)}'
        found.append(Entry(before, f'{name}: float', value, floats, number))
        for row in comparison_rows(group):
            label = row['method'], row['bits']
            of_row = [
                r
                for r in trained
                if r['quantization'] is not None and (method_of(r), bits_of(r['model']['bits'])) == label
            ]
            value = f'{metric} {row["quantized"]} %' if of_row else NOT_RUN
            found.append(Entry(f'run-{len(found)}', f'{name}: {" ".join(label)}', value, of_row, number, row, before))
    return found


def _metric_plots(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """For each task and data set: plots of the metric against size and bits, and the models without a baseline."""
    parts: dict[tuple[str, ...], list[tuple[int, dict[str, str]]]] = {}
    for entry in entries:
        if entry.row is not None and entry.records:
            key = entry.row['task'], entry.row['data'], entry.row['metric']
            parts.setdefault(key, []).append((entry.group, entry.row))
    methods = list(dict.fromkeys(row['method'] for rows in parts.values() for _, row in rows))
    found = []
    for (task, data, metric), rows in parts.items():
        plots = [(against, metric_plot(rows, against, methods)) for against in ('size in MB', 'bits')]
        missing = list(dict.fromkeys(row['model'] for _, row in rows if row['float'] == NOT_RUN))
        found.append(dict(task=task, data=data, metric=metric, plots=plots, missing=missing))
    return sorted(found, key=lambda part: list(TASK_NAMES.values()).index(part['task']))


def _run(record: Record, anchor: str, shown: dict[Path, str]) -> Run:
    """What the page shows about one record.

    Args:
        shown: work directory -> anchor of the entry that shows it; this record's folder is added.
    """
    path = record.get('path')
    run = Run(path or NOT_RECORDED, _facts(record))
    folder = Path(path).parent if path else None
    log = None if folder is None else read_log(folder)
    if folder is None or log is None:
        run.notes.append('no training log beside this record')
    elif folder in shown:
        run.same_folder = shown[folder]
    else:
        shown[folder] = anchor
        _show_log(run, log, f'{anchor} {path}', _reshape_end(record))
        run.pictures = pictures(folder.glob('*.png'))
        run.analysis = pictures((folder / 'analysis').rglob('*.png'))
    return run


def _reshape_end(record: Record) -> float:
    """The iteration at which the reshape stage ended and rounding began."""
    schedule = (record['quantization'] or {}).get('schedule') or {}
    return (schedule.get('reshape') or 0) * ((record.get('training') or {}).get('iter') or 0)


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
    run.sources = list(dict.fromkeys(log.sources.values()))
    for kind in ('weights', 'activations'):
        of_kind = {layer: c for layer, c in curves.items() if layer.endswith('.weight') == (kind == 'weights')}
        plots = []
        for quantity, title in QUANTITIES.items():
            lines = {layer: curve[quantity] for layer, curve in of_kind.items() if quantity in curve}
            plots += [curve_plot(lines, title, f'{name} {kind} {quantity}')] if lines else []
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
    dirty = {True: ', with uncommitted changes', None: ', uncommitted changes: not recorded'}.get(git.get('dirty'), '')
    facts = {
        'metrics': ', '.join(f'{key} {value:.6g}' for key, value in record['metrics'].items()),
        'tested': record.get('time'),
        'config': (record.get('config') or {}).get('file'),
        'quantization': json.dumps(record['quantization']) if record['quantization'] else 'none: a float model',
        'checkpoint': record['checkpoint']['file'],
        'SHA-256 of the checkpoint': record['checkpoint']['sha256'],
        'trained from': f'{start["file"]}, SHA-256 {start["sha256"] or NOT_RECORDED}' if start else None,
        **{f'training {key}': training.get(key) for key in ('seed', 'epoch', 'iter')},
        'git revision': f'{git["commit"]}{dirty}' if git.get('commit') else None,
        'versions': ', '.join(f'{name} {found or "absent"}' for name, found in (record.get('versions') or {}).items()),
        'processor': hardware.get('cpu'),
        'cores, threads': f'{hardware.get("cores")}, {hardware.get("threads")}' if hardware else None,
        'GPUs': (', '.join(map(str, hardware['gpus'])) or 'none') if 'gpus' in hardware else None,
    }
    return [(name, NOT_RECORDED if value in (None, '') else str(value)) for name, value in facts.items()]


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
        return Picture(file.name, '', f'cannot be read: {type(error).__name__}')
    return Picture(file.name, f'data:image/{kind};base64,{base64.b64encode(data).decode()}', note)
