"""The analysis: runs of the test loop with everything, with nothing and with one unit of the model quantized."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..core.errors import UserError
from ..core.modules import hooked, only, quant_layers
from ..core.quantizers import Quantizer, Stage
from ..report.analysis import Analysis, Metric, Row, Weights, worst_first
from ..report.damage import Damage, Meter, measure, quantized_weight, watch
from ..report.record import MAIN_METRICS, OTHER_METRICS
from ..report.units import Unit, choose, units_of
from .checkpoints import read_checkpoint
from .cli import prepare_test
from .data_only import data_only
from .models import bare_model
from .runner import QuantRunner
from .seeding import kept_random_state, seed_all
from .tasks import task_of
from .weights import is_quantized

SAMPLES = 1 << 16
"""How many values of an input are kept for the distance to uniform, over all batches (ours)."""
ADAPTED = (
    '{} is {:.2f} with everything float and {:.2f} quantized: training has adapted these weights to their quantizers, '
    'and the float model is no reference for them; use --reference quantized'
)


def prepare(cfg: Config, checkpoint: str, unsafe: bool = False) -> bool:
    """Remove from a config what the analysis of `checkpoint` does not need.

    Returns:
        Whether the checkpoint is a float one, for which :func:`load` must find thresholds.

    Raises:
        UserError: the config quantizes nothing, or the checkpoint cannot be read.
    """
    if 'quantization' not in cfg:
        raise UserError('the config has no quantization: there is nothing to analyze')
    if not cfg.get('test_dataloader'):
        raise UserError('the config has no test_dataloader: there is nothing to run it on')
    is_float = not is_quantized(read_checkpoint(checkpoint, unsafe))
    if is_float:
        cfg.load_from, cfg.resume = checkpoint, False
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    else:
        prepare_test(cfg, checkpoint)
    cfg.log_level = 'WARNING'  # else each run logs all its metrics
    return is_float


def load(runner: Runner, calibrate: bool) -> None:
    """Load the checkpoint; with `calibrate` find thresholds on training batches, as `gdrq calibrate` does.

    The runner loses its hooks, which write logs and pictures. EMA does not need its hook here: the checkpoint holds the
    averaged weights.
    """
    if not isinstance(runner, QuantRunner):
        raise UserError(f'runner_type={runner.cfg.runner_type!r} does not quantize')
    if calibrate:
        runner.load_calibrated()
    else:
        runner._hooks = []
        runner.load_or_resume()


def take_samples(loop: Any, count: int) -> None:
    """Let a test loop use `count` evenly spaced pictures: the first ones are often all of one class."""
    loader = loop.dataloader
    data, total = loader.dataset, len(loader.dataset)
    count = min(count, total)
    chosen = [i * total // count for i in range(count)]
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    workers = dict(num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn)
    loop.dataloader = DataLoader(Subset(data, chosen), batch_size, collate_fn=loader.collate_fn, **workers)
    for metric in loop.evaluator.metrics:
        if hasattr(metric, 'img_ids'):  # CocoMetric counts a picture that is left out as one without detections
            metric.img_ids = [data.get_data_info(i)['img_id'] for i in chosen]


class _Tick(Hook):
    """Calls a function after each test batch."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.tick()


