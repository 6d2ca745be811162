"""The tables of docs/*.md that come from docs/figures/*.json, for tables.py."""

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gdrq_mm.report.text import markdown

FIGURES = Path(__file__).resolve().parent.parent / 'docs/figures'


def cifar10_search() -> str:
    """The search for the default k."""
    rows = json.loads((FIGURES / 'cifar10_search.json').read_text())
    shown = ('failed' if r['top1'] is None else f'{r["top1"]:.2f}' for r in rows)
    cells = [(r['bits'].upper(), r['setting'], top1) for r, top1 in zip(rows, shown)]
    return markdown(('bits', 'setting', 'top-1 in %'), cells)


def train_step(file: str) -> str:
    """Time and memory of a training step over float, a row for each model and setting."""
    found = json.loads((FIGURES / f'{file}.json').read_text())['rows']
    keys = ('model', 'precision', 'threads', 'memory_format')
    names = list(dict.fromkeys(r['contestant'] for r in found if r['contestant'] != 'float'))
    cells = {(*(r[key] for key in keys), r['contestant']): r for r in found}
    rows = []
    for where in dict.fromkeys(key[:-1] for key in cells):
        base = cells[(*where, 'float')]
        row = [*map(str, where), f'{1000 * base["median_seconds"]:.0f}']
        for name in names:
            r = cells.get((*where, name))
            row.append('' if r is None else f'{r["ratio"]:.2f}, {r["memory_ratio"]:.2f}')
        rows.append(row)
    return markdown(('model', 'precision', 'threads', 'memory format', 'float, ms', *names), rows)


def hooks() -> str:
    """What the hooks of this project cost each training step (benchmarks/hooks.py)."""
    rows = []
    for found in json.loads((FIGURES / 'hooks.json').read_text())['rows']:
        step, ours = found['step_seconds'], {name: found['hooks'][name] for name in found['ours']}
        dearest = max(ours, key=lambda name: ours[name])
        cells = (f'{1000 * step:.0f}', f'{1000 * sum(ours.values()):.1f}', f'{100 * sum(ours.values()) / step:.2f}')
        rows.append((Path(found['config']).stem, *cells, f'{dearest} {1000 * ours[dearest]:.1f}'))
    return markdown(('config', 'step, ms', 'hooks, ms', '%', 'dearest, ms'), rows)


def flips() -> str:
    """What random changes of single codes do to a detector's metric (benchmarks/flips.py)."""
    found = json.loads((FIGURES / 'flips.json').read_text())
    rates: dict[float, list[dict]] = {}
    for row in found['rows']:
        rates.setdefault(row['rate'], []).append(row)
    rows = []
    for each in rates.values():
        changed = sorted(row['flipped'] for row in each)
        span = f'{changed[0]:,}' if len(changed) == 1 else f'{changed[0]:,} to {changed[-1]:,}'
        of = f' of {each[0]["codes"] / 1e6:,.0f} million' if 'codes' in each[0] else ''
        rows.append((span + of, ', '.join(f'{100 * row["metrics"][found["metric"]]:.1f}' for row in each)))
    return markdown(('codes changed by one step', 'box AP in torch'), rows)


def scaling() -> str:
    """A training step of one and of two processes."""
    found = json.loads((FIGURES / 'scaling.json').read_text())
    columns = ('model', 'one process, ms', 'two processes, ms', 'efficiency')
    rows = [
        (r['model'], f'{1000 * r["one"]:.0f}', f'{1000 * r["two"]:.0f}', f'{r["efficiency"]:.2f}')
        for r in found['steps']
    ]
    return markdown(columns, rows)


def synchronization() -> str:
    """Adding up the statistics of thresholds: measured for two processes, on paper for more."""
    found = json.loads((FIGURES / 'scaling.json').read_text())['synchronization']
    measured = ('2, measured', f'{1000 * found["seconds"]:.2f}', '', f'{100 * found["seconds"]:.2f}')
    paper = [
        (f'{r["gpus"]}', f'{1000 * r["ring"]:.2f}', f'{1000 * r["tree"]:.2f}', f'{100 * r["tree"]:.2f}')
        for r in found['on_paper']
    ]
    return markdown(('processes', 'ring, ms', 'tree, ms', '1 % of a step of, in s'), [measured, *paper])


def inference(file: str, threads: int) -> str:
    """Speed, size and memory of exported models, batch 1; both runtimes side by side."""
    found = json.loads((FIGURES / f'{file}.json').read_text())['rows']
    rows = {(r['model'], r['bits'], r['runtime']): r for r in found if (r['batch'], r['threads']) == (1, threads)}
    lines = []
    for model, bits in dict.fromkeys((model, bits) for model, bits, _ in rows):
        ort, vino = rows[model, bits, 'onnxruntime'], rows[model, bits, 'openvino']
        torch = rows.get((model, bits, 'torch'))
        line = [model, bits, f'{ort["bytes"] / 1e6:.1f}', f'{ort["smaller"]:.1f}']
        line.append(f'{1000 * torch["seconds"]:.1f}' if torch else '')
        for r in (ort, vino):
            line += [f'{1000 * r["seconds"]:.1f}', f'{r["faster"]:.2f}', f'{r["peak_bytes"] / 1e6:.0f}']
        lines.append([*line, '{} of {}'.format(*ort['kernels']) if ort['kernels'] else ''])
    shared = ('model', 'bits', 'MB', 'times smaller', 'torch: ms')
    each = [f'{name}: {what}' for name in ('ORT', 'OV') for what in ('ms', 'times faster', 'peak MB')]
    return markdown((*shared, *each, 'integer layers in ORT'), lines)


