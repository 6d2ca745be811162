#!/usr/bin/env python
"""Draw what Scale-Clip does to the weights of a layer: docs/figures/scale_clip.png, the picture of the README.

A small network learns the handwritten digits that scikit-learn ships, in float. Then it trains on in the reshape stage
with `clip='project'`: after each optimizer step the stored weights are clipped to [-T, T], T = k * mean(|w|), k = 2
(docs/method.md, section 2). The histograms are those of one convolution before and after. Ten seconds on one core.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

import gdrq_mm as gq
from gdrq_mm.core import functional as F
from gdrq_mm.core.files import write_whole
from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.step import set_stage
from gdrq_mm.data.digits import split_digits
from gdrq_mm.openmmlab.cli import main
from gdrq_mm.report.plots import png

LAYER, K, BITS = '3', 2.0, 4
"""The layer that is drawn (the second convolution), Scale-Clip's k, and the bits of the steps that are drawn."""
SETTINGS = dict(weight=dict(bits=BITS, groups=1, gdrq=dict(k=K, clip='project')))


@dataclass(frozen=True)
class Look:
    """The weights of the layer at one moment."""

    title: str
    weights: np.ndarray
    threshold: float
    clipped: float
    """Share of the weights outside [-T, T]."""
    distance: float
    """To a uniform distribution, see functional.distance_to_uniform."""
    loss: float
    """Quantized loss at T, the paper's Eq. 3 with p = 1."""
    accuracy: float
    """Top-1 of the float network on the test digits, in %."""

    @property
    def caption(self) -> str:
        """What the picture says below the title."""
        return (
            f'distance to uniform {self.distance:.2f}, max / mean {np.abs(self.weights).max() / self.mean:.1f}\n'
            f'{BITS}-bit loss at T {self.loss:.3f}, clipped {100 * self.clipped:.0f} %, top-1 {self.accuracy:.1f} %'
        )

    @property
    def mean(self) -> float:
        """mean(|w|)."""
        return float(np.abs(self.weights).mean())


def network() -> nn.Sequential:
    """Three convolutions with batch normalization and a classifier, for pictures of 8x8."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float, quantized: bool = False) -> None:
    """SGD with a cosine; with `quantized` the weights are projected after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    batches = len(images) // 64
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: batches * 64].view(-1, 64):
            optimizer.zero_grad()
            cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            if quantized:
                gq.after_step(model)
            schedule.step()


def look(title: str, model: nn.Sequential, images: Tensor, labels: Tensor) -> Look:
    """Measure the layer as it is now."""
    weight = model.get_submodule(LAYER).weight.detach()  # type: ignore[union-attr, operator]
    sizes = torch.tensor([len(weight)])
    threshold = F.scale_clip_threshold(weight, K, sizes)
    lo, hi = F.code_range(BITS, signed=True)
    quantized = F.fake_quantize(weight, F.step_size(threshold, lo, hi), lo, hi)
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    return Look(
        title,
        weight.flatten().clone().numpy(),
        float(threshold),
        float((weight.abs() > threshold * 1.0001).float().mean()),
        float(F.distance_to_uniform(weight)),
        float(F.quantized_loss(weight, quantized)),
        100 * float(right),
    )


def picture(looks: list[Look]) -> bytes:
    """The histograms side by side, with T and the levels of the quantizer."""
    fig, axes = plt.subplots(1, len(looks), figsize=(11, 3.9), layout='constrained', sharex=True, sharey=True)
    reach = max(float(np.abs(each.weights).max()) for each in looks) * 1.03
    bins = np.linspace(-reach, reach, 121)
    hi = F.code_range(BITS, signed=True)[1]
    for axis, each in zip(axes, looks):
        axis.hist(each.weights, bins, color='#4c72b0', zorder=2)
        for level in range(-hi, hi + 1):
            axis.axvline(level * each.threshold / hi, color='#d5d5d5', lw=0.8, zorder=1)
        for sign in (-1, 1):
            axis.axvline(sign * each.threshold, color='#c44e52', lw=1.8, ls='--', zorder=3)
        axis.set_title(f'{each.title}\n{each.caption}', fontsize=10)
        axis.set_xlabel('weight')
        above = axis.get_xaxis_transform()
        axis.text(each.threshold, 0.98, ' T', color='#c44e52', va='top', fontsize=12, weight='bold', transform=above)
    axes[0].set_ylabel('weights')
    plt.close(fig)
    return png(fig, dpi=110)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, nargs=2, default=(20, 20), help='in float, and with Scale-Clip')
    parser.add_argument('--out', type=Path, default=Path('docs/figures/scale_clip.png'), help='default: %(default)s')
    args = parser.parse_args()
    torch.manual_seed(0)
    parts = split_digits()
    x, y, x_test, y_test = (torch.from_numpy(a) for name in ('train', 'test') for a in parts[name])
    x, x_test = (((images - 5) / 6).float()[:, None] for images in (x, x_test))
    model = network()
    train(model, x, y, args.epochs[0], 0.05)
    before = look('a trained layer (3x3, 32 to 64 channels)', model, x_test, y_test)
    gq.quantize(model, SETTINGS, example=x[:1], show=False)
    gq.calibrate(model, x.split(64))
    set_stage(model, Stage.RESHAPE)
    train(model, x, y, args.epochs[1], 0.02, quantized=True)
    after = look("after Scale-Clip (k = 2, clip='project')", model, x_test, y_test)
    console = Console(width=120)
    for each in (before, after):
        console.print(f'{each.title}: {each.caption.replace(chr(10), ", ")}')
    write_whole(args.out, picture([before, after]))
    console.print(f'wrote {args.out}', soft_wrap=True)


if __name__ == '__main__':
    main(run)
