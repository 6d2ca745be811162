#!/usr/bin/env python
"""Which sensitivity predicts accuracy: rank correlation of what tools/allocate.py expects with the trained models.

Draws bits of 2, 3 and 4 for the weights of each layer at random, as long as the whole has the size of uniform 3 bits
to 5 %; trains each draw by the config (one epoch of CIFAR-10 from the float model), and ranks them by top-1.
Predictors: `--by loss` and `--by metric`, each the sum over the layers, and the size, as what needs no measurement.
What is finished is not run again. Prints a table and writes a JSON.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from shared import write_figure

from gdrq_mm.core.errors import UserError, check_least
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.cli import check_writable, main
from gdrq_mm.openmmlab.weights import state_of
from gdrq_mm.report.metrics import main_metric
from gdrq_mm.report.record import read_record

CONFIG = 'configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py'
CHECKPOINT = 'work_dirs/resnet18_width16_12e_cifar10/epoch_12.pth'
WORK_DIR, RECORDS = Path('work_dirs/sensitivity_rank'), Path('docs/records/sensitivity_rank')
BITS = (2, 3, 4)


def sensitivities(by: str, *options: str) -> dict[str, dict[int, float]]:
    """Layer -> bits -> what tools/allocate.py expects of them."""
    file, out = WORK_DIR / f'{by}.json', WORK_DIR / f'{by}.py'
    out.unlink(missing_ok=True)  # of a run before, whose measurements stand in the file
    bits = map(str, BITS)
    run = [sys.executable, 'tools/allocate.py', CONFIG, CHECKPOINT, '--by', by, '--budget', 'size=0.5', '--bits', *bits]
    subprocess.run([*run, '--sensitivities', file, '--out', out, *options], check=True)
    found = json.loads(file.read_text())['values']
    return {
        name.removesuffix('.weight'): {int(bits): value for bits, value in options.items()}
        for name, options in found.items()
    }


def draw(count: int, layers: dict[str, int]) -> list[dict[str, int]]:
    """Bits by layer, `count` times, each of the size of uniform 3 bits to 5 %.

    Args:
        layers: name -> number of weights.
    """
    generator, uniform, drawn = random.Random(0), 3 * sum(layers.values()), []
    while len(drawn) < count:
        bits = {name: generator.choice(BITS) for name in layers}
        if abs(size_of(bits, layers) / uniform - 1) < 0.05:
            drawn.append(bits)
    return drawn


def size_of(bits: dict[str, int], layers: dict[str, int]) -> int:
    """Bits that the weights take."""
    return sum(bits[name] * count for name, count in layers.items())


def train(draws: list[dict[str, int]]) -> list[float]:
    """Top-1 of each, trained by tools/sweep.py."""
    variants = {
        f'draw{number:02}': {'quantization.overrides': {name: dict(weight=dict(bits=b)) for name, b in bits.items()}}
        for number, bits in enumerate(draws)
    }
    run = dict(name='cifar10', config=CONFIG, methods=['gdrq'], bits=['w4a4'], seeds=[0], amp=True, variants=variants)
    file = WORK_DIR / 'sweep.py'
    file.write_text(f'work_dir = {str(WORK_DIR)!r}\nrecords = {str(RECORDS)!r}\nruns = [{run!r}]\n')
    subprocess.run([sys.executable, 'tools/sweep.py', file], check=True)
    return [main_metric(read_record(RECORDS / f'cifar10-gdrq-{name}-w4a4-seed0.json'))[1] for name in variants]


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--draws', type=int, default=12, help='trained models (default: %(default)s)')
    out = Path('docs/figures/sensitivity_rank.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    args = parser.parse_args()
    check_least(args, draws=3)
    check_writable(args.out.parent)
    if not Path(CHECKPOINT).exists():
        raise UserError(f'{CHECKPOINT} is missing: python tools/train.py {CONFIG.replace("_gdrq_w4a4", "")} --amp')
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    loss, metric = sensitivities('loss'), sensitivities('metric', '--samples', '2000')
    state = state_of(read_checkpoint(CHECKPOINT))
    layers = {name: state[f'{name}.weight'].numel() for name, options in loss.items() if len(options) == len(BITS)}
    draws = draw(args.draws, layers)
    top1 = train(draws)
    predicted: dict[str, list[float]] = {
        '--by loss': [sum(loss[name][b] for name, b in bits.items()) for bits in draws],
        '--by metric': [sum(metric[name][b] for name, b in bits.items()) for bits in draws],
        'size': [-size_of(bits, layers) for bits in draws],
    }
    rows: list[dict[str, Any]] = []
    table = Table(box=box.SIMPLE_HEAD)
    for column in ('predictor', 'rank correlation with the drop', 'p'):
        table.add_column(column)
    for name, values in predicted.items():
        found = spearmanr(values, [-value for value in top1])
        rows.append(dict(predictor=name, rank_correlation=float(found.statistic), p=float(found.pvalue)))
        table.add_row(name, f'{found.statistic:.2f}', f'{found.pvalue:.3f}')
    console = Console()
    console.print(table)
    write_figure(args.out, dict(rows=rows, top1=top1, predicted=predicted, draws=draws), console)


if __name__ == '__main__':
    main(run)
