#!/usr/bin/env python
"""How many weights jump to and fro between two codes, by method, and what freezing them does to the accuracy.

A small transformer (DeiT) and a MobileNetV2 learn the handwritten digits that scikit-learn ships, in float, then with
quantizers. Learned step sizes are said to let weights oscillate more than those from statistics, in transformers (Liu
et al., arXiv:2302.02210); oscillation is said to spoil depth-wise layers, so that freezing helps (Nagel et al.,
arXiv:2203.11086). Prints a table, writes a JSON, and draws the shares over the training.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from figure_tables import oscillation
from mmengine.logging import MMLogger
from mmpretrain.registry import MODELS
from mmpretrain.utils import register_all_modules
from rich.console import Console
from rich.markdown import Markdown
from shared import write_figure
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import gdrq_mm as gq
from gdrq_mm.core.errors import check_least
from gdrq_mm.core.files import write_whole
from gdrq_mm.core.oscillation import Oscillations
from gdrq_mm.data.digits import split_digits
from gdrq_mm.openmmlab.cli import main
from gdrq_mm.report.plots import png

MODELS_OF = dict(
    DeiT=dict(
        backbone=dict(
            type='VisionTransformer',
            arch=dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=384),
            img_size=8,
            patch_size=2,
            in_channels=1,
        ),
        head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=96),
    ),
    MobileNetV2=dict(
        backbone=dict(type='MobileNetV2', widen_factor=0.5),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=1280),
    ),
)
FREEZING = (0.1, 0.01)
"""Limits of the frequency from which a weight is frozen, the defaults of the hook."""
RUNS = [
    *(('DeiT', method, bits, None) for bits in ('w4a4', 'w2a4') for method in ('gdrq', 'lsq', 'lsq_plus')),
    *(('MobileNetV2', method, 'w4a4', limits) for method in ('gdrq', 'lsq') for limits in (None, FREEZING)),
]
"""Model, method, bits, and the limits of freezing or None."""
BATCH, EVERY = 64, 10
"""Pictures of a step, and steps from one point of the curves to the next."""

Data = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A model of mmpretrain as plain torch: pictures to logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.size = 8 if name == 'DeiT' else 32
        self.model = MODELS.build(dict(type='ImageClassifier', **copy.deepcopy(MODELS_OF[name])))
        self.model.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        if self.size != x.shape[-1]:
            x = interpolate(x, self.size, mode='bilinear').expand(-1, 3, -1, -1)
        return self.model(x)


def train(model: nn.Module, data: Data, epochs: int, lr: float, watched: Oscillations | None = None) -> list[float]:
    """AdamW with a cosine.

    Returns:
        The share of the weights that oscillate and are not frozen, every few steps, if they are watched.
    """
    images, labels = data
    groups = gq.parameter_groups(model, weight_decay=0.01) if watched else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    shares, order = [], torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(images))
        index, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
        if watched:
            gq.after_step(model)
            watched.step(step / steps)
            if step % EVERY == 0 or step == steps:
                shares.append(watched.shares()[0])
    return shares


def top1(model: nn.Module, data: Data) -> float:
    """Accuracy in %."""
    images, labels = data
    with torch.no_grad():
        return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def quantized(name: str, method: str, bits: str, limits: Any, state: Any, parts: dict[str, Data], epochs: int) -> Any:
    """Train one setting from the float weights: its row, with the curve."""
    model = Classifier(name)
    model.load_state_dict(state)
    images = parts['train'][0]
    settings = dict(method=method, weight=dict(bits=int(bits[1])), activation=dict(bits=int(bits[3])))
    gq.quantize(model, settings, example=images[:2], show=False)
    gq.calibrate(model, images.split(BATCH)[:8])
    watched = Oscillations(model, limits)
    curve = train(model, parts['train'], epochs, 5e-4, watched)
    row = dict(model=name, method=method, bits=bits.upper(), freezing=limits is not None)
    return row | dict(top1=top1(model, parts['test']), frozen=watched.shares()[1], curve=curve)


def picture(groups: dict[tuple[Any, ...], list[Any]]) -> bytes:
    """A panel for each model and bits: the share of oscillating weights over the training, mean of the seeds."""
    panels = list(dict.fromkeys(key[:2] for key in groups))
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.4), layout='constrained')
    for axis, panel in zip(axes, panels):
        for (model, bits, method, freezing), rows in groups.items():
            if (model, bits) != panel:
                continue
            curve = torch.tensor([row['curve'] for row in rows]).mean(0)
            label = method + ', freezing' * freezing
            axis.plot(torch.linspace(0, 100, len(curve)), 100 * curve, label=label, ls='--' if freezing else '-')
        axis.set(title=' '.join(panel), xlabel='training in %', ylim=(0, None))
        axis.legend(fontsize=8)
    axes[0].set_ylabel('oscillating weights in %')
    plt.close(fig)
    return png(fig, dpi=110)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, nargs=2, default=(20, 20), help='in float, and with quantizers (20 20)')
    parser.add_argument('--seeds', type=int, default=2, help='default: %(default)s')
    parser.add_argument('--models', nargs='+', choices=list(MODELS_OF), default=list(MODELS_OF), help='default: all')
    parser.add_argument('--out', type=Path, default=Path('docs/figures/oscillation.json'), help='default: %(default)s')
    args = parser.parse_args()
    check_least(args, seeds=1)
    register_all_modules()
    MMLogger.get_instance('mmengine', log_level='WARNING')  # what init_weights() did to each tensor
    parts = {}
    for part, (images, labels) in split_digits().items():
        parts[part] = ((torch.from_numpy(images).float()[:, None] - 5) / 6, torch.from_numpy(labels))
    console, rows, floats = Console(width=120), [], {}
    for seed in range(args.seeds):
        for name in args.models:
            torch.manual_seed(seed)
            model = Classifier(name)
            train(model, parts['train'], args.epochs[0], 2e-3)
            floats.setdefault(name, []).append(top1(model, parts['test']))
            console.print(f'{name}, seed {seed}: float {floats[name][-1]:.2f}')
            for setting in (each for each in RUNS if each[0] == name):
                torch.manual_seed(seed)
                rows.append(quantized(*setting, model.state_dict(), parts, args.epochs[1]) | dict(seed=seed))
                done = rows[-1]
                freezing = ', freezing' * done['freezing']
                found = f'top-1 {done["top1"]:.2f} %, oscillating {100 * done["curve"][-1]:.1f} %'
                console.print(f'{name}, seed {seed}: {done["bits"]} {done["method"]}{freezing}: {found}')
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault((row['model'], row['bits'], row['method'], row['freezing']), []).append(row)
    write_whole(args.out.with_suffix('.png'), picture(groups))
    write_figure(args.out, dict(epochs=list(args.epochs), float=floats, rows=rows), console)
    console.print(Markdown(oscillation(args.out)))


if __name__ == '__main__':
    main(run)
