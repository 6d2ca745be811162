"""What the quantizers of weights and of activations share: stages, options, saved state.

A method is a subclass of WeightQuantizer (weight.py), of ActivationQuantizer (activation.py), or one of each, in a file
of its own. Both sides have the same verbs; weights are given the filters, (C_out, ...), activations nothing.

    start          begin with thresholds from the loaded weight, or from calibration
    step           the step d in use
    quantize       values and a step -> fake-quantized values
    freeze         keep the thresholds of this moment

A method overrides `start_threshold` (T before training), `current_threshold` (T now), `quantize` (levels and gradient),
and where it needs them `round` (codes of weights), `reshape` and `after_step`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..compat import is_compiling
from .fixed_point import fixed_point


class Stage(IntEnum):
    """What a quantizer does (docs/method.md, section 5). The stage hook moves all quantizers of a model together."""

    OBSERVE = 0
    """Calibration: pass values through unchanged, collect statistics."""
    RESHAPE = 1
    """Scale-Clip in float, no rounding."""
    QUANTIZE = 2
    """Round; thresholds follow."""
    FREEZE = 3
    """Round; thresholds and BN statistics stand still."""
    FLOAT = 4
    """Pass values through for good: calibration did not reach the layer."""


OF_BITS = dict(of_bits=True)
"""Metadata of an option whose value suits the bits beside it only: a layer with other bits takes its default."""


class ModeOfModel:
    """What goes by whether the model is in training, not by the mode of a module around it.

    Some models set parts of themselves to evaluation mode while they train: `norm_eval` the BN, `frozen_stages` whole
    stages. What quantizers below them do depends on the stage of training alone.
    """

    root: tuple[nn.Module, ...] = ()
    """The model, set by convert.py; in a tuple, else torch would register it as a child. A layer that a hand-written
    model has built itself has none, and goes by its own mode."""

    training: bool

    @property
    def trains(self) -> bool:
        """Whether the model is in training."""
        return self.root[0].training if self.root else self.training

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy belongs to the copy of the model; if the model is not copied as a whole, it has no model."""
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        root = self.__dict__.get('root', ())
        state = {name: value for name, value in self.__dict__.items() if name != 'root'}
        new.__dict__.update(copy.deepcopy(state, memo))
        if root and id(root[0]) in memo:
            new.root = (memo[id(root[0])],)
        return new


