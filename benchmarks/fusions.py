#!/usr/bin/env python
"""Gradients of the branches where features are fused, in float and quantized models.

At each addition and concatenation of a detector's neck: the root mean square of the gradient that reaches each branch,
over that of all branches of this fusion, on training batches. arXiv:2511.05898 finds that quantization-aware training
makes them unequal. Models are given as CONFIG CHECKPOINT pairs, all from one float model:

    python benchmarks/fusions.py configs/det/yolox_nano_bccd.py float.pth configs/det/yolox_nano_gdrq_w4a4_bccd.py q.pth
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from shared import write_figure
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gdrq_mm.core.errors import UserError, check_least
from gdrq_mm.core.topology import ADDITIONS
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.cli import check_writable, main, read_config
from gdrq_mm.openmmlab.seeding import seed_all

Squares = dict[tuple[str, int], list[float]]
"""Fusion and branch -> mean squares of gradients, one a batch."""


class Branches(TorchFunctionMode):
    """Notes the gradient that each branch of an addition or a concatenation gets."""

    def __init__(self, found: Squares) -> None:
        super().__init__()
        self.found, self.counts = found, defaultdict(int)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = 'addition' if function in ADDITIONS else 'concatenation' if function is torch.cat else ''
        operands = args[0] if kind == 'concatenation' else args[:2]
        if kind and all(isinstance(x, Tensor) and x.dim() == 4 and x.requires_grad for x in operands):
            self.counts[kind] += 1
            name = f'{kind} {self.counts[kind]}'
            branches = [self.watched(x, name, number) for number, x in enumerate(operands)]
            args = (branches, *args[1:]) if kind == 'concatenation' else (*branches, *args[2:])
        return function(*args, **(kwargs or {}))

    def watched(self, x: Tensor, name: str, number: int) -> Tensor:
        """A branch as a tensor of its own: its gradient is not that of the other readers of x."""
        branch = x.view_as(x)
        branch.register_hook(lambda grad: self.found[name, number].append(float(grad.square().mean())))
        return branch


def within(forward: Callable[..., Any], found: Squares) -> Callable[..., Any]:
    """A forward that runs with its fusions watched."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with Branches(found):
            return forward(*args, **kwargs)

    return run


def gradients(config: str, checkpoint: str, batches: int) -> dict[str, list[float]]:
    """Fusion -> share of each branch in the root mean squares, 1 where all branches are equal."""
    cfg = read_config(config)
    model, found = init_model(cfg, checkpoint).train(), defaultdict(list)
    if not getattr(model, 'with_neck', False):
        raise UserError(f'{config} has no neck')
    model.neck.forward = within(model.neck.forward, found)
    seed_all(0)
    for number, batch in enumerate(Runner.build_dataloader(cfg.train_dataloader, seed=0)):
        if number == batches:
            break
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
        model.zero_grad()
        model.parse_losses(losses)[0].backward()
    norms = defaultdict(list)
    for (name, _), squares in sorted(found.items()):
        norms[name].append((sum(squares) / len(squares)) ** 0.5)
    return {name: [each * len(branches) / sum(branches) for each in branches] for name, branches in norms.items()}


def compare() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='CONFIG CHECKPOINT', help='the float model first')
    parser.add_argument('--batches', type=int, default=16, help='training batches (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('docs/figures/fusions.json'), help='default: %(default)s')
    args = parser.parse_args()
    check_least(args, batches=1)
    if len(args.models) % 2:
        raise UserError(f'{args.models[-1]} has no checkpoint behind it')
    check_writable(args.out.parent)
    pairs = list(zip(args.models[::2], args.models[1::2]))
    found = {Path(config).stem: gradients(config, checkpoint, args.batches) for config, checkpoint in pairs}
    table = Table('fusion', *found)
    for name in next(iter(found.values())):
        table.add_row(name, *(', '.join(f'{share:.2f}' for share in each[name]) for each in found.values()))
    console = Console()
    console.print(table)
    write_figure(args.out, dict(batches=args.batches, models=found), console)


if __name__ == '__main__':
    main(compare)
