#!/usr/bin/env python
"""Time and memory of a quantization-aware training step over those of the float step.

Models are those of configs, with 4-bit weights and activations, 8 bits in the first and the last layers. Contestants:
float; gdrq, with `deployable` off and on; gdrq without its kernels; torch.ao's FakeQuantize with moving min/max
observers; Brevitas, if it is installed (see BREVITAS below); float and gdrq by torch.compile, if asked for. All of them
quantize the input and the weight of the same layers, and only `deployable` more, the operands of additions and what
activation functions read. gdrq has 4 groups a layer as in configs/_base_/quantization/gdrq_w4a4.py, the others one
range a layer. A step is forward, loss, backward, SGD with momentum and, for gdrq, core.step.after_step. Classifiers get
noise, the others pictures of the digits.

Every round runs one step of each contestant in each memory format, in an order drawn anew. The ratio is that of the
medians, within a memory format. Peak memory is what two steps add to a fresh process. Prints a table for each model,
precision and number of threads, and writes a JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.runner import Runner
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
from gdrq_mm.core.kernels import native
from gdrq_mm.core.modules import quant_layers, replace_modules
from gdrq_mm.core.step import after_step
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.cli import check_writable, main, read_config
from gdrq_mm.openmmlab.models import record_plan

BREVITAS = 'uv pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd==0.2.3'
"""Leaves torch, numpy and setuptools as they are. Brevitas 0.12.1 asks for a setuptools that torch 2.13 refuses."""

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
ROOT = Path(__file__).resolve().parents[1]
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
PRECISIONS = {'float32': None, 'bf16': torch.bfloat16}
"""Name -> the type of autocast."""
MODELS = {
    'ResNet-18': ('configs/cls/resnet18_gdrq_w4a4.py', 16, 224),
    'ResNet-50': ('configs/cls/resnet50_gdrq_w4a4.py', 8, 224),
    'CIFAR ResNet-18': ('configs/cls/resnet18_width16_gdrq_w4a4_cifar10.py', 128, 32),
    'YOLOX': ('configs/det/yolox_nano_gdrq_w4a4_digits.py', 8, None),
    'Faster R-CNN': ('configs/det/faster_rcnn_r18_gdrq_w4a4_digits.py', 8, None),
    'PSPNet': ('configs/seg/pspnet_r18_gdrq_w4a4_digits.py', 8, None),
}
"""Title -> config, pictures a step, and pixels of pictures of noise; None: pictures of the digits."""
WARM_UP = 3
"""Steps that are not timed: observers and Brevitas's scales have started after them."""


@dataclass
class Contestant:
    """A model with its batch, optimizer and what is to be done after an optimizer step."""

    model: Any
    parse_losses: Callable[[Any], Any]
    batch: dict[str, Any]
    precision: str
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]
    kernels: bool = True

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(DEVICE.type, dtype) if dtype else nullcontext():
            return self.parse_losses(self.model(**batch, mode='loss'))[0]

    def step(self) -> float:
        """One training step; its seconds."""
        batch = copy.deepcopy(self.batch)  # detectors write into their samples
        operators = native.operators
        if not self.kernels:
            native.operators = lambda: None
        _wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()
        self.after_step()
        _wait()
        seconds = time.perf_counter() - start
        native.operators = operators
        return seconds


def _wait() -> None:
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


# ---- the contestants ----------------------------------------------------------------------------------------------


def settings(deployable: bool) -> Quantization:
    """The quantization of gdrq_w4a4.py."""
    return Quantization.from_dict(
        dict(
            weight=dict(method='gdrq', bits=4, groups=4), activation=dict(method='gdrq', bits=4), deployable=deployable
        )
    )


def use_float(model: Any, batch: dict[str, Any]) -> None:
    """Leave the model as it is."""


def use_gdrq(model: Any, batch: dict[str, Any], deployable: bool = False) -> None:
    """Quantize with gdrq_mm and calibrate, as QuantRunner does."""
    batch = copy.deepcopy(batch)
    one = batch['inputs'][:1], batch['data_samples'][:1]
    model.eval()
    quantize_model(model, settings(deployable), record_plan(model, lambda: model(*one, mode='predict')))
    model.train()
    calibrate(model, [batch], lambda batch: model(**batch, mode='loss'))


def use_deployable(model: Any, batch: dict[str, Any]) -> None:
    """The same with shared inputs and quantized additions."""
    use_gdrq(model, batch, deployable=True)


def placement(model: Any, batch: dict[str, Any]) -> dict[nn.Module, tuple[int, int, bool]]:
    """Layer -> bits of the weight and of the input, and whether the input is signed, as gdrq has them."""
    other = copy.deepcopy(model)
    use_gdrq(other, batch)
    modules = dict(model.named_modules())
    return {modules[name]: (*layer.bits, layer.input_quant.lo < 0) for name, layer in quant_layers(other).items()}


