#!/usr/bin/env python
"""How much a metric moves when single codes of a trained model's activations change by one.

A runtime rounds a few values at ties otherwise than torch does (docs/deploy.md, "Verification"). Here the model itself
is tested in torch while codes that are drawn at random change by one step, up or down. So what chance alone does to
the metric is known, and a runtime that changes as many codes can be judged. Prints a table and writes a JSON.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from shared import write_figure
from torch import Tensor

from gdrq_mm.core.errors import check_least
from gdrq_mm.core.modules import activation_quantizers, hooked
from gdrq_mm.openmmlab.analysis import metric_of
from gdrq_mm.openmmlab.cli import check_writable, main, read_config
from gdrq_mm.openmmlab.models import bare_model
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.tasks import task_of


class Flips:
    """A forward hook of activation quantizers: changes codes by one step.

    Args:
        rate: share of the codes that change.
        seed: of the draw.
    """

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.generator = rate, torch.Generator().manual_seed(seed)
        self.flipped = self.codes = 0

    def __call__(self, quantizer: Any, args: Any, out: Tensor) -> Tensor:
        drawn = torch.rand(out.shape, generator=self.generator)
        up, down = drawn < self.rate / 2, drawn > 1 - self.rate / 2
        self.flipped += int(up.sum() + down.sum())
        self.codes += out.numel()
        return out + quantizer.step() * (up.to(out.dtype) - down.to(out.dtype))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a quantized config')
    parser.add_argument('checkpoint', help='trained checkpoint')
    rates = [1e-7, 1e-6, 5e-6]
    parser.add_argument('--rates', type=float, nargs='+', default=rates, help=f'shares of the codes (default: {rates})')
    parser.add_argument('--seeds', type=int, default=3, help='draws for each rate (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('docs/figures/flips.json'), help='default: %(default)s')
    args = parser.parse_args()
    check_least(args, seeds=1)
    check_writable(args.out.parent)
    cfg = read_config(args.config)
    cfg.load_from, cfg.work_dir, cfg.log_level = args.checkpoint, 'work_dirs/flips', 'ERROR'
    runner = QuantRunner.from_cfg(cfg)
    values = runner.test()
    key, _, _ = metric_of(values, None, task_of(cfg))
    rows: list[dict[str, Any]] = [dict(rate=0.0, seed=None, flipped=0, metrics=values)]
    for rate in args.rates:
        for seed in range(args.seeds):
            flips = Flips(rate, seed)
            quantizers = activation_quantizers(bare_model(runner.model)).values()
            with hooked(quantizer.register_forward_hook(flips) for quantizer in quantizers):
                values = runner.test()
            rows.append(dict(rate=rate, seed=seed, flipped=flips.flipped, codes=flips.codes, metrics=values))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ('share of codes', 'codes changed', key):
        table.add_column(column)
    for row in rows:
        table.add_row(f'{row["rate"]:g}', f'{row["flipped"]:,}', f'{row["metrics"][key]:.4f}')
    console = Console()
    console.print(table)
    write_figure(args.out, dict(config=args.config, metric=key, rows=rows), console)


if __name__ == '__main__':
    main(run)
