#!/usr/bin/env python
"""The quantized loss of Laplace, Gaussian and uniform samples, and the k that it asks for.

Repeats the paper's Fig. 5 (arXiv:1908.01477): the threshold T* of least quantized loss QL = |W - Q(W)|_p / |W|_p
(Eq. 3) for three distributions, by bits, with the paper's printed losses beside ours. Then, for the defaults in
core/quantizers/gdrq.py, the k = T / mean|x| of least relative L2 error by range and bits. Prints tables, and writes
quantized_loss.json and quantized_loss.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from gdrq_mm.core import functional as F
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import write_whole
from gdrq_mm.core.quantizers.gdrq import ACTIVATION_K, WEIGHT_K, GDRQActivation
from gdrq_mm.openmmlab.cli import check_writable, main
from gdrq_mm.report.plots import png
from gdrq_mm.report.provenance import git_revision, versions

matplotlib.use('Agg')
import matplotlib.pyplot as plt

BITS = range(2, 9)
PAPER_BITS, PAPER_P = 4, 1
PAPER = {'Laplace': 0.133, 'Gaussian': 0.096, 'uniform': 0.059}
"""The losses printed in the paper's Fig. 5, 4 bits, p = 1; they depend on its sample, whose size is not given."""

NARROW, FULL, CLOSED = 'narrow', 'full', 'closed'
COARSE, FINE = 64, 16
"""Points of the search: COARSE over the whole range, then FINE on either side of the best one (grid: ours)."""

COLORS = {'Laplace': 'tab:blue', 'Gaussian': 'tab:orange', 'uniform': 'tab:green'}
MARKERS = {'Laplace': 'o', 'Gaussian': 's', 'uniform': '^'}


# ---- what is quantized --------------------------------------------------------------------------------------------


