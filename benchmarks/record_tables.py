"""The tables of docs/*.md that are made of run records. A row is a model and its bits, with the seeds averaged."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from figure_tables import FIGURES

from gdrq_mm.core.errors import UserError
from gdrq_mm.report.compare import NOT_RUN, PUBLISHED, comparison_rows
from gdrq_mm.report.identity import backend_of, bits_of, checkpoint_of, method_of, starts_of
from gdrq_mm.report.metrics import main_metric
from gdrq_mm.report.record import read_record
from gdrq_mm.report.text import markdown

RECORDS = FIGURES.parent / 'records'

OLDER = {
    '†': (
        '2026-11-29',
        'with older defaults of GDRQ: T of activations from the mean of all values, k = 3.5 for weights of 4 bits, '
        'three levels for those of 2',
    ),
    '‡': ('2026-12-01', 'before a default k of weights ended at the largest weight'),
}
"""Mark -> the day that ended such defaults of GDRQ, which is compared with the time of a record, and how they were."""

Records = list[Any]
Row = dict[str, str]


# ---- what all tables of records share ---------------------------------------------------------------------------


def read(pattern: str, fits: str = '.*') -> Records:
    """The records below docs/records/ whose path fits the pattern and whose name fits the regular expression."""
    return [read_record(path) for path in sorted(RECORDS.glob(pattern)) if re.fullmatch(fits, path.stem)]


def rows_of(records: Records) -> list[Row]:
    """The rows of the comparison; those of records with older defaults are marked."""
    floats = {checkpoint_of(r): f'{main_metric(r)[1]:.2f}' for r in records if r['quantization'] is None}
    marks, only = {}, next(iter(floats.values())) if len(floats) == 1 else NOT_RUN
    for record in records:
        before = next((floats[start] for start in starts_of(record) if start in floats), only)
        if mark := mark_of([record]):
            marks[(*_key(record), before)] = mark
    rows = comparison_rows(records)
    for row in rows:
        row['quantized'] += marks.get((row['model'], row['data'], row['method'], row['bits'], row['float']), '')
    return rows


def mark_of(records: Records) -> str:
    """' †' or ' ‡' where one of the records was made with defaults of GDRQ that have changed since, else ''."""
    quantized = [
        r for r in records if 'gdrq' in r['model']['methods'] and not bits_of(r['model']['bits']).startswith('W32')
    ]
    first = min((record['time'] for record in quantized), default='9')
    return next((f' {mark}' for mark, (until, _) in OLDER.items() if first < until), '')


def notes_of(text: str) -> str:
    """What the marks in a text mean, one sentence each."""
    return ' '.join(f'{mark} measured {how}.' for mark, (_, how) in OLDER.items() if mark in text)


def _key(record: Any) -> tuple[str, ...]:
    model = record['model']
    return model['name'], record['data']['name'], method_of(record), bits_of(model['bits'])


def table(rows: list[Row], columns: Sequence[str]) -> str:
    """A table without its constant and its empty columns; the constants stand in the line above it."""
    constant = {c: rows[0][c] for c in columns if len(rows) > 1 and len({row[c] for row in rows}) == 1}
    shown = [c for c in columns if c not in constant and any(row[c] for row in rows)]
    above = [_named(name, value) for name, value in constant.items() if value]
    told = [f'All rows: {", ".join(above)}.' if above else '', notes_of(str([row[c] for row in rows for c in shown]))]
    lines = [' '.join(filter(None, told)), ''] if any(told) else []
    return '\n'.join([*lines, markdown(shown, [[row[c] for c in shown] for row in rows])])


def _named(column: str, value: str) -> str:
    if column in ('task', 'model', 'data', 'method', 'bits', 'setting'):
        return value
    if column == 'seeds':
        return f'{value} seed{"s" * (value != "1")}'
    return f'{value} in %' if column == 'metric' else f'{column} {value}'


def comparison(rows: list[Row]) -> str:
    """A row for each model and bits, with both runtimes."""
    columns = 'task model data metric method bits float quantized seeds drop onnxruntime openvino'.split()
    return table(rows, [*columns, 'size in MB', 'G bit operations'])


def by_bits(records: Records) -> str:
    """A row for each method, with columns (accuracy, drop, drop against the control) for each number of bits."""
    rows = [row for row in rows_of(records) if row['seeds']]
    common = ['task', 'model', 'data', 'metric', 'float', 'trained on', 'method', 'seeds']
    found: dict[tuple[str, ...], Row] = {}
    bits = sorted({row['bits'] for row in rows}, reverse=True)
    for row in rows:
        row['float'] = row['float'].replace(NOT_RUN, '')  # a training that starts from a control has no float model
        cells = found.setdefault(tuple(row[c] for c in common), {c: row[c] for c in common})
        cells[row['bits']], cells[f'{row["bits"]} drop'] = row['quantized'], row['drop']
        cells[f'{row["bits"]} drop, trained on'] = row['drop, trained on']
    columns = [*common, *(c for b in bits for c in (b, f'{b} drop', f'{b} drop, trained on'))]
    return table([{c: cells.get(c, '') for c in columns} for cells in found.values()], columns)


# ---- tables of records ------------------------------------------------------------------------------------------

CAMVID_SEEDS = r'.*_seed\d_camvid'
CONTROL = 'recipe/cifar10_12e-gdrq-control-w4a4-seed0.json'
"""The float model that the cells of benchmarks/continued.py start from."""
W4A4 = r'(float|gdrq-(control-)?w4a4-seed\d)'
HEADLINE = (
    ('ResNet-18, CIFAR-10', 'continued/*.json', r'cifar10_6e-gdrq-(control-)?w4a4-seed\d', 'ResNet-18', ' ¹'),
    ('Faster R-CNN, BCCD', 'tasks/*.json', f'faster_rcnn-{W4A4}', 'Faster R-CNN R18', ''),
    ('YOLOX, BCCD', 'tasks/*.json', f'yolox_20e-{W4A4}', 'YOLOX', ''),
    ('PSPNet, CamVid', 'tasks/*.json', f'pspnet-{W4A4}', 'PSPNet R18', ''),
)
"""Title, records and which of them, name in docs/figures/inference.json, and a mark where that model is not the one of
the records."""


def over_seeds(pattern: str, fits: str = '.*') -> list[Row]:
    """Rows of records of seed 0 below docs/records/ and of other seeds below docs/records/gpu/.

    The other seeds start from the same float weights in a file of its own, so each folder is compared by itself.

    Raises:
        UserError: the two folders have different float models.
    """
    own, others = read(pattern, fits), read(f'gpu/{pattern}', CAMVID_SEEDS)
    rows = rows_of(own)
    floats = {r['model']['name']: main_metric(r)[1] for r in read(f'gpu/{pattern}') if r['quantization'] is None}
    for row in rows:
        key = row['model'], row['data'], row['method'], row['bits']
        if not any(_key(r) == key for r in others):
            continue
        before = floats[row['model']]
        if f'{before:.2f}' != row['float']:
            raise UserError(f'{row["model"]} has another float model on the GPU')
        found = [r for r in (*own, *others) if _key(r) == key and backend_of(r) == 'torch']
        values = [main_metric(r)[1] for r in found]
        mean = statistics.fmean(values)
        row.update(quantized=f'{mean:.2f} ± {statistics.stdev(values):.2f}{mark_of(found)}', seeds=str(len(values)))
        row['drop'] = f'{before - mean:.2f}'
    return rows


def headline() -> str:
    """Four models: accuracy and size at W4A4, and speed in ONNX Runtime."""
    speed = json.loads((FIGURES / 'inference.json').read_text())['rows']
    lines = []
    for title, pattern, fits, timed, mark in HEADLINE:
        (row,) = [r for r in over_seeds(pattern, fits) if r['bits'] == 'W4A4' and r['seeds']]
        (faster,) = [
            r['faster']
            for r in speed
            if (r['model'], r['runtime'], r['bits'], r['batch'], r['threads']) == (timed, 'onnxruntime', 'W4A4', 1, 2)
        ]
        before = row['float'].replace(NOT_RUN, f'{main_metric(read_record(RECORDS / CONTROL))[1]:.2f}')
        values = (before, row['trained on'], row['quantized'], row['size in MB'])
        lines.append((row['task'], title, row['metric'], *values, f'{faster:.2f}{mark}'))
    columns = ('task', 'model, data', 'metric', 'float', 'trained on', 'W4A4', 'size in MB', 'times faster')
    return markdown(columns, lines)


def camvid() -> str:
    """CamVid over three seeds; the runtimes ran the model of seed 0."""
    return comparison(over_seeds('*_camvid.json'))


def quickstart(task: str) -> str:
    """What `make quickstart` printed for a task."""
    return comparison(rows_of([record for record in read('quickstart/*.json') if record['task'] == task]))


def published() -> str:
    """Numbers of papers and of their reproductions, beside those of this project where there are any."""
    ours = {
        (r['model']['name'], r['data']['name'], method_of(r), bits_of(r['model']['bits'])): main_metric(r)[1]
        for r in read('**/*.json')
        if r['quantization'] is not None
    }
    rows = []
    for entry in json.loads(PUBLISHED.read_text()):
        found = ours.get((entry['model'], entry['data'], entry['method'], entry['bits']))
        row = {key: str(entry[key]) for key in ('model', 'data', 'method', 'bits', 'source')}
        row.update(published=str(entry['value']), ours='not run' if found is None else f'{found:.2f}')
        rows.append(row)
    return table(rows, ('data', 'model', 'method', 'bits', 'published', 'ours', 'source'))


def grid_cost() -> str:
    """Size and bit operations of the grid's classifier by its bits."""
    records = read('grid/*.json', r'cifar10-(float|(gdrq|ptq)-w\d+a\d+-seed0)')
    rows = {row['bits']: row for row in rows_of(records) if row['seeds']}
    return table(
        [rows[bits] for bits in sorted(rows, reverse=True)], ('model', 'bits', 'size in MB', 'G bit operations')
    )


