#!/usr/bin/env python
"""Latency, file size and memory of exported models beside float, in both runtimes.

Contestants: torch float; ONNX Runtime and OpenVINO with the float graph (float32, batch normalization merged) and with
the W8A8, W4A4 and W2A4 ones as tools/export.py writes them (for pictures of any size where the model allows it), W4A4
with other groups and with float additions. A two-stage detector is the sum of its graphs. Weights are random,
calibrated on noise: speed does not depend on them. Every round runs each contestant, once untimed and once timed, in an
order drawn anew; the ratio is that of the medians to float in the same runtime. Peak memory is what loading and one
call of batch 1 add to a fresh process. Prints tables, writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from shared import calibrated, write_figure

from gdrq_mm.core.errors import check_least
from gdrq_mm.deploy.export import properties
from gdrq_mm.deploy.measure import peak_memory, timed_rounds
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.onnx_export import export_onnx
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import example_inputs, export_graphs
from gdrq_mm.openmmlab.cli import check_writable, main, read_config
from gdrq_mm.openmmlab.parts import parts_of
from gdrq_mm.openmmlab.tasks import task_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    'ResNet-18': ('configs/cls/resnet18_gdrq_w4a4.py', (224, 224)),
    'ResNet-50': ('configs/cls/resnet50_gdrq_w4a4.py', (224, 224)),
    'PSPNet R18': ('configs/seg/pspnet_r18_gdrq_w4a4_camvid.py', (180, 240)),
    'YOLOX': ('configs/det/yolox_nano_gdrq_w4a4_bccd.py', (480, 640)),
    'Faster R-CNN R18': ('configs/det/faster_rcnn_r18_gdrq_w4a4_bccd.py', (480, 640)),
}
FULL_SIZE = {
    'YOLOX-s': ('configs/det/yolox_s_gdrq_w4a4.py', (640, 640)),
    'RetinaNet R50': ('configs/det/retinanet_gdrq_w4a4.py', (800, 1333)),
    'Faster R-CNN R50': ('configs/det/faster_rcnn_gdrq_w4a4.py', (800, 1333)),
    'PSPNet R50': ('configs/seg/pspnet_gdrq_w4a4.py', (512, 1024)),
    'DeiT-small': ('configs/cls/deit_small_gdrq_w4a4.py', (224, 224)),
    'Swin-tiny': ('configs/cls/swin_tiny_gdrq_w4a4.py', (224, 224)),
}
MODELS = SMALL | FULL_SIZE
"""Title -> config, and size of a picture."""
OPTIONS = {'PSPNet R50': {'test_dataloader.dataset.pipeline.1.scale': (1024, 512)}}
"""Title -> settings: Cityscapes has pictures of 1024 x 2048 pixels, training crops 512 x 1024."""
SETTINGS: dict[str, dict[str, Any]] = {
    'W8A8': {'weight.bits': 8, 'activation.bits': 8},
    'W4A4': {'weight.bits': 4, 'activation.bits': 4},
    'W2A4': {'weight.bits': 2, 'activation.bits': 4},
    'W4A4, 1 group': {'weight.groups': 1},
    'W4A4, a group a filter': {'weight.groups': 'channel'},
    'W4A4, float additions': {'deployable': False},
}
"""Title -> settings of `quantization`; the configs are W4A4 with 4 groups a layer."""


def float_model(title: str) -> Any:
    """The model of the config without quantization, random weights."""
    torch.manual_seed(0)
    cfg = read_config(ROOT / MODELS[title][0], OPTIONS.get(title))
    cfg.pop('quantization')
    return init_model(cfg, None, 'cpu')


def noise(title: str) -> np.ndarray:
    """A picture."""
    return np.random.default_rng(0).integers(0, 256, (*MODELS[title][1], 3), np.uint8)


def write_graphs(title: str, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Export a model with these settings as tools/export.py does, and in float; its parts and their example inputs."""
    kernels: dict[str, tuple[int, int]] = {}
    for name in settings:
        options = OPTIONS.get(title, {}) | {f'quantization.{key}': value for key, value in SETTINGS[name].items()}
        quantized = calibrated(ROOT / MODELS[title][0], noise(title), options)
        predict = functools.partial(infer, quantized, noise(title))
        report = export_graphs(quantized, merge_model(quantized, quantized.plan), predict, lambda _: None)
        for part in report.parts:
            (folder / f'{name}.{part.name}.onnx').write_bytes(part.graph.SerializeToString())
        kernels[name] = report.layers
    properties_of = {part.name: properties(part.graph) for part in report.parts}
    model = float_model(title)
    parts = parts_of(model, task_of(model.cfg))
    inputs = example_inputs(model, parts, lambda: infer(model, noise(title)))
    for part in parts:
        x, about = inputs[part.name], properties_of[part.name]
        with torch.no_grad():
            outputs = part.module(*x)
        merged = fuse_conv_bn(copy.deepcopy(part.module))  # ONNX Runtime does not do it with what torch exports
        graph = export_onnx(merged, x, [f'y{i}' for i in range(len(outputs))], about['any_size'])
        (folder / f'float.{part.name}.onnx').write_bytes(graph.SerializeToString())
    return dict(parts=parts, inputs=inputs, kernels=kernels)


