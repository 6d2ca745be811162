#!/usr/bin/env python
"""What the hooks of a quantized training cost each step: their milliseconds, and their share of the step.

Trains each config through its Runner, with every hook that it has, and times each hook's before_train_iter and
after_train_iter, mmengine's own among them. Medians, so what happens every few hundred steps only (pictures, lines of
the log) is left out; so are the first steps and the last one. Weights are random where the config's checkpoint is
absent. Prints a table and writes a JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich import box
from rich.console import Console
from rich.table import Table
from shared import write_figure

from gdrq_mm.core.errors import check_least
from gdrq_mm.openmmlab.cli import check_writable, main, read_config
from gdrq_mm.openmmlab.runner import QuantRunner

CONFIGS = [
    'configs/cls/resnet18_width16_gdrq_w4a4_cifar10.py',
    'configs/det/yolox_nano_gdrq_w4a4_bccd.py',
    'configs/seg/pspnet_r18_gdrq_w4a4_camvid.py',
]
WARM_UP = 10
MOMENTS = ('before_train_iter', 'after_train_iter')


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method; each call adds its time to `seconds`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begin)

    return call


def short(config: str, steps: int, work_dir: str) -> Config:
    """The config with so many steps, without validation, checkpoints and a schedule of the learning rate."""
    cfg = read_config(config)
    if not Path(cfg.get('load_from') or '').exists():
        cfg.load_from = None
    cfg.work_dir = work_dir
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps)
    cfg.param_scheduler = None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1, save_last=False)
    return cfg


def measure(config: str, steps: int) -> dict[str, Any]:
    """Median seconds of a step of the model, and those of each hook."""
    spent: dict[str, list[list[float]]] = defaultdict(list)
    step: list[float] = []
    with tempfile.TemporaryDirectory() as work_dir:
        runner = QuantRunner.from_cfg(short(config, WARM_UP + steps + 1, work_dir))
        for hook in runner.hooks:
            for moment in MOMENTS:
                seconds: list[float] = []
                spent[type(hook).__name__].append(seconds)
                setattr(hook, moment, timed(getattr(hook, moment), seconds))
        runner.model.train_step = timed(runner.model.train_step, step)
        runner.train()

    def median(seconds: list[float]) -> float:
        return statistics.median(seconds[WARM_UP:-1])

    ours = [type(hook).__name__ for hook in runner.hooks if type(hook).__module__.startswith('gdrq_mm')]
    hooks = {name: sum(map(median, moments)) for name, moments in spent.items()}
    return dict(config=config, step_seconds=median(step), hooks=hooks, ours=ours)


def show(rows: list[dict[str, Any]]) -> Table:
    """A row for each config: ours, the three dearest of them, mmengine's."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ('config', 'step, ms', 'our hooks, ms', 'share', 'dearest', "mmengine's, ms"):
        table.add_column(column)
    for row in rows:
        ours = {name: row['hooks'][name] for name in row['ours']}
        dearest = sorted(ours, key=ours.get, reverse=True)[:3]
        table.add_row(
            Path(row['config']).stem,
            f'{1000 * row["step_seconds"]:.1f}',
            f'{1000 * sum(ours.values()):.2f}',
            f'{sum(ours.values()) / row["step_seconds"]:.2%}',
            ', '.join(f'{name} {1000 * ours[name]:.2f}' for name in dearest),
            f'{1000 * (sum(row["hooks"].values()) - sum(ours.values())):.2f}',
        )
    return table


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', default=CONFIGS, help='default: one of each task')
    parser.add_argument('--steps', type=int, default=60, help='timed steps (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='of torch (default: %(default)s)')
    out = Path('docs/figures/hooks.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    args = parser.parse_args()
    check_least(args, steps=2, threads=1)
    check_writable(args.out.parent)
    torch.set_num_threads(args.threads)
    rows = [measure(config, args.steps) for config in args.configs]
    console = Console()
    console.print(show(rows))
    write_figure(args.out, dict(settings=dict(steps=args.steps, threads=args.threads), rows=rows), console)


if __name__ == '__main__':
    main(run)