GRID = {
    'grid_cifar10': r'cifar10-(float|(?!ptq)\w+-w[42]a4-seed\d)',
    'grid_low_bits': r'cifar10-(float|(?!ptq)\w+-w(3a3|2a2)-seed0)',
    **{f'grid_{task}': rf'digits_{task}-(?!gdrq-undeployable).*' for task in ('det', 'seg', 'vgg')},
    'grid_trials': r'cifar10-(float|(?!ptq|gdrq-undeployable)\w+(-\w+)?-w4a4-seed0)',
}
"""Tables of benchmarks/grid.py, and the names of the cells that stand in them."""


def grid(cells: str, folder: str = 'grid') -> str:
    """Records of the grid whose name fits."""
    return by_bits(read(f'{folder}/*.json', cells))


def deployable() -> str:
    """What the operands of additions cost that `deployable` quantizes, seed 0."""
    names = '(float|gdrq-(undeployable-)?w4a4-seed0)'
    cells = read('grid/*.json', rf'(cifar10|digits_seg)-{names}')
    cells += read('older/*.json', rf'digits_det-{names}')
    records = read('*_camvid.json', r'(fcn|pspnet)_r18_(gdrq_w4a4_)?camvid')
    groups = (cells, records, read('gpu/*.json', r'.*undeployable|(fcn|pspnet)_r18_camvid'))
    pairs: dict[tuple[str, str, str, str], Row] = {}
    for row in (row for group in groups for row in rows_of(group)):
        name = (row['model'], row['data'], row['metric'], row['float'])
        pairs.setdefault(name, {})['False' if 'deployable' in row['method'] else 'True'] = row['quantized']
    rows = [
        {**dict(zip(('model', 'data', 'metric', 'float'), name)), **{f'deployable={k}': v for k, v in pair.items()}}
        for name, pair in pairs.items()
    ]
    return table(rows, ('model', 'data', 'metric', 'float', 'deployable=True', 'deployable=False'))


