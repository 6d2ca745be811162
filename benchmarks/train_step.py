#!/usr/bin/env python
"""Time and memory of a quantization-aware training step over those of the float step.

The model is mmpretrain's ResNet with 4-bit weights and activations, 8 bits in the first and the last layer.
Contestants: float; gdrq, with `deployable` off and on; torch.ao's FakeQuantize with moving min/max observers; Brevitas,
if it is installed (see BREVITAS below). All of them quantize the input and the weight of the same layers, and only
`deployable` more, the operands of additions. gdrq has 4 groups a layer as in configs/_base_/quantization/gdrq_w4a4.py,
the others one range a layer. A step is forward, loss, backward, SGD with momentum and, for gdrq, core.step.after_step.

Every round runs one step of each contestant in both memory formats, in an order drawn anew. The ratio is that of the
medians, within a memory format. Peak memory is what two steps add to a fresh process. Prints a table and writes a JSON.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401  registers ResNet and its parts
import torch
import torch.nn as nn
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from shared import check_least, peak_of_process, write_figure
from torch import Tensor

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.step import after_step
from gdrq_mm.core.topology import record
from gdrq_mm.openmmlab.cli import check_writable, main

BREVITAS = 'uv pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd==0.2.3'
"""Leaves torch, numpy and setuptools as they are. Brevitas 0.12.1 asks for a setuptools that torch 2.13 refuses."""

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
FIRST, LAST = 'backbone.conv1', 'head.fc'
"""The first and the last layer of the model."""

WARM_UP = 3
"""Steps that are not timed: observers and Brevitas's scales have started after them."""


@dataclass
class Contestant:
    """A model with its batch, optimizer and what is to be done after an optimizer step."""

    model: nn.Module
    images: Tensor
    samples: list[DataSample]
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]

    def step(self) -> float:
        """One training step; its seconds."""
        _wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.images, self.samples, mode='loss')['loss'].backward()
        self.optimizer.step()
        self.after_step()
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


# ---- the contestants ----------------------------------------------------------------------------------------------


def float_model(depth: int) -> nn.Module:
    """mmpretrain's ResNet classifier with 1000 classes."""
    return MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmpretrain.ResNet', depth=depth),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=512 if depth < 50 else 2048),
        )
    )


def settings(deployable: bool) -> Quantization:
    """The quantization of gdrq_w4a4.py."""
    return Quantization.from_dict(
        dict(
            weight=dict(method='gdrq', bits=4, groups=4), activation=dict(method='gdrq', bits=4), deployable=deployable
        )
    )


def use_float(model: nn.Module, images: Tensor) -> None:
    """Leave the model as it is."""


def use_gdrq(model: nn.Module, images: Tensor, deployable: bool = False) -> None:
    """Quantize with gdrq_mm and calibrate, as QuantRunner does."""
    small = images[:1, :, :64, :64]  # so that the peak of memory is that of the training step
    quantize_model(model, settings(deployable), record(model, lambda: model(small)))
    model.to(DEVICE)
    calibrate(model, [small])


def use_deployable(model: nn.Module, images: Tensor) -> None:
    """The same with shared inputs and quantized additions."""
    use_gdrq(model, images, deployable=True)