@contextmanager
def progress_of(runner: Runner, runs: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar for `runs` runs of the test loop; yields a function that announces the next one."""
    columns = (
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn('left:'),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    number = TextColumn('{task.fields[run]}/{task.fields[runs]} {task.description}')
    with Progress(*columns, number, console=Console(stderr=True), disable=not show, transient=True) as progress:
        task = progress.add_task('', total=runs * len(runner.test_loop.dataloader), run=0, runs=runs)
        runner._hooks = [_Tick(lambda: progress.advance(task))]

        def start(description: str) -> None:
            progress.update(task, description=description, run=progress.tasks[0].fields['run'] + 1)

        try:
            yield start
        finally:
            runner._hooks = []


def evaluate(runner: Runner) -> dict[str, Any]:
    """All metrics of a run of the test loop. Each draws the same random numbers; pycocotools's prints are muted."""
    with kept_random_state(), redirect_stdout(io.StringIO()):
        seed_all(int(runner.seed or 0))
        return runner.test_loop.run()


def analyze(
    runner: Runner,
    patterns: Sequence[str] = (),
    samples: int | None = None,
    metric: str | None = None,
    reference: str | None = 'float',
    show_progress: bool = True,
) -> Analysis:
    """Analyze the model of a runner that :func:`load` prepared, on its test data.

    Args:
        patterns: fnmatch patterns of the layers to analyze; all layers if there are none.
        samples: how many test pictures to use, evenly spaced; None: all.
        metric: key of the metric; None: the main one of the task.
        reference: see Metric; takes a run over the pictures for each unit. None: one run in all, and no costs.

    Raises:
        UserError: there is nothing to analyze, or a pattern or the metric does not exist.
    """
    with data_only(bool(runner.cfg.get('unsafe_load'))):
        return _analyze(runner, patterns, samples, metric, reference, show_progress)


def _analyze(
    runner: Runner,
    patterns: Sequence[str],
    samples: int | None,
    metric: str | None,
    reference: str | None,
    show_progress: bool,
) -> Analysis:
    model, task = bare_model(runner.model), task_of(runner.cfg)
    units = choose(units_of(model, runner.report.plan), patterns)
    available = len(runner.test_loop.dataloader.dataset)
    if samples is not None:
        take_samples(runner.test_loop, samples)
    pictures = len(runner.test_loop.dataloader.dataset)
    with progress_of(runner, len(units) + 2 if reference else 1, show_progress) as start:
        start('everything quantized')
        rows, values = _measure(runner, units)
        if reference is None:
            return Analysis(worst_first(rows), None, pictures, available)
        start('everything float')
        with only(model, []):
            floats = evaluate(runner)
        key, title, factor = metric_of(floats, metric, task)  # a quantized detector may detect nothing
        unquantized, quantized = (float(each.get(key, 0.0)) * factor for each in (floats, values))
        counted = key.rpartition('/')[2].startswith('top')
        found = Metric(key, title, factor, reference, unquantized, quantized, counted)
        if reference == 'float' and found.unquantized < found.quantized:
            runner.logger.warning(ADAPTED.format(found.title, found.unquantized, found.quantized))
        every = {m for m in model.modules() if isinstance(m, Quantizer) and m.stage != Stage.FLOAT}
        for number, (unit, row) in enumerate(zip(units, rows)):
            start(unit.name)
            chosen = set(unit.quantizers)
            value = _value_with(chosen if reference == 'float' else every - chosen, runner, key) * factor
            rows[number] = dataclasses.replace(row, metric=value, cost=found.cost(value))
    return Analysis(worst_first(rows), found, pictures, available)


def _value_with(active: Iterable[Quantizer], runner: Runner, key: str) -> float:
    """A metric with only the `active` quantizers; 0 if it is missing, which means that nothing was detected."""
    with only(bare_model(runner.model), active):
        return float(evaluate(runner).get(key, 0.0))


def _measure(runner: Runner, units: Sequence[Unit]) -> tuple[list[Row], dict[str, Any]]:
    """One run with everything quantized: a row for each unit, not yet with its cost, and all metrics."""
    keep = max(1 << 6, SAMPLES // len(runner.test_loop.dataloader))
    meters = [Meter(keep) for _ in units]
    with hooked(watch(quantizer, meter) for unit, meter in zip(units, meters) for quantizer in unit.inputs):
        values = evaluate(runner)
    rows = []
    for unit, meter in zip(units, meters):
        inputs = meter.result(max((q.bits for q in unit.inputs), default=0))
        rows.append(Row(unit.name, unit.kind, unit.readers, _weight_damage(unit), inputs))
    return rows, values


def _weight_damage(unit: Unit) -> Damage | None:
    if unit.layer is None or unit.layer.weight_quant is None:
        return None
    return measure(*quantized_weight(unit.layer), unit.layer.weight_quant.bits)


def metric_of(values: dict[str, Any], key: str | None, task: str) -> tuple[str, str, float]:
    """The metric that tells the cost: `key`, or the first main metric of the task that there is.

    Returns:
        Its key, its title, and what makes it a percentage. Under another prefix it is known too.

    Raises:
        UserError: the evaluator does not compute it.
    """
    wanted = [key] if key is not None else [*MAIN_METRICS[task], *OTHER_METRICS[task]]
    numbers = sorted(name for name, value in values.items() if isinstance(value, (int, float, np.number)))
    ends = {name.rpartition('/')[2]: name for name in reversed(numbers)}
    same_end = (ends[each.rpartition('/')[2]] for each in wanted if key is None and each.rpartition('/')[2] in ends)
    found = next((each for each in wanted if each in numbers), None) or next(same_end, None)
    if found is None:
        raise UserError(f'--metric: the test computes no {" or ".join(wanted)}, but {", ".join(numbers) or "nothing"}')
    known = {**OTHER_METRICS[task], **MAIN_METRICS[task]}
    by_end = {name.rpartition('/')[2]: what for name, what in reversed(known.items())}
    end = found.rpartition('/')[2]
    share = task == 'det' and end.startswith(('bbox_', 'segm_', 'AR', 'AP', 'mAP'))
    return found, *(known.get(found) or by_end.get(end) or (found, 100 if share else 1))


def weights_of(model: nn.Module, rows: Iterable[Row], start: dict[str, Tensor] | None = None) -> list[Weights]:
    """The weights of those rows that have a weight, in the order of the rows.

    Args:
        start: state dict of the checkpoint that training started from.
    """
    layers, found = quant_layers(model), []
    for row in rows:
        if row.weight is not None:
            weight, quantized, low, high = (value.float().cpu() for value in quantized_weight(layers[row.name]))
            ends = torch.cat([low.flatten(), high.flatten()]).unique()
            before = None
            if start is not None:
                before = layers[row.name].stored(start, row.name).float().flatten().numpy()
            now, after = weight.flatten().numpy(), quantized.flatten().numpy()
            found.append(Weights(row.name, now, after, ends.numpy(), before))
    return found
