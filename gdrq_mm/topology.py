"""What feeds what in a model, recorded during one eager prediction: no torch.fx, no tracing.

Forward hooks tell which module reads and returns which tensor; a TorchFunctionMode tells the operands of additions and
what activation functions read. A tensor is known by its identity and version, so an in-place ReLU makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

Key = tuple[int, int]
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_ACTIVATIONS = set(
    'celu elu gelu hardsigmoid hardswish leaky_relu logsigmoid mish prelu rrelu selu sigmoid silu softplus tanh'.split()
)
"""Names of functions that a runtime cannot take up into the clip of a quantizer, as it does ReLU."""
_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass
class Addition:
    """One addition of two tensors of the same shape."""

    module: str
    """Module whose forward adds."""
    operands: tuple[tuple[str, ...], tuple[str, ...]]
    """For each operand the modules that returned it, innermost first; empty if a function made it."""


@dataclass
class Topology:
    """The record of one prediction. Names are those of `named_modules()`, the first one of a shared module."""

    calls: dict[str, int] = field(default_factory=dict)
    """How often each module was called, in the order of the first call."""
    inputs: dict[str, Key] = field(default_factory=dict)
    """The tensor that a module read at its first call."""
    macs: dict[str, int] = field(default_factory=dict)
    """Multiply-accumulates of each convolution and linear layer for one image."""
    reads: dict[str, int] = field(default_factory=dict)
    """Convolution -> how many operations read its outputs."""
    norms: dict[str, str] = field(default_factory=dict)
    """Convolution -> the batch normalization that reads its output."""
    additions: list[Addition] = field(default_factory=list)
    activated: dict[str, set[Key]] = field(default_factory=dict)
    """Module -> those of its results that an activation function other than ReLU reads."""


def _key(tensor: Tensor) -> Key:
    return id(tensor), tensor._version


def _macs(module: nn.Module, x: Tensor, out: Tensor, images: int) -> int:
    each = x if isinstance(module, nn.ConvTranspose2d) else out
    return each.numel() * module.weight[0].numel() // images  # type: ignore[operator, union-attr, index]


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.topology = Topology()
        self.images = 0
        self.convs = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        self.stack: list[str] = []
        self.producers: dict[Key, list[str]] = {}
        self.made_by: dict[Key, str] = {}
        self.alive: list[Tensor] = []  # keeps identities from being used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pair = [*args, *((kwargs or {}).get(key) for key in ('input', 'other') if key in (kwargs or {}))][:2]
        if func in _ADDITIONS and len(pair) > 1 and all(isinstance(a, Tensor) for a in pair):
            a, b = pair
            if a.shape == b.shape and a.dim() > 2 and a.is_floating_point():
                operands = tuple(self.producers.get(_key(t), [])[:] for t in (a, b))
                name = self.stack[-1] if self.stack else ''
                self.topology.additions.append(Addition(name, (tuple(operands[0]), tuple(operands[1]))))
        if getattr(func, '__name__', '').rstrip('_') in _ACTIVATIONS and pair and isinstance(pair[0], Tensor):
            for producer in self.producers.get(_key(pair[0]), [])[:1]:
                self.topology.activated.setdefault(producer, set()).add(_key(pair[0]))
        read = [self.made_by[k] for k in {_key(a) for a in args if isinstance(a, Tensor)} if k in self.made_by]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, (Tensor, tuple)):  # a size or a type is no reading
            for name in read if not isinstance(out, torch.Size) else []:
                self.topology.reads[name] = self.topology.reads.get(name, 0) + 1
        if isinstance(out, Tensor):
            self.alive.append(out)
        return out

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module]
        self.stack.append(name)
        self.topology.calls[name] = self.topology.calls.get(name, 0) + 1
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if tensors:
            self.alive.append(tensors[0])
            self.topology.inputs.setdefault(name, _key(tensors[0]))
            if isinstance(module, _NORMS):
                for producer in self.producers.get(_key(tensors[0]), [])[:1]:
                    if producer in self.convs:
                        self.topology.norms.setdefault(producer, name)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        name = self.names[module]
        self.stack.pop()
        if isinstance(out, Tensor):
            self.alive.append(out)
            self.producers.setdefault(_key(out), []).append(name)
            if name in self.convs:
                self.made_by[_key(out)] = name
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                x = (*args, *kwargs.values())[0]
                self.images = self.images or max(len(x), 1)
                self.topology.macs[name] = self.topology.macs.get(name, 0) + _macs(module, x, out, self.images)


def record(model: nn.Module, predict: Callable[[], Any]) -> Topology:
    """Run `predict` once, in evaluation mode and without gradients, and tell what feeds what in `model`.

    The model's training flags and random state are left as they were.
    """
    recorder = _Recorder(model)
    training = {module: module.training for module in model.modules()}
    handles = []
    for module in recorder.names:
        handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(), recorder:
            predict()
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    return recorder.topology