def weight_samples(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Name -> (count,) float32 sample: Laplace with b = 1, Gaussian with sigma = 1, uniform on [-1, 1]."""
    sign = torch.rand(count, generator=generator).sub_(0.5).sign_()
    return {
        'Laplace': torch.empty(count).exponential_(generator=generator) * sign,
        'Gaussian': torch.randn(count, generator=generator),
        'uniform': torch.rand(count, generator=generator) * 2 - 1,
    }


def activation_samples(weights: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """(range, name, sample) of the activations, from the samples above; N is the Gaussian, LeakyReLU's slope 0.1."""
    gauss, nn = weights['Gaussian'], torch.nn.functional
    return [
        ('unsigned', 'ReLU(N)', nn.relu(gauss)),
        ('signed', 'N', gauss),
        ('signed', 'Laplace', weights['Laplace']),
        ('signed', 'LeakyReLU(N)', nn.leaky_relu(gauss, 0.1)),
        ('zero_point', 'SiLU(N)', nn.silu(gauss)),
        ('zero_point', 'SiLU(2 N)', nn.silu(2 * gauss)),
        ('zero_point', 'GELU(N)', nn.gelu(gauss)),
        ('zero_point', 'GELU(2 N)', nn.gelu(2 * gauss)),
    ]


def code_set(kind: str, bits: int) -> tuple[int, int]:
    """Smallest and largest code.

    'narrow', our default, is -7..7 at 4 bits, and 'full' -8..7. 'closed', -8..8, is what rounding after clipping to
    [-T, T] with d = T / 2^(n-1) gives. It needs a code more than n bits have.
    """
    if kind == CLOSED:
        return -(2 ** (bits - 1)), 2 ** (bits - 1)
    return F.code_range(bits, signed=True, narrow_range=kind == NARROW)


# ---- search ---------------------------------------------------------------------------------------------------------


def minimum(loss: Callable[[float], float], top: float) -> tuple[float, float]:
    """The argument in (0, top] of least loss, and that loss; exact to top / (COARSE * FINE)."""
    coarse = [top * i / COARSE for i in range(1, COARSE + 1)]
    best = min((loss(t), t) for t in coarse)
    step = top / COARSE / FINE
    fine = [best[1] + step * i for i in range(-FINE + 1, FINE) if i != 0]
    least, at = min([best, *((loss(t), t) for t in fine)])
    return at, least


def loss_at(x: Tensor, threshold: float, lo: int, hi: int, p: int) -> float:
    """Quantized loss of x for a threshold."""
    step = F.step_size(torch.tensor(threshold), lo, hi)
    return float(F.quantized_loss(x, F.fake_quantize(x, step, lo, hi), p=p))


def weight_row(name: str, x: Tensor, kind: str, bits: int, p: int) -> dict[str, Any]:
    """T* of a sample and its loss."""
    lo, hi = code_set(kind, bits)
    top = float(x.abs().max())
    threshold, loss = minimum(lambda t: loss_at(x, t, lo, hi, p), top)
    return dict(
        distribution=name,
        codes=kind,
        lo=lo,
        hi=hi,
        bits=bits,
        p=p,
        loss=loss,
        threshold=threshold,
        threshold_over_max=threshold / top,
        threshold_over_sigma=threshold / float(x.std()),
        k=threshold / float(x.abs().mean()),
    )


def activation_row(kind: str, name: str, x: Tensor, bits: int) -> dict[str, Any]:
    """The k of least relative L2 error of an activation, and the error with the default k.

    The project's own quantizer is used, so that the zero point follows from T by its rule (zero_point_of).
    """
    watcher = GDRQActivation(bits)
    watcher.observe(x)
    observed = watcher.observed()

    def error(k: float) -> float:
        quantizer = GDRQActivation(bits, kind, k=k)
        quantizer.start(observed)
        return float(F.quantized_loss(x, quantizer.quantize(x, quantizer.step()), p=2))

    k, least = minimum(error, float(x.abs().max() / x[x != 0].abs().mean()))
    default = ACTIVATION_K[kind][bits]
    return dict(
        range=kind,
        decided=F.decide_range(float(x.min()), float(x.max()), float(x[x != 0].abs().mean())),
        distribution=name,
        bits=bits,
        k=k,
        error=least,
        default_k=default,
        error_of_default=error(default),
    )


def orders(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether the paper's three orders hold for the three distributions of one setting."""
    by_name = {row['distribution']: row for row in rows}
    laplace, gauss, uniform = (by_name[name] for name in PAPER)

    def falls(key: str) -> bool:
        return laplace[key] > gauss[key] > uniform[key]

    def rises(key: str) -> bool:
        return laplace[key] < gauss[key] < uniform[key]

    return dict(
        loss=falls('loss'),
        threshold_over_max=rises('threshold_over_max'),
        threshold_over_sigma=falls('threshold_over_sigma'),
    )


def by_setting(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int, int], list[dict[str, Any]]]]:
    """Rows of the same codes, bits and p together."""

    def setting(row: dict[str, Any]) -> tuple[str, int, int]:
        return row['codes'], row['bits'], row['p']

    for key, group in itertools.groupby(sorted(rows, key=setting), setting):
        yield key, list(group)


# ---- what is shown ------------------------------------------------------------------------------------------------


def paper_table(rows: list[dict[str, Any]]) -> Table:
    """Ours next to the paper's, at its bits and p."""
    title = f'Quantized loss QL at the best threshold T* = k mean|W|, {PAPER_BITS} bits, p = {PAPER_P}'
    table = _table(title, ['codes', 'distribution'], ['ours', 'paper', 'T*/max|W|', 'T*/sigma', 'k'])
    for kind in (NARROW, FULL, CLOSED):
        for row in rows:
            if (row['codes'], row['bits'], row['p']) == (kind, PAPER_BITS, PAPER_P):
                codes = f'{row["lo"]}..{row["hi"]} {kind}' if row['distribution'] == 'Laplace' else ''
                printed = f'{PAPER[row["distribution"]]:.3f}'
                table.add_row(codes, row['distribution'], f'{row["loss"]:.4f}', printed, *_thresholds(row))
        table.add_section()
    return table


def bits_table(rows: list[dict[str, Any]]) -> Table:
    """All bits, p = 1 and p = 2 side by side, with our default codes."""
    title = 'The same by bits, narrow codes: p = 1 on the left, p = 2 on the right'
    table = _table(title, ['bits', 'W'], ['QL', 'T/max', 'T/sigma', 'k'] * 2)
    found = {(r['bits'], r['distribution'], r['p']): r for r in rows if r['codes'] == NARROW}
    for bits in BITS:
        for name in PAPER:
            one, two = found[bits, name, 1], found[bits, name, 2]
            cells = [f'{one["loss"]:.4f}', *_thresholds(one), f'{two["loss"]:.4f}', *_thresholds(two)]
            table.add_row(str(bits) if name == 'Laplace' else '', name, *cells)
        table.add_section()
    return table


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(
        title=title,
        title_justify='left',
        title_style='bold',
        caption_justify='left',
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify='right', no_wrap=True)
    return table


