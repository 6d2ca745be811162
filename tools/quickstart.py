#!/usr/bin/env python
"""The main job on the embedded data: train a float model, quantize it with GDRQ W4A4, test both, print one table."""

import argparse
import contextlib
import copy
import time
from pathlib import Path

import cv2
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gdrq_mm.data import digits
from gdrq_mm.openmmlab.amp import use_amp
from gdrq_mm.openmmlab.apis import draw, infer, init_model
from gdrq_mm.openmmlab.cli import check_writable, main, prepare_test, read_config
from gdrq_mm.openmmlab.compat import check_environment
from gdrq_mm.openmmlab.describe import make_record
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.tasks import task_of
from gdrq_mm.report.formats import comparison_table
from gdrq_mm.report.plots import side_by_side
from gdrq_mm.report.record import write_record

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
JOBS = [
    ('classification', 'cls/resnet18_width16_digits.py', 'cls/resnet18_width16_gdrq_w4a4_digits.py', None),
    ('detection', 'det/yolox_nano_digits.py', 'det/yolox_nano_gdrq_w4a4_digits.py', 7),
    ('segmentation', 'seg/pspnet_r18_digits.py', 'seg/pspnet_r18_gdrq_w4a4_digits.py', None),
]
"""Task, float config, quantized config, epochs of the latter where they are fewer than its own, for a short time."""
PICTURES = 4
"""Test pictures whose predictions are drawn."""


class ProgressHook(Hook):
    """Moves a bar of rich by one an iteration."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.title = progress, title

    def before_train(self, runner: Runner) -> None:
        self.bar = self.progress.add_task(self.title, total=runner.max_iters)

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        self.progress.advance(self.bar)


def prepare(config: str, work_dir: Path, epochs: int | None, load_from: str | None) -> Config:
    """A config of the project that works below `work_dir`."""
    cfg = read_config(CONFIGS / config)
    cfg.work_dir, cfg.load_from = str(work_dir / Path(config).stem), load_from
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(work_dir / loader.dataset.data_root)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        if 'ann_file' in evaluator:
            evaluator.ann_file = str(work_dir / evaluator.ann_file)
    if epochs is not None:
        cfg.train_cfg.max_epochs = epochs
        schedules = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
        schedules[-1].update({key: epochs for key in ('T_max', 'end') if key in schedules[-1]})
    if task_of(cfg) != 'det' and torch.cpu.get_capabilities().get('avx512_bf16'):
        use_amp(cfg)  # a third faster where the processor has instructions for it, slower where not
    return cfg


def run(cfg: Config, progress: Progress, title: str) -> tuple[str, dict]:
    """Train and test one config; returns its last checkpoint and its run record."""
    test_cfg = copy.deepcopy(cfg)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # validation on the way would cost time
    runner = QuantRunner.from_cfg(cfg)
    runner.register_hook(ProgressHook(progress, title))
    runner.train()
    checkpoint = (Path(cfg.work_dir) / 'last_checkpoint').read_text().strip()
    prepare_test(test_cfg, checkpoint)
    runner = QuantRunner.from_cfg(test_cfg)
    record = make_record(test_cfg, checkpoint, runner.test(), runner.describe(), runner.training)
    write_record(record, Path(cfg.work_dir) / 'record.json')
    return checkpoint, record


def draw_predictions(runs: list[tuple[Config, str]], out: Path) -> None:
    """Predictions of a float and a quantized model, side by side, for the first test pictures."""
    models = [init_model(cfg, checkpoint) for cfg, checkpoint in runs]
    dataset = DATASETS.build(runs[0][0].test_dataloader.dataset)
    shown = range(0, len(dataset), max(1, len(dataset) // PICTURES))[:PICTURES]
    paths = [dataset.get_data_info(number)['img_path'] for number in shown]
    rows = [[draw(model, path, infer(model, path)) for model in models] for path in paths]
    cv2.imwrite(str(out), side_by_side(rows, ['float', 'GDRQ W4A4'])[..., ::-1])


def quickstart() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/quickstart', help='data, checkpoints, logs and records')
    parser.add_argument('--epochs', type=int, help='train each model this short, to try the command only')
    args = parser.parse_args()
    check_environment()
    work_dir, start, console = Path(args.work_dir), time.time(), Console()
    check_writable(work_dir)
    log = work_dir / 'log.txt'
    console.print(f'Data, checkpoints, run records and {log.name} with the full log: {work_dir}', soft_wrap=True)
    digits.build(work_dir / 'data' / 'digits')
    columns = (TextColumn('{task.description:<26}'), BarColumn(20), TextColumn('{task.completed}/{task.total}'))
    times = (TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    records, pictures = [], []
    with (
        Progress(*columns, *times, console=console, redirect_stdout=False, redirect_stderr=False) as progress,
        open(log, 'w') as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        for task, float_config, quantized_config, epochs in JOBS:
            before = prepare(float_config, work_dir, args.epochs, None)
            checkpoint, record = run(copy.deepcopy(before), progress, f'{task}, float')
            after = prepare(quantized_config, work_dir, args.epochs or epochs, checkpoint)
            quantized, quantized_record = run(copy.deepcopy(after), progress, f'{task}, GDRQ')
            records += [record, quantized_record]
            pictures.append(work_dir / f'{task}.png')
            draw_predictions([(before, checkpoint), (after, quantized)], pictures[-1])
    console.print(comparison_table(records, narrow=True))
    console.print(f'Predictions of both, side by side: {", ".join(map(str, pictures))}', soft_wrap=True)
    console.print(f'{time.time() - start:.0f} s')


if __name__ == '__main__':
    main(quickstart)
