"""The main job on the embedded data: train a float model, quantize it with GDRQ W4A4, test both, print one table."""

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TextIO

import cv2
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import CONFIGS
from ..core.compat import has_bfloat16
from ..core.errors import UserError
from ..core.files import check_writable
from ..data import digits
from ..openmmlab.amp import use_amp
from ..openmmlab.apis import draw, infer, init_model
from ..openmmlab.cli import TOOLS, prepare_test, read_config
from ..openmmlab.compat import check_environment
from ..openmmlab.describe import make_record
from ..openmmlab.runner import QuantRunner
from ..openmmlab.tasks import task_of
from ..report.formats import comparison_table
from ..report.plots import side_by_side
from ..report.record import read_record, write_record

JOBS = {
    'classification': ('cls/resnet18_width16_digits.py', 'cls/resnet18_width16_gdrq_w4a4_digits.py', None),
    'detection': ('det/yolox_nano_digits.py', 'det/yolox_nano_gdrq_w4a4_digits.py', 7),
    'segmentation': ('seg/pspnet_r18_digits.py', 'seg/pspnet_r18_gdrq_w4a4_digits.py', None),
}
"""Task: float config, quantized config, epochs of the latter where they are fewer than its own, for a short time."""
LONGEST_FIRST = ('detection', 'segmentation', 'classification')
PICTURES = 4
"""Test pictures whose predictions are drawn."""


class TellHook(Hook):
    """Writes a line for each iteration: how far a training is, for the process that shows it."""

    def __init__(self, out: TextIO, title: str) -> None:
        self.out, self.title = out, title

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        print(self.title, runner.iter + 1, runner.max_iters, sep='\t', file=self.out, flush=True)


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
    if task_of(cfg) != 'det' and has_bfloat16():
        use_amp(cfg)  # a third faster where the processor has instructions for it, slower where not
    return cfg


def run(cfg: Config, hook: Hook) -> str:
    """Train and test one config and write its run record; returns its last checkpoint."""
    test_cfg = copy.deepcopy(cfg)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # validation on the way would cost time
    runner = QuantRunner.from_cfg(cfg)
    runner.register_hook(hook)
    runner.train()
    checkpoint = (Path(cfg.work_dir) / 'last_checkpoint').read_text().strip()
    prepare_test(test_cfg, checkpoint)
    runner = QuantRunner.from_cfg(test_cfg)
    record = make_record(test_cfg, checkpoint, runner.test(), runner.describe(), runner.training)
    write_record(record, Path(cfg.work_dir) / 'record.json')
    return checkpoint


def draw_predictions(runs: list[tuple[Config, str]], out: Path) -> None:
    """Predictions of a float and a quantized model, side by side, for the first test pictures."""
    models = [init_model(cfg, checkpoint) for cfg, checkpoint in runs]
    dataset = DATASETS.build(runs[0][0].test_dataloader.dataset)
    shown = range(0, len(dataset), max(1, len(dataset) // PICTURES))[:PICTURES]
    paths = [dataset.get_data_info(number)['img_path'] for number in shown]
    rows = [[draw(model, path, infer(model, path)) for model in models] for path in paths]
    cv2.imwrite(str(out), side_by_side(rows, ['float', 'GDRQ W4A4'])[..., ::-1])


def work(task: str, work_dir: Path, epochs: int | None) -> None:
    """Both trainings of a task and their picture; the output goes to TASK.txt, how far it is to stdout."""
    float_config, quantized_config, fewer = JOBS[task]
    out = sys.stdout
    with open(work_dir / f'{task}.txt', 'w') as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        before = prepare(float_config, work_dir, epochs, None)
        checkpoint = run(copy.deepcopy(before), TellHook(out, f'{task}, float'))
        after = prepare(quantized_config, work_dir, epochs or fewer, checkpoint)
        quantized = run(copy.deepcopy(after), TellHook(out, f'{task}, GDRQ'))
        draw_predictions([(before, checkpoint), (after, quantized)], work_dir / f'{task}.png')


def follow(process: subprocess.Popen[str], progress: Progress) -> int:
    """Move the bars of a process that works on a task until it ends; returns its exit code."""
    bars = {}
    assert process.stdout is not None
    for line in process.stdout:
        title, done, total = line.rstrip('\n').split('\t')
        if title not in bars:
            bars[title] = progress.add_task(title, total=int(total))
        progress.update(bars[title], completed=int(done))
    return process.wait()


def train_all(arguments: list[str], progress: Progress) -> None:
    """Work on the tasks at once, a process each, as many as there are cores."""
    cores = len(os.sched_getaffinity(0))
    workers = min(cores, len(JOBS))
    environment = {'OMP_NUM_THREADS': str(cores // workers), **os.environ}
    processes: list[subprocess.Popen[str]] = []

    def train(task: str) -> None:
        command = [sys.executable, str(TOOLS / 'quickstart.py'), *arguments, '--only', task]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        code = follow(processes[-1], progress)
        if code:
            raise UserError(f'{task} ended with exit code {code}; its log is {task}.txt')

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(train, task) for task in LONGEST_FIRST]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/quickstart', help='data, checkpoints, logs and records')
    parser.add_argument('--epochs', type=int, help='train each model this short, to try the command only')
    parser.add_argument('--only', choices=list(JOBS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    work_dir, start, console = Path(args.work_dir), time.time(), Console(markup=False)
    if args.only:
        return work(args.only, work_dir, args.epochs)
    check_environment()
    check_writable(work_dir)
    logs = ', '.join(f'{task}.txt' for task in JOBS)
    console.print(f'Data, checkpoints, run records and full logs ({logs}): {work_dir}', soft_wrap=True)
    digits.build(work_dir / 'data' / 'digits')
    columns = (TextColumn('{task.description:<26}'), BarColumn(20), TextColumn('{task.completed}/{task.total}'))
    times = (TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    arguments = ['--work-dir', args.work_dir, *(['--epochs', str(args.epochs)] if args.epochs is not None else [])]
    with Progress(*columns, *times, console=console) as progress:
        train_all(arguments, progress)
    configs = [Path(config).stem for *pair, _ in JOBS.values() for config in pair]
    records = [read_record(work_dir / config / 'record.json') for config in configs]
    console.print(comparison_table(records, narrow=True))
    pictures = [str(work_dir / f'{task}.png') for task in JOBS]
    console.print(f'Predictions of both, side by side: {", ".join(pictures)}', soft_wrap=True)
    console.print(f'{time.time() - start:.0f} s')