def ranked(sweep: str) -> str:
    """The cells of benchmarks/SWEEP.py, most bits first, the best of equal bits first."""
    rows = [row for row in rows_of(read(f'{sweep}/*.json')) if row['seeds']]
    return comparison(sorted(rows, key=lambda row: (row['bits'], float(row['quantized'].split()[0])), reverse=True))


def recipe() -> str:
    """What the defaults, distillation and the training itself give (benchmarks/recipe.py)."""
    return by_bits(read('recipe/*.json', r'cifar10-(?!.*w(3a3|2a2)).*'))


def tasks(models: str) -> str:
    """Detection or segmentation by one recipe (benchmarks/tasks.py)."""
    return by_bits(read('tasks/*.json', rf'({models})-.*(float|w[42]a4-seed\d)'))


def task_parts() -> str:
    """What weights and activations of few bits cost the YOLOX after 20 epochs, both and each alone."""
    parts = r'yolox_20e-(float|gdrq-(control-w4a4|w8a8|w4a4|w4a32|w32a4)-seed0)'
    rows = [row for row in rows_of(read('tasks/*.json', parts)) if row['seeds']]
    columns = ('task', 'model', 'data', 'metric', 'float', 'trained on', 'method', 'seeds')
    return table(rows, [*columns, 'bits', 'quantized', 'drop', 'drop, trained on'])