def placement(model: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """Layer -> its module, bits of the weight and bits of the input, as gdrq places them in this model."""
    config, found = settings(deployable=False), {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight, activation = config.for_layer(name, first_or_last=name in (FIRST, LAST))
            found[name] = (layer, weight.bits, activation.bits)
    return found


class AoConv2d(nn.Conv2d):
    """nn.Conv2d with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.fake_input(x), self.fake_weight(self.weight), self.bias)


class AoLinear(nn.Linear):
    """nn.Linear with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fake_input(x), self.fake_weight(self.weight), self.bias)


def use_torch_ao(model: nn.Module, images: Tensor) -> None:
    """torch.ao's FakeQuantize: symmetric weights, affine inputs, a MovingAverageMinMaxObserver for each."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    for layer, weight_bits, input_bits in placement(model).values():
        top = 2 ** (weight_bits - 1) - 1
        common = dict(observer=MovingAverageMinMaxObserver, reduce_range=False)
        layer.fake_weight = FakeQuantize(
            quant_min=-top, quant_max=top, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **common
        )
        layer.fake_input = FakeQuantize(
            quant_min=0, quant_max=2**input_bits - 1, dtype=torch.quint8, qscheme=torch.per_tensor_affine, **common
        )
        layer.__class__ = AoConv2d if isinstance(layer, nn.Conv2d) else AoLinear


def use_brevitas(model: nn.Module, images: Tensor) -> None:
    """Brevitas's quantized layers: weights scaled by their largest value, inputs by a scale that learns."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    for name, (layer, weight_bits, input_bits) in placement(model).items():
        options: dict[str, Any] = dict(
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=weight_bits,
            # The image is signed; everything else in a ResNet that a layer reads comes from a ReLU.
            input_quant=Int8ActPerTensorFloat if name == FIRST else Uint8ActPerTensorFloat,
            input_bit_width=input_bits,
            # It first scales by a percentile, which is slow, for 300 steps by default. What follows is timed.
            input_collect_stats_steps=1,
        )
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            new = qnn.QuantConv2d(*sizes, bias=layer.bias is not None, **options)
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, new)


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    'float': use_float,
    'gdrq': use_gdrq,
    'gdrq-deployable': use_deployable,
    'torch.ao': use_torch_ao,
    'brevitas': use_brevitas,
}