def contestants(
    folder: Path, found: dict[str, Any], batch: int, threads: int
) -> dict[tuple[str, str], Callable[[], Any]]:
    """(runtime, bits) -> one prediction of a batch."""
    torch.set_num_threads(threads)
    inputs = {
        name: np.resize(x.numpy(), (batch if name != 'bbox_head' else len(x) * batch, *x.shape[1:])).astype(np.float32)
        for name, (x,) in found['inputs'].items()
    }
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}

    def eager() -> None:
        with torch.no_grad():
            for part in found['parts']:
                part.module(tensors[part.name])

    runs: dict[tuple[str, str], Callable[[], Any]] = {('torch', 'float'): eager}
    for backend in RUNTIMES:
        for bits in ('float', *found['kernels']):
            opened = [
                (open_runtime(backend, folder / f'{bits}.{part.name}.onnx', threads), inputs[part.name])
                for part in found['parts']
            ]
            runs[backend, bits] = lambda opened=opened: [run([x]) for run, x in opened]
    return runs


def measure(args: argparse.Namespace, console: Console) -> Iterator[list[dict[str, Any]]]:
    """For each model a row for each batch, threads, runtime and bits."""
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'))
    steps = len(args.models) * (1 + len(args.batches) * len(args.threads))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task('', total=steps)
        for title in args.models:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                progress.update(bar, description=f'{title}: exporting')
                found = write_graphs(title, folder, args.settings)
                files = {b: [folder / f'{b}.{p.name}.onnx' for p in found['parts']] for b in ('float', *args.settings)}
                one = [[x.numpy()[:1]] for (x,) in found['inputs'].values()]
                memory = {(k, b): peak_memory(k, f, one, 1) for k in RUNTIMES for b, f in files.items()}
                progress.advance(bar)
                rows: list[dict[str, Any]] = []
                for batch, threads in itertools.product(args.batches, args.threads):
                    progress.update(bar, description=f'{title}: batch {batch}, threads {threads}')
                    runs = contestants(folder, found, batch, threads)
                    times = list(timed_rounds(runs, args.rounds))
                    for runtime, bits in runs:
                        seconds = statistics.median(each[runtime, bits] for each in times)
                        size = sum(f.stat().st_size for f in files[bits]) if runtime != 'torch' else None
                        setting = dict(model=title, batch=batch, threads=threads, runtime=runtime, bits=bits)
                        kept = dict(bytes=size, peak_bytes=memory.get((runtime, bits)))
                        rows.append({**setting, 'seconds': seconds, **kept, 'kernels': found['kernels'].get(bits)})
                    progress.advance(bar)
                add_ratios(rows)
                yield rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add how much faster and smaller than float in the same runtime each row of a model is."""
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ('batch', 'threads', 'runtime'))]
        base = next(r for r in same if r['bits'] == 'float')
        row['faster'] = base['seconds'] / row['seconds']
        row['smaller'] = base['bytes'] / row['bytes'] if row['bytes'] else None


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for each model, batch and number of threads."""
    for setting in dict.fromkeys((row['model'], row['batch'], row['threads']) for row in rows):
        model, batch, threads = setting
        title = f'{model}, batch {batch}, threads {threads}; float is float32'
        table = Table(title=title, title_justify='left', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ('runtime', 'bits', 'ms', 'faster', 'MB', 'smaller', 'peak MB', 'integer layers'):
            table.add_column(column, justify='left' if column in ('runtime', 'bits') else 'right', no_wrap=True)
        for row in [row for row in rows if (row['model'], row['batch'], row['threads']) == setting]:
            table.add_row(
                row['runtime'],
                row['bits'],
                f'{row["seconds"] * 1000:.1f}',
                f'{row["faster"]:.2f}',
                f'{row["bytes"] / 1e6:.1f}' if row['bytes'] else '-',
                f'{row["smaller"]:.1f}' if row['smaller'] else '-',
                f'{row["peak_bytes"] / 1e6:.0f}' if row['peak_bytes'] else '-',
                '{} of {}'.format(*row['kernels']) if row['kernels'] else '-',
            )
        console.print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(MODELS), default=list(SMALL), help='default: %(default)s')
    parser.add_argument('--settings', nargs='+', choices=list(SETTINGS), default=list(SETTINGS), help='default: all')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 8], help='default: %(default)s')
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2], help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=10, help='timed calls of each contestant (default: %(default)s)')
    out = Path('docs/figures/inference.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    args = parser.parse_args()
    check_least(args, batches=1, threads=1, rounds=1)
    return args


def run() -> None:
    args = parse_args()
    check_writable(args.out.parent)
    console = Console(width=None if sys.stdout.isatty() else 100)
    rows: list[dict[str, Any]] = []
    for found in measure(args, console):
        rows += found
        write_figure(args.out, dict(rounds=args.rounds, rows=rows))  # not lost if a later model cannot be measured
        show(found, console)
    console.print(f'wrote {args.out}', soft_wrap=True)


if __name__ == '__main__':
    main(run)