CHOSEN = (
    ('', r'.*-gdrq-w\d.*'),
    ('mixed weights', r'.*-mixed-.*'),
    ('mixed weights and inputs', r'.*-mixed_bitops-.*'),
    ('mixed weights, by loss', r'.*-by_loss-.*'),
    ('mixed weights, learned', r'.*-by_search-.*'),
)
"""What was chosen for each layer, and the cells of benchmarks/mixed.py."""
UNIFORM = {'yolox': 'yolox_20e', 'pspnet': 'pspnet'}
"""Model -> how the cells of benchmarks/tasks.py begin that have the same bits in all layers."""


def mixed(model: str) -> str:
    """Bits chosen for each layer beside uniform ones (benchmarks/mixed.py), the smallest models first."""
    rows = []
    for bits, cells in CHOSEN:
        records = read(f'mixed/{model}-*.json', cells)
        if not bits and model in UNIFORM:
            records += read(f'tasks/{UNIFORM[model]}-*.json', r'.*-gdrq-w[24]a4-seed[01]')
        for row in rows_of(records):
            rows.append({**row, 'bits': bits or row['bits'], 'size in MB': row['size in MB'].split()[-1]})
    columns = ('model', 'data', 'metric', 'bits', 'quantized', 'seeds', 'size in MB', 'G bit operations')
    return table(sorted((r for r in rows if r['seeds']), key=lambda r: (r['data'], float(r['size in MB']))), columns)


def progressive() -> str:
    """2-bit weights from the float model and from the W4A4 model (benchmarks/progressive.py)."""
    ways = {'float': r'.*two_epochs.*', 'W4A4': r'.*from_w4a4.*'}
    rows = [
        {**row, 'starts from': start}
        for start, cells in ways.items()
        for row in rows_of(read('progressive/*.json', cells))
        if row['seeds']
    ]
    return table(rows, ('model', 'data', 'metric', 'bits', 'starts from', 'quantized', 'seeds'))


def continued(cells: str = 'cifar10') -> str:
    """The classifier in few bits at the end of its training, for three or six epochs (benchmarks/continued.py)."""
    return by_bits(read(f'continued/{cells}-*.json'))


def longer() -> str:
    """The classifier, trained with its quantizers as long as in float (benchmarks/recipe.py)."""
    return by_bits(read('recipe/cifar10_12e-*.json'))


def per_level() -> str:
    """The detector's RPN with one threshold for all pyramid levels and with one for each."""
    names = {
        'float': 'faster_rcnn_r18_bccd',
        'one for all levels': 'faster_rcnn_r18_gdrq_w4a4_bccd',
        'one a level': 'faster_rcnn_r18_gdrq_w4a4_per_level',
    }
    found = {title: main_metric(read_record(RECORDS / f'{name}.json'))[1] for title, name in names.items()}
    return markdown(('thresholds', 'box AP'), [(title, f'{value:.2f}') for title, value in found.items()])


TABLES: dict[str, Callable[[], str]] = {
    'cifar10': lambda: comparison(rows_of(read('*_cifar10.json'))),
    'bccd': lambda: comparison(rows_of(read('*faster_rcnn*_bccd.json'))),
    'bccd_older': lambda: comparison(rows_of(read('*yolox*_bccd.json'))),
    **{f'quickstart_{task}': partial(quickstart, task) for task in ('cls', 'det', 'seg')},
    **{name: partial(grid, cells) for name, cells in GRID.items()},
    'grid_det_older': partial(grid, GRID['grid_det'], 'older'),
    **{sweep: partial(ranked, sweep) for sweep in ('ablation', 'references')},
    'tasks_bccd': partial(tasks, 'faster_rcnn|yolox_20e|yolox_20e_again|yolox_20e_first'),
    'tasks_bccd_60e': partial(tasks, 'yolox'),
    'tasks_camvid': partial(tasks, 'pspnet|pspnet_first|fcn'),
    **{f'mixed_{model}': partial(mixed, model) for model in ('cifar10', 'yolox', 'pspnet')},
    'continued_6e': partial(continued, 'cifar10_6e'),
    'grid_ptq': lambda: comparison(rows_of(read('grid/*.json', r'cifar10-(float|ptq-w\d+a\d+-seed0)'))),
    **{
        f.__name__: f
        for f in (
            headline,
            camvid,
            published,
            grid_cost,
            deployable,
            per_level,
            recipe,
            longer,
            continued,
            progressive,
            task_parts,
        )
    },
}