def build(name: str, memory_format: str, args: argparse.Namespace) -> Contestant:
    """A contestant that is ready for its first training step."""
    torch.manual_seed(0)
    layout = FORMATS[memory_format]
    model = float_model(args.model_depth).to(DEVICE, memory_format=layout).train()
    images = torch.randn(args.batch, 3, args.size, args.size).to(DEVICE, memory_format=layout)
    samples = [DataSample().set_gt_label(i % 1000).to(DEVICE) for i in range(args.batch)]
    CONTESTANTS[name](model, images)
    model.to(DEVICE, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    after = partial(after_step, model) if quant_layers(model) else lambda: None
    return Contestant(model, images, samples, optimizer, after)


# ---- memory -------------------------------------------------------------------------------------------------------


def peak() -> int:
    """The most memory of this process so far, in bytes: of the accelerator if there is one, else resident."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == 'cuda' else peak_of_process()


def memory_of_steps(name: str, memory_format: str, args: argparse.Namespace) -> int:
    """Bytes that two training steps add to the peak of this process."""
    contestant = build(name, memory_format, args)
    before = peak()
    contestant.step()
    contestant.step()  # with the optimizer's momentum in memory
    return peak() - before


def memory_in_fresh_process(name: str, memory_format: str, args: argparse.Namespace) -> int:
    """The same, in a process of its own."""
    options = dict(model_depth=args.model_depth, batch=args.batch, size=args.size, threads=args.threads)
    given = [f'--{key.replace("_", "-")}={value}' for key, value in options.items()]
    command = [sys.executable, __file__, *given, '--memory-of', name, memory_format]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{name}, {memory_format}: {done.stderr[-2000:]}')
    return int(done.stdout.splitlines()[-1])


# ---- the command --------------------------------------------------------------------------------------------------


def measure(names: list[str], args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each contestant and memory format: seconds of each round and peak memory."""
    keys = list(itertools.product(args.formats, names))
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        memory = {
            (layout, name): memory_in_fresh_process(name, layout, args)
            for layout, name in progress.track(keys, description='peak memory')
        }
        contestants = {key: build(key[1], key[0], args) for key in progress.track(keys, description='building')}
        for contestant in progress.track(list(contestants.values()), description='warming up'):
            for _ in range(WARM_UP):
                contestant.step()
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
        shuffle = random.Random(0).shuffle
        for _ in progress.track(range(args.rounds), description='timing'):
            shuffle(keys)
            for key in keys:
                seconds[key].append(contestants[key].step())
    return [
        dict(contestant=name, memory_format=layout, seconds=times, peak_bytes=memory[layout, name])
        for (layout, name), times in seconds.items()
    ]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Add medians and ratios to the float row of the same memory format; the quartiles are those of single rounds."""
    for row in rows:
        base = next(r for r in rows if r['contestant'] == 'float' and r['memory_format'] == row['memory_format'])
        row['median_seconds'] = statistics.median(row['seconds'])
        row['ratio'] = row['median_seconds'] / statistics.median(base['seconds'])
        single = [ours / theirs for ours, theirs in zip(row['seconds'], base['seconds'])]
        low, _, high = statistics.quantiles(single, n=4) if len(single) > 1 else single * 3
        row['ratio_quartiles'] = [low, high]
        row['memory_ratio'] = row['peak_bytes'] / base['peak_bytes'] if base['peak_bytes'] else None


def show(rows: list[dict[str, Any]], title: str) -> Table:
    """The table."""
    table = Table(title=title, title_justify='left', title_style='bold', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column('format', no_wrap=True)
    table.add_column('contestant', no_wrap=True)
    for column in ('step ms', 'ratio', 'quartiles', 'peak MB', 'ratio'):
        table.add_column(column, justify='right')
    for layout, group in itertools.groupby(rows, lambda row: row['memory_format']):
        for number, row in enumerate(group):
            low, high = row['ratio_quartiles']
            table.add_row(
                layout if number == 0 else '',
                row['contestant'],
                f'{row["median_seconds"] * 1000:.1f}',
                f'{row["ratio"]:.3f}',
                f'{low:.2f} - {high:.2f}',
                f'{row["peak_bytes"] / 1e6:.0f}',
                '-' if row['memory_ratio'] is None else f'{row["memory_ratio"]:.2f}',
            )
        table.add_section()
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    depths = (18, 34, 50, 101, 152)
    parser.add_argument('--model-depth', type=int, default=18, choices=depths, help='depth (default: %(default)s)')
    parser.add_argument('--batch', type=int, default=16, help='images a step (default: %(default)s)')
    parser.add_argument('--size', type=int, default=224, help='image size in pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=20, help='timed steps of each contestant (default: %(default)s)')
    threads = torch.get_num_threads()
    parser.add_argument('--threads', type=int, default=threads, help='threads of torch (default: %(default)s)')
    parser.add_argument('--contestants', nargs='+', default=None, choices=list(CONTESTANTS), help='default: all')
    parser.add_argument('--formats', nargs='+', default=list(FORMATS), choices=list(FORMATS), help='default: both')
    out = Path('docs/figures/train_step.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    parser.add_argument('--memory-of', nargs=2, metavar=('CONTESTANT', 'FORMAT'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_least(args, batch=1, size=64, rounds=1, threads=1)
    return args


def chosen(args: argparse.Namespace, console: Console) -> list[str]:
    """The contestants, float first; without Brevitas if it is not installed and was not asked for by name."""
    names = [name for name in CONTESTANTS if name == 'float' or name in (args.contestants or CONTESTANTS)]
    if 'brevitas' in names and find_spec('brevitas') is None:
        if args.contestants:
            raise UserError(f'brevitas is not installed; to install it: {BREVITAS}')
        console.print(f'without Brevitas, which is not installed; to install it: {BREVITAS}', soft_wrap=True)
        names.remove('brevitas')
    return names


def run() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(memory_of_steps(*args.memory_of, args))
        return
    check_writable(args.out.parent)
    console = Console()
    names = chosen(args, console)
    rows = measure(names, args, console)
    add_ratios(rows)
    where = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'
    shape = (
        f'ResNet-{args.model_depth}, batch {args.batch}, {args.size} px, {args.rounds} rounds, threads {args.threads}'
    )
    console.print(show(rows, f'Training step over the float step in the same memory format: {shape}, {where}'))
    found = dict(
        settings={key: getattr(args, key) for key in ('model_depth', 'batch', 'size', 'rounds', 'threads')},
        device=DEVICE.type,
        rows=rows,
        versions=dict(brevitas=version('brevitas') if 'brevitas' in names else None),
    )
    write_figure(args.out, found, console)


if __name__ == '__main__':
    main(run)