class AoConv2d(nn.Conv2d):
    """nn.Conv2d with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.fake_input(x), self.fake_weight(self.weight), self.bias)


class AoLinear(nn.Linear):
    """nn.Linear with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fake_input(x), self.fake_weight(self.weight), self.bias)


def use_torch_ao(model: Any, batch: dict[str, Any]) -> None:
    """torch.ao's FakeQuantize: symmetric weights, affine inputs, a MovingAverageMinMaxObserver for each."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    for layer, (weight_bits, input_bits, _) in placement(model, batch).items():
        top = 2 ** (weight_bits - 1) - 1
        common = dict(observer=MovingAverageMinMaxObserver, reduce_range=False)
        layer.fake_weight = FakeQuantize(
            quant_min=-top, quant_max=top, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **common
        )
        layer.fake_input = FakeQuantize(
            quant_min=0, quant_max=2**input_bits - 1, dtype=torch.quint8, qscheme=torch.per_tensor_affine, **common
        )
        layer.__class__ = AoConv2d if isinstance(layer, nn.Conv2d) else AoLinear


def use_brevitas(model: Any, batch: dict[str, Any]) -> None:
    """Brevitas's quantized layers: weights scaled by their largest value, inputs by a scale that learns."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    replaced = {}
    for layer, (weight_bits, input_bits, signed) in placement(model, batch).items():
        options: dict[str, Any] = dict(
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=weight_bits,
            input_quant=Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            input_bit_width=input_bits,
            # It first scales by a percentile, which is slow, for 300 steps by default. What follows is timed.
            input_collect_stats_steps=1,
            bias=layer.bias is not None,
        )
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            options |= dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
            new = qnn.QuantConv2d(*sizes, **options)
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        replaced[layer] = new
    replace_modules(model, replaced)


CONTESTANTS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    'float': use_float,
    'gdrq': use_gdrq,
    'gdrq-deployable': use_deployable,
    'gdrq-torch-code': use_gdrq,
    'torch.ao': use_torch_ao,
    'brevitas': use_brevitas,
    'float-compiled': use_float,
    'gdrq-compiled': use_gdrq,
}
COMPILED = ('float-compiled', 'gdrq-compiled')
"""By torch.compile, which takes a minute or more for each of them: measured where they are asked for."""


