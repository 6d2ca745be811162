#!/usr/bin/env python
"""Write the tables of README.md and docs/figures.md anew from the committed records and figures.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written; a table that differs
from what the files give is an error.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import write_whole
from gdrq_mm.openmmlab.cli import main
from gdrq_mm.report.compare import comparison_markdown, main_metric, markdown
from gdrq_mm.report.record import read_record

ROOT = Path(__file__).resolve().parent.parent
FIGURES, RECORDS = ROOT / 'docs/figures', ROOT / 'docs/records'
PAGES = (ROOT / 'README.md', ROOT / 'docs/figures.md')


def comparison(data: str) -> str:
    """Float and quantized records of a data set."""
    return comparison_markdown([read_record(path) for path in sorted(RECORDS.glob(f'*_{data}.json'))])


GRID = {
    'grid_cifar10': r'cifar10-(float|(?!ptq)\w+-w[42]a4-seed\d)',
    'grid_low_bits': r'cifar10-(float|(?!ptq)\w+-w(3a3|2a2)-seed0)',
    'grid_digits': r'digits_\w+-(?!gdrq-undeployable).*',
    'grid_ptq': r'cifar10-(float|ptq-w\d+a\d+-seed0)',
    'grid_ablation': r'cifar10-(float|gdrq(-(?!lsq|groups16_|\w*full_range)\w+)?-w2a4-seed0)',
    'grid_w2a4': r'cifar10-(float|(gdrq(-(lsq|straight|groups16_|\w*full_range)\w+)?|lsq_plus)-w2a4-seed\d)',
    'grid_trials': r'cifar10-(float|(?!ptq|gdrq-undeployable)\w+(-\w+)?-w4a4-seed0)',
    'grid_deployable': r'(cifar10|digits_det|digits_seg)-(float|gdrq-(undeployable-)?w4a4-seed0)',
}
"""Tables of benchmarks/grid.py, and the names of the cells that stand in them."""


def grid(cells: str) -> str:
    """Records of the grid whose name fits."""
    records = sorted((RECORDS / 'grid').glob('*.json'))
    return comparison_markdown([read_record(path) for path in records if re.fullmatch(cells, path.stem)])


def camvid_gpu() -> str:
    """CamVid with two other seeds, and with float additions, trained on a GPU."""
    return comparison_markdown([read_record(path) for path in sorted((RECORDS / 'gpu').glob('*.json'))])


def per_level() -> str:
    """The detector's RPN with one threshold for all pyramid levels and with one for each."""
    names = {
        'float': 'faster_rcnn_r18_bccd',
        'one for all levels': 'faster_rcnn_r18_gdrq_w4a4_bccd',
        'one a level': 'faster_rcnn_r18_gdrq_w4a4_per_level',
    }
    found = {title: main_metric(read_record(RECORDS / f'{name}.json'))[1] for title, name in names.items()}
    return markdown(('thresholds', 'box AP'), [(title, f'{value:.2f}') for title, value in found.items()])


def cifar10_search() -> str:
    """The search for the default k."""
    rows = json.loads((FIGURES / 'cifar10_search.json').read_text())
    return markdown(
        ('bits', 'setting', 'top-1 in %'),
        [(r['bits'].upper(), r['setting'], 'failed' if r['top1'] is None else f'{r["top1"]:.2f}') for r in rows],
    )


def train_step() -> str:
    """Time and memory of a training step over float."""
    found = json.loads((FIGURES / 'train_step.json').read_text())
    rows = [
        (
            r['memory_format'],
            r['contestant'],
            f'{1000 * r["median_seconds"]:.0f}',
            f'{r["ratio"]:.3f}',
            f'{r["memory_ratio"]:.2f}',
        )
        for r in found['rows']
    ]
    return markdown(('memory format', 'contestant', 'step in ms', 'over float', 'peak memory over float'), rows)


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


def inference() -> str:
    """Speed, size and memory of exported models: batch 1, 2 threads."""
    rows = [
        (
            r['model'],
            r['runtime'],
            r['bits'],
            f'{1000 * r["seconds"]:.1f}',
            f'{r["faster"]:.2f}',
            f'{r["bytes"] / 1e6:.1f}' if r['bytes'] else '',
            f'{r["smaller"]:.1f}' if r['smaller'] else '',
            f'{r["peak_bytes"] / 1e6:.0f}' if r['peak_bytes'] else '',
            '{} of {}'.format(*r['kernels']) if r['kernels'] and r['runtime'] == 'onnxruntime' else '',
        )
        for r in json.loads((FIGURES / 'inference.json').read_text())['rows']
        if (r['batch'], r['threads']) == (1, 2)
    ]
    columns = ('model', 'runtime', 'bits', 'ms', 'times faster', 'MB', 'times smaller', 'peak MB', 'integer layers')
    return markdown(columns, rows)


def inference_ratios() -> str:
    """How many times faster than float in the same runtime, for every batch and number of threads."""
    rows = [
        r
        for r in json.loads((FIGURES / 'inference.json').read_text())['rows']
        if r['runtime'] != 'torch' and r['bits'] != 'float'
    ]
    settings = sorted({(r['batch'], r['threads']) for r in rows})
    found = {(r['model'], r['runtime'], r['bits'], r['batch'], r['threads']): r['faster'] for r in rows}
    keys = dict.fromkeys((r['model'], r['runtime'], r['bits']) for r in rows)
    columns = ('model', 'runtime', 'bits', *(f'batch {b}, threads {t}' for b, t in settings))
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


def campaigns() -> str:
    """What the campaigns of tests/campaigns/ counted."""
    paths = [FIGURES / f'{name}.json' for name in ('kill', 'fuzz', 'memory')]
    found = {path.stem: json.loads(path.read_text()) for path in paths if path.is_file()}
    rows = [(name, what, f'{count:,}') for name, figure in found.items() for what, count in figure['rows'].items()]
    return markdown(('campaign', 'what', 'number'), rows)


TABLES: dict[str, Callable[[], str]] = {
    **{data: partial(comparison, data) for data in ('cifar10', 'bccd', 'camvid')},
    **{name: partial(grid, cells) for name, cells in GRID.items()},
    **{
        f.__name__: f
        for f in (
            camvid_gpu,
            per_level,
            cifar10_search,
            train_step,
            scaling,
            synchronization,
            inference,
            inference_ratios,
            quantized_loss,
            campaigns,
        )
    },
}


def filled(text: str) -> str:
    """A page with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f'<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->'

    return re.sub(r'<!-- table: (\w+) -->\n.*?<!-- end -->', table, text, flags=re.DOTALL)


def write() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail on a difference')
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        new = filled(text)
        if args.check and new != text:
            raise UserError(f'{page.name} differs from its records; run python benchmarks/tables.py')
        if not args.check:
            write_whole(page, new.encode())


if __name__ == '__main__':
    main(write)