def _thresholds(row: dict[str, Any]) -> list[str]:
    return [f'{row["threshold_over_max"]:.3f}', f'{row["threshold_over_sigma"]:.2f}', f'{row["k"]:.2f}']


def nearest_line(rows: list[dict[str, Any]]) -> str:
    """Which codes come nearest to the paper's three losses."""
    differences = {
        f'{group[0]["lo"]}..{group[0]["hi"]}': max(abs(r['loss'] - PAPER[r['distribution']]) for r in group)
        for (_, bits, p), group in by_setting(rows)
        if (bits, p) == (PAPER_BITS, PAPER_P)
    }
    texts = [f'{codes} {difference:.4f}' for codes, difference in sorted(differences.items(), key=lambda i: i[1])]
    return (
        f"Largest difference to the paper's losses, by codes: {', '.join(texts)}. Theirs depend on their sample. "
        'On a uniform distribution m evenly spaced levels cannot reach less than 1/m at p = 1: '
        + ', '.join(f'{1 / m:.4f} for {m}' for m in (15, 16, 17))
        + '.'
    )


def order_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each of the paper's orders: reproduced at its bits and p, and in how many of the other settings."""
    found = {key: orders(group) for key, group in by_setting(rows)}
    texts = dict(
        loss='QL: Laplace > Gaussian > uniform',
        threshold_over_max='T*/max|W|: Laplace < Gaussian < uniform',
        threshold_over_sigma='T*/sigma: Laplace > Gaussian > uniform',
    )
    lines = []
    for key, text in texts.items():
        holds = all(found[kind, PAPER_BITS, PAPER_P][key] for kind in (NARROW, FULL, CLOSED))
        fails = [f'{kind} {bits} bits p={p}' for (kind, bits, p), order in found.items() if not order[key]]
        state = 'reproduced' if holds else 'NOT reproduced'
        others = f'not in: {", ".join(fails)}' if fails else f'in all {len(found)} settings'
        lines.append(f'{text}: {state} at {PAPER_BITS} bits, p = {PAPER_P}, with any of the codes; {others}')
    return lines


def k_tables(weights: list[dict[str, Any]], activations: list[dict[str, Any]]) -> list[Table]:
    """The best k by range and bits beside the defaults, and what the defaults cost."""
    bits_columns = [str(bits) for bits in BITS]
    names = ['range', 'distribution']
    best = _table('k of least relative L2 error by bits, beside the default k', names, bits_columns)
    cost = _table(
        'Relative L2 error with the best k, and how much larger it is with the default k', names, bits_columns
    )
    best.caption = 'A zero point is an integer that depends on T: its best k grows by jumps.'
    for kind, rows in itertools.groupby(activations + weights, lambda row: row['range']):
        group = list(rows)
        for name, same in itertools.groupby(group, lambda row: row['distribution']):
            cells = list(same)
            best.add_row(kind, name, *(f'{row["k"]:.2f}' for row in cells))
            cost.add_row(kind, name, *(f'{row["error"]:.3f}' for row in cells))
            cost.add_row('', '', *(f'x{row["error_of_default"] / row["error"]:.2f}' for row in cells), style='dim')
        defaults = WEIGHT_K if kind == 'weight' else ACTIVATION_K[kind]
        best.add_row(kind, 'default', *(f'{defaults[bits]:g}' for bits in BITS), style='bold')
        best.add_section()
        cost.add_section()
    return [best, cost]