class Quantizer(ModeOfModel, nn.Module):
    """A quantizer with stage, calibration flag and code range, all saved in the checkpoint.

    A method that learns registers its Parameters in `__init__`; they are in the optimizer.
    Python control flow needs stage, flag and range, and reading a tensor in `forward` would make a GPU wait; so they
    are attributes, and the buffer `state` (stage, calibrated, lo, hi, bits) is their saved copy.
    """

    allowed_bits: range = range(2, 9)
    """Bits that the method is made for; a first or last layer with others takes the method 'minmax'."""
    uneven: str | None = None
    """Why integers times one step of the channel cannot express the levels; None: they can."""

    pending: Tensor | None = None
    """What was collected since the last optimizer step; a checkpoint in between keeps it beside the state dict."""
    frozen_at: Sequence[Tensor] = ()
    """What was learned when thresholds were frozen."""
    steps_up: bool = False
    """Whether `power_of_two` takes the next larger step, where nothing may be clipped; else the nearest."""

    state: Tensor
    threshold: Tensor
    """T in use: up to date whenever it is saved, and what is used while thresholds are frozen."""
    current_threshold: Callable[..., Tensor]
    options: Any

    @dataclass(frozen=True)
    class Options:
        """The method's own options: names, types, bounds and defaults; a method has a class of its own.

        What the base classes know by name: `narrow_range` of weights, `power_of_two`, see `in_use`, and `lr_mult` and
        `decay_mult`, the learning rate and the weight decay of what is learned, as multiples of those of the weights
        (1 and 0 without them).
        """

    def __init__(self, bits: int, **options: Any) -> None:
        super().__init__()
        self.bits, self.options = bits, self.Options(**options)
        self.stage = Stage.QUANTIZE
        self.calibrated = False
        self.lo, self.hi = 0, 0
        self.name = '?'
        """Name of the layer, for messages; set by convert.py."""
        self.register_buffer('state', torch.tensor([self.stage, 0, 0, 0, bits], dtype=torch.int32))

    @classmethod
    def check_options(cls, bits: int, options: Mapping[str, Any], path: str) -> None:
        """Raise UserError, with the path of the options, if they do not fit together or the bits."""

    @property
    def lr_mult(self) -> float:
        """Learning rate of the learned Parameters, as a multiple of that of the weights."""
        return getattr(self.options, 'lr_mult', 1.0)

    @property
    def decay_mult(self) -> float:
        """Weight decay of the learned Parameters, as a multiple of that of the weights."""
        return getattr(self.options, 'decay_mult', 0.0)

    def rounds(self) -> bool:
        """Whether values are rounded now."""
        return self.calibrated and self.stage in (Stage.QUANTIZE, Stage.FREEZE)

    @property
    def masked(self) -> bool:
        """Whether a clipped value has gradient 0; else 1."""
        return getattr(self.options, 'gradient', 'masked') == 'masked'

    @property
    def gradient(self) -> str:
        """Of a clipped value, as functions name it."""
        return 'masked' if self.masked else 'straight_through'

    def in_use(self, threshold: Tensor) -> Tensor:
        """T as it is used: with the option `power_of_two` another one."""
        return fixed_point(self, threshold)

    @property
    def bits_in_use(self) -> int:
        """`bits`, or 32 if calibration did not reach the layer, so that it stayed float."""
        return 32 if self.stage == Stage.FLOAT else self.bits

    def set_state(self, **values: Any) -> None:
        """Change stage, calibrated, lo or hi, and the saved copy."""
        for name, value in values.items():
            setattr(self, name, value)
        state = [int(self.stage), int(self.calibrated), self.lo, self.hi, self.bits]
        self.state.copy_(torch.tensor(state, dtype=torch.int32))

    @torch.no_grad()
    def settle(self, *weight: Tensor) -> None:
        """Bring the saved state up to date with what moved: before saving and before freezing."""
        if self.calibrated and self.stage != Stage.FREEZE:
            self.threshold.copy_(self.current_threshold(*weight))

    def freeze(self, *weight: Tensor) -> None:
        """Keep the thresholds of this moment, and what is learned."""
        self.settle(*weight)
        self.set_state(stage=Stage.FREEZE)
        self.frozen_at = [parameter.detach().clone() for parameter in self.parameters(recurse=False)]

    def hold(self) -> None:
        """Undo what momentum and weight decay did to what is learned, while thresholds are frozen."""
        for parameter, value in zip(self.parameters(recurse=False), self.frozen_at):
            parameter.data.copy_(value)

    def unused(self, x: Tensor) -> Tensor:
        """x itself, where a stage does not use what this quantizer learns: with a gradient of 0 for that.

        A gradient must not be missing: DistributedDataParallel waits for all of them.
        """
        learned = [p.sum() for p in self.parameters() if p.requires_grad] if self.trains else []
        return x + (0 * sum(learned)).to(x.dtype) if learned else x  # type: ignore[union-attr]

    def learn(self, x: Tensor, step: Tensor, scale: Tensor | float, inside: bool = True) -> Tensor:
        """Fake quantization whose step learns, see functional.learned_step_quantize.

        With frozen thresholds the gradient is 0, and not missing: DistributedDataParallel waits for all of them.
        """
        if self.stage == Stage.FREEZE:
            step, scale = step + 0 * sum(p.sum() for p in self.parameters()), 0.0
        return F.learned_step_quantize(x, step, self.lo, self.hi, scale, inside)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`.half()` and `.bfloat16()` of the model leave thresholds in float32: a running mean moves by a hundredth."""

        def kept(x: Tensor) -> Tensor:
            found = fn(x)
            narrower = x.is_floating_point() and found.dtype in (torch.float16, torch.bfloat16)
            return x.to(found.device) if narrower else found

        return super()._apply(kept, recurse)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *others: list[str]
    ) -> None:
        known = len(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        if prefix + 'state' not in state_dict:  # a float checkpoint: thresholds start from calibration
            del missing[known:]
        else:
            stage, calibrated, lo, hi, bits = self.state.tolist()
            if bits == self.bits:
                self.set_state(stage=Stage(stage), calibrated=bool(calibrated), lo=lo, hi=hi)
                if stage == Stage.FREEZE:
                    self.freeze()
            else:
                others[-1].append(f'{prefix[:-1]} has {bits} bits in the checkpoint, and {self.bits} in the model.')
                self.set_state()


def in_backward() -> bool:
    """Whether a backward pass runs, in which activation checkpointing computes the forward again; not while traced."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1


def learned_parameters(model: nn.Module) -> dict[str, Quantizer]:
    """Name of each Parameter that a model's quantizers learn -> its quantizer; the float model has none of them."""
    return {
        f'{name}.{key}': module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for key, _ in module.named_parameters(recurse=False)
    }


def layer_called(name: str) -> str:
    """A layer in a message."""
    return 'a layer' if name == '?' else f'layer {name}'  # one that a hand-written model has built itself


def uncalibrated(name: str) -> str:
    """The message of a quantizer that is used before it has a threshold."""
    return (
        f'{layer_called(name)} has no threshold yet: calibrate or train the model first, or load a checkpoint of the '
        'quantized model (a float checkpoint holds no thresholds)'
    )