def batch_of(cfg: Any, model: Any, count: int, size: int | None) -> dict[str, Any]:
    """Inputs and samples of a training step, on DEVICE."""
    if size is not None:
        samples = [DataSample().set_gt_label(i % 10).to(DEVICE) for i in range(count)]
        return dict(inputs=torch.randn(count, 3, size, size, device=DEVICE), data_samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        digits.build(folder)
        loader = cfg.train_dataloader
        loader.update(num_workers=0, persistent_workers=False, batch_size=count)
        loader.dataset.data_root = str(Path(folder) / Path(loader.dataset.data_root).name)
        return model.data_preprocessor(next(iter(Runner.build_dataloader(loader, seed=0))), True)


def build(
    name: str, layout: str, precision: str, title: str, batch: int | None = None, size: int | None = None
) -> Contestant:
    """A contestant that is ready for its first training step; `batch` and `size` are those of MODELS by default."""
    torch.manual_seed(0)
    config, usual_batch, usual_size = MODELS[title]
    cfg = read_config(ROOT / config)
    cfg.pop('quantization')
    model = init_model(cfg, None, DEVICE.type).train()
    data = batch_of(cfg, model, batch or usual_batch, usual_size and (size or usual_size))
    data['inputs'] = data['inputs'].contiguous(memory_format=FORMATS[layout])
    model.to(memory_format=FORMATS[layout])
    CONTESTANTS[name](model, data)
    model.to(DEVICE, memory_format=FORMATS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    after = partial(after_step, model) if quant_layers(model) else lambda: None
    parse_losses = model.parse_losses
    model = torch.compile(model) if name in COMPILED else model
    return Contestant(model, parse_losses, data, precision, optimizer, after, name != 'gdrq-torch-code')


# ---- memory -------------------------------------------------------------------------------------------------------


def peak() -> int:
    """The most memory of this process so far, in bytes: of the accelerator if there is one, else resident."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == 'cuda' else peak_of_process()


def memory_of_steps(which: list[str], batch: int | None, size: int | None) -> int:
    """Bytes that two training steps add to the peak of this process."""
    contestant = build(*which, batch=batch, size=size)
    before = peak()
    contestant.step()
    contestant.step()  # with the optimizer's momentum in memory
    return peak() - before


def memory_in_fresh_process(which: list[str], args: argparse.Namespace) -> int:
    """The same, in a process of its own."""
    options = dict(threads=torch.get_num_threads(), batch=args.batch, size=args.size)
    given = [f'--{key}={value}' for key, value in options.items() if value is not None]
    command = [sys.executable, __file__, *given, '--memory-of', *which]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{which}: {done.stderr[-2000:]}')
    return int(done.stdout.splitlines()[-1])


# ---- the command --------------------------------------------------------------------------------------------------


def measure(
    names: list[str], title: str, precision: str, args: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """A row for each contestant and memory format: seconds of each round and peak memory."""
    keys = list(itertools.product(args.formats, names))
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.completed}/{task.total}'))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        memory = {
            (layout, name): memory_in_fresh_process([name, layout, precision, title], args)
            for layout, name in progress.track(keys, description=f'{title}: peak memory')
        }
        contestants = {
            (layout, name): build(name, layout, precision, title, args.batch, args.size)
            for layout, name in progress.track(keys, description='building')
        }
        for contestant in progress.track(list(contestants.values()), description='warming up'):
            for _ in range(WARM_UP):
                contestant.step()
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
        shuffle = random.Random(0).shuffle
        for _ in progress.track(range(args.rounds), description='timing'):
            shuffle(keys)
            for key in keys:
                seconds[key].append(contestants[key].step())
    where = dict(model=title, precision=precision, threads=torch.get_num_threads())
    return [
        dict(**where, memory_format=layout, contestant=name, seconds=times, peak_bytes=memory[layout, name])
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
    parser.add_argument('--models', nargs='+', default=list(MODELS), choices=list(MODELS), help='default: all')
    parser.add_argument('--batch', type=int, help='pictures a step (default: those of the model)')
    parser.add_argument('--size', type=int, help='pixels of pictures of noise (default: those of the model)')
    parser.add_argument('--rounds', type=int, default=9, help='timed steps of each contestant (default: %(default)s)')
    threads = torch.get_num_threads()
    parser.add_argument('--threads', type=int, nargs='+', default=[threads], help=f'of torch (default: {threads})')
    parser.add_argument(
        '--precisions', nargs='+', default=['float32'], choices=list(PRECISIONS), help='default: float32'
    )
    parser.add_argument(
        '--contestants', nargs='+', default=None, choices=list(CONTESTANTS), help='default: those that are not compiled'
    )
    parser.add_argument('--formats', nargs='+', default=list(FORMATS), choices=list(FORMATS), help='default: both')
    out = Path('docs/figures/train_step.json')
    parser.add_argument('--out', type=Path, default=out, help='JSON file (default: %(default)s)')
    hidden = ('CONTESTANT', 'FORMAT', 'PRECISION', 'MODEL')
    parser.add_argument('--memory-of', nargs=4, metavar=hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    check_least(args, rounds=1, threads=1, batch=1, size=32)
    return args


def chosen(args: argparse.Namespace, console: Console) -> list[str]:
    """The contestants, float first; without Brevitas if it is not installed and was not asked for by name."""
    wanted = args.contestants or [name for name in CONTESTANTS if name not in COMPILED]
    names = [name for name in CONTESTANTS if name == 'float' or name in wanted]
    if 'brevitas' in names and find_spec('brevitas') is None:
        if args.contestants:
            raise UserError(f'brevitas is not installed; to install it: {BREVITAS}')
        console.print(f'without Brevitas, which is not installed; to install it: {BREVITAS}', soft_wrap=True)
        names.remove('brevitas')
    return names


def save(rows: list[dict[str, Any]], names: list[str], args: argparse.Namespace) -> None:
    """Write what was measured so far."""
    about = dict(
        settings=dict(rounds=args.rounds, batch=args.batch, size=args.size),
        device=DEVICE.type,
        kernels=native.description(),
        rows=rows,
        versions=dict(brevitas=version('brevitas') if 'brevitas' in names else None),
    )
    write_figure(args.out, about, Console(quiet=True))


def run() -> None:
    args = parse_args()
    if args.memory_of:
        torch.set_num_threads(args.threads[0])
        print(memory_of_steps(args.memory_of, args.batch, args.size))
        return
    check_writable(args.out.parent)
    console = Console()
    names = chosen(args, console)
    where = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'CPU'
    rows = []
    for threads, precision, title in itertools.product(args.threads, args.precisions, args.models):
        torch.set_num_threads(threads)
        found = measure(names, title, precision, args, console)
        add_ratios(found)
        rows += found
        save(rows, names, args)  # what was measured is not lost if a later model cannot be
        count = args.batch or MODELS[title][1]
        console.print(show(found, f'{title}, {count} pictures a step, {precision}, threads {threads}, {where}'))
    console.print(f'wrote {args.out}', soft_wrap=True, highlight=False)


if __name__ == '__main__':
    main(run)
