"""Paths and small models that many test files share; nothing here needs OpenMMLab."""

import os
from pathlib import Path

import torch
import torch.nn as nn

from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS
from gdrq_mm.report.provenance import installed

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    **os.environ,
    'OMP_NUM_THREADS': '1',
    'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
}
"""Environment of a process that a test starts."""
UPSTREAM = installed('mmengine') is not None
"""Whether OpenMMLab's own packages are installed, and not those of onedl."""


def same(one, other):
    """Whether two nested values are equal, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def conv(c_in=4, c_out=4, **kwargs):
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=False, **kwargs)


class Function(nn.Module):
    """A model whose forward is a function of itself and its input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


class Block(nn.Module):
    """A residual block with one in-place ReLU module, as ResNets have it."""

    def __init__(self, downsample=False):
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if downsample else None

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """Stem, blocks, classifier."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.bn, self.relu = conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.relu(self.bn(self.stem(x)))).mean((2, 3)))


class OwnForward(nn.Conv2d):
    """A convolution that does something else in forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def few_bits_of_both(method):
    """A `quantization` dict with 4 bits on both sides, or the most that the method has."""
    weight, activation = METHODS[method]
    sides = dict(weight=WEIGHT_METHODS[weight], activation=ACTIVATION_METHODS[activation])
    return dict(method=method, **{side: dict(bits=min(4, cls.allowed_bits[-1])) for side, cls in sides.items()})