def figure(samples: dict[str, Tensor], rows: list[dict[str, Any]]) -> bytes:
    """The picture as PNG: loss against T at the paper's bits and p, and loss at T* against bits."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout='constrained')
    lo, hi = code_set(NARROW, PAPER_BITS)
    grid = [i / 100 for i in range(2, 101)]
    for name, x in samples.items():
        top = float(x.abs().max())
        curve = [loss_at(x, t * top, lo, hi, PAPER_P) for t in grid]
        left.plot(grid, curve, color=COLORS[name])
        row = next(
            r for r in rows if (r['distribution'], r['codes'], r['bits'], r['p']) == (name, NARROW, PAPER_BITS, PAPER_P)
        )
        label = f'{name}: {row["loss"]:.3f} at {row["threshold_over_max"]:.2f} (paper {PAPER[name]:.3f})'
        at = (row['threshold_over_max'], row['loss'])
        left.plot(*at, MARKERS[name], color=COLORS[name], markersize=8, markeredgecolor='black', label=label)
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel='T / max|W|', ylabel='quantized loss, p = 1')
    left.set_title(f'Loss against threshold, {PAPER_BITS} bits, codes {lo}..{hi}')
    left.legend(title='least loss', loc='upper right', framealpha=1)
    for name in samples:
        for p, line in ((1, '-'), (2, '--')):
            losses = [r['loss'] for r in rows if (r['distribution'], r['codes'], r['p']) == (name, NARROW, p)]
            style = dict(color=COLORS[name], marker=MARKERS[name], markersize=5)
            right.plot(BITS, losses, line, label=f'{name}, p = {p}', **style)
    right.set(xlabel='bits', ylabel='quantized loss at T*', yscale='log', xticks=list(BITS))
    right.set_title('Loss at the best threshold, codes symmetric about 0')
    right.legend(framealpha=1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    plt.close(fig)
    return png(fig, dpi=150)


# ---- the command --------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, default=1_000_000, help='values per distribution (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the samples (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('docs/figures'), help='output folder (default: %(default)s)')
    args = parser.parse_args()
    if args.samples < 100:
        raise UserError(f'--samples {args.samples} is too few for a distribution; at least 100')
    return args


def run() -> None:
    args = parse_args()
    check_writable(args.out)
    console = Console()
    samples = weight_samples(args.samples, torch.Generator().manual_seed(args.seed))
    activations = activation_samples(samples)
    settings = [(NARROW, bits) for bits in BITS] + [(FULL, PAPER_BITS), (CLOSED, PAPER_BITS)]
    weight_jobs = [(name, x, *s, p) for s in settings for p in (1, 2) for name, x in samples.items()]
    activation_jobs = [(*a, bits) for a in activations for bits in BITS]
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        weight_rows = [weight_row(*job) for job in progress.track(weight_jobs, description='thresholds of weights')]
        activation_rows = [activation_row(*job) for job in progress.track(activation_jobs, description='k by range')]
    picture = figure(samples, weight_rows)

    k_rows = [
        dict(
            range='weight',
            distribution=row['distribution'],
            bits=row['bits'],
            k=row['k'],
            error=row['loss'],
            default_k=WEIGHT_K[row['bits']],
            error_of_default=loss_at(x, WEIGHT_K[row['bits']] * float(x.abs().mean()), row['lo'], row['hi'], 2),
        )
        for name, x in samples.items()
        for row in weight_rows
        if (row['distribution'], row['codes'], row['p']) == (name, NARROW, 2) and name != 'uniform'
    ]
    console.print(f'{args.samples:,} values per distribution, seed {args.seed}')
    console.print(paper_table(weight_rows))
    console.print(nearest_line(weight_rows), highlight=False)
    console.print()
    console.print(bits_table(weight_rows))
    for line in order_lines(weight_rows):
        console.print(line, highlight=False)
    console.print()
    for table in k_tables(k_rows, activation_rows):
        console.print(table)
    strange = {(r['distribution'], r['decided'], r['range']) for r in activation_rows if r['decided'] != r['range']}
    for name, decided, shown in sorted(strange):
        console.print(f"range='auto' would take {decided} for {name} of this sample, not {shown}")

    found = dict(
        samples=args.samples,
        seed=args.seed,
        paper=dict(bits=PAPER_BITS, p=PAPER_P, loss=PAPER),
        weights=weight_rows,
        orders=[dict(codes=c, bits=b, p=p, **orders(g)) for (c, b, p), g in by_setting(weight_rows)],
        k=activation_rows + k_rows,
        versions=versions(),
        git=git_revision(),
    )
    write_whole(args.out / 'quantized_loss.json', (json.dumps(found, indent=1) + '\n').encode())
    write_whole(args.out / 'quantized_loss.png', picture)
    console.print(f'wrote quantized_loss.json and quantized_loss.png to {args.out}')


if __name__ == '__main__':
    main(run)