def inference_ratios(file: str) -> str:
    """How many times faster than float in the same runtime, for every batch and number of threads."""
    rows = [
        r
        for r in json.loads((FIGURES / f'{file}.json').read_text())['rows']
        if r['runtime'] != 'torch' and r['bits'] in ('W8A8', 'W4A4', 'W4A4, float additions')
    ]
    settings = sorted({(r['runtime'], r['batch'], r['threads']) for r in rows})
    found = {(r['model'], r['bits'], r['runtime'], r['batch'], r['threads']): r['faster'] for r in rows}
    keys = dict.fromkeys((r['model'], r['bits']) for r in rows)
    names = dict(onnxruntime='ORT', openvino='OV')
    columns = ('model', 'bits', *(f'{names[r]} {b}/{t}' for r, b, t in settings))
    return markdown(columns, [(*key, *(f'{found[(*key, *s)]:.2f}' for s in settings)) for key in keys])


def quantized_loss() -> str:
    """The paper's Fig. 5 experiment at 4 bits, p = 1."""
    found = json.loads((FIGURES / 'quantized_loss.json').read_text())
    rows = [
        (
            f'{r["lo"]} .. {r["hi"]}',
            r['distribution'],
            f'{r["loss"]:.3f}',
            f'{found["paper"]["loss"][r["distribution"]]:.3f}',
            f'{r["threshold_over_max"]:.2f}',
            f'{r["threshold_over_sigma"]:.2f}',
            f'{r["k"]:.2f}',
        )
        for r in found['weights']
        if (r['bits'], r['p']) == (found['paper']['bits'], found['paper']['p'])
    ]
    return markdown(('codes', 'distribution', 'ours', 'paper', 'T*/max', 'T*/sigma', 'k = T*/mean'), rows)


def campaign(name: str, first: str) -> str:
    """What a campaign of tests/campaigns/ counted; `A: x` and `A, x` become a row A with a column x."""
    found = json.loads((FIGURES / f'{name}.json').read_text())['rows']
    split = {what: re.match(r'(.*?)(?:: |, (?=iteration))(.*)', what) for what in found}
    cells = [
        (m[1], m[2], f'{found[what]:,}') if m else (what, 'number', f'{found[what]:,}') for what, m in split.items()
    ]
    columns = list(dict.fromkeys(column for _, column, _ in cells))
    values = {(row, column): value for row, column, value in cells}
    rows = list(dict.fromkeys(row for row, _, _ in cells))
    return markdown((first, *columns), [(row, *(values.get((row, c), '') for c in columns)) for row in rows])


def fusions() -> str:
    """Gradients of the branches where a detector's neck fuses features (benchmarks/fusions.py)."""
    found = json.loads((FIGURES / 'fusions.json').read_text())['models']
    names = next(iter(found.values()))
    rows = [(name, *(', '.join(f'{x:.2f}' for x in each[name]) for each in found.values())) for name in names]
    return markdown(('fusion', *found), rows)


def sensitivity_rank() -> str:
    """What predicts the accuracy of mixed bits after training (benchmarks/sensitivity_rank.py)."""
    found = json.loads((FIGURES / 'sensitivity_rank.json').read_text())['rows']
    cells = [(row['predictor'], f'{row["rank_correlation"]:.2f}', f'{row["p"]:.2f}') for row in found]
    return markdown(('predictor', 'rank correlation with the drop', 'p'), cells)


def oscillation(path: Path = FIGURES / 'oscillation.json') -> str:
    """Weights that jump between two codes, by method: the means of the seeds (benchmarks/oscillation.py)."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in json.loads(path.read_text())['rows']:
        key = (row['model'], row['bits'], row['method'], 'yes' if row['freezing'] else '')
        groups.setdefault(key, []).append(row)
    rows = [
        (
            *key,
            _mean([row['top1'] for row in each], 2),
            _mean([100 * max(row['curve']) for row in each], 1),
            _mean([100 * row['curve'][-1] for row in each], 1),
            _mean([100 * row['frozen'] for row in each], 1) if key[-1] else '',
        )
        for key, each in groups.items()
    ]
    names = ('model', 'bits', 'method', 'freezing', 'top-1 in %', 'oscillating, most, in %', 'at the end, in %')
    columns = (*names, 'frozen in %')
    shown = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    return markdown([columns[n] for n in shown], [[row[n] for n in shown] for row in rows])


def _mean(values: list[float], digits: int) -> str:
    spread = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


TABLES: dict[str, Callable[[], str]] = {
    **{
        f'train_step{name}': partial(train_step, f'train_step{name}')
        for name in ('', '_bf16', '_1_thread', '_avx2', '_compiled')
    },
    'inference': partial(inference, 'inference', 2),
    'inference_1_thread': partial(inference_ratios, 'inference_1_thread'),
    'inference_full_size': partial(inference, 'inference_full_size', 1),
    'inference_avx2': partial(inference_ratios, 'inference_avx2'),
    'kill': partial(campaign, 'kill', 'what'),
    'doors': partial(campaign, 'doors', 'option or config key'),
    'fuzz': partial(campaign, 'fuzz', 'input'),
    'memory': partial(campaign, 'memory', 'what'),
    **{
        f.__name__: f
        for f in (
            cifar10_search,
            flips,
            hooks,
            scaling,
            synchronization,
            quantized_loss,
            fusions,
            sensitivity_rank,
            oscillation,
        )
    },
}
