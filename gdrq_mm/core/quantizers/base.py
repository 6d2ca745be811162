"""What every method shares: stages, saved state, calibration, the integer view that deployment reads.

A method is a subclass of WeightQuantizer, of ActivationQuantizer, or one of each, and an entry in __init__.py. It
overrides `threshold_of`, `reshape` or `quantize`; everything else here stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import functional as F
from ..errors import UserError


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


SAMPLES = 1 << 13
"""Values that a method which looks at more than mean and extremes keeps of each calibration batch (ours)."""

Check = Callable[[Any], str]
"""Checks the value of an option: returns '' or what it should have been."""


def one_of(*choices: Any) -> Check:
    """Check for an option that names a choice."""
    listed = ', '.join(repr(c) for c in choices)
    return lambda v: '' if any(type(v) is type(c) and v == c for c in choices) else f'one of {listed}'


def number(low: float, high: float, none: bool = False) -> Check:
    """Check for a number above `low` and at most `high`, or None where that stands for a default."""

    def check(value: Any) -> str:
        if none and value is None:
            return ''
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high
        return '' if good else f'a number above {low:g} and at most {high:g}' + (' or None' if none else '')

    return check


class Quantizer(nn.Module):
    """A quantizer with stage, calibration flag and code range, all saved in the checkpoint.

    A method that learns registers its Parameters in `__init__`; they are in the optimizer, times `lr_mult`.

    They are needed by Python control flow, so they are mirrored: `state` is the saved copy, (stage, calibrated, lo,
    hi, bits). Reading a tensor in `forward` would make a GPU wait.
    """

    state: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.stage = Stage.QUANTIZE
        self.calibrated = False
        self.lo, self.hi = 0, 0
        self.name = '?'
        """Name of the layer, for messages; set by convert.py."""
        self.register_buffer('state', torch.tensor([self.stage, 0, 0, 0, bits], dtype=torch.int32))

    @classmethod
    def options(cls) -> dict[str, Check]:
        """The method's own options with a check each; their defaults stand in `__init__`."""
        return {}

    bits_options: tuple[str, ...] = ()
    """Options whose value suits the bits beside it only: a layer with other bits takes their default."""
    allowed_bits: range = range(2, 9)
    """Bits that the method is made for; a first or last layer with others takes the method 'minmax'."""
    uneven = ''
    """Why integers times one step of the channel cannot express the levels; '' if they can."""
    decay_mult = 0.0
    """Weight decay of the learned Parameters, as a multiple of that of the weights."""
    lr_mult = 1.0
    """Learning rate of the learned Parameters, as a multiple of that of the weights."""

    @property
    def bits_in_use(self) -> int:
        """`bits`, or 32 if calibration did not reach the layer, so that it stayed float."""
        return 32 if self.stage == Stage.FLOAT else self.bits

    @property
    def rule(self) -> str:
        """Quantizers with the same rule and the same saved state do the same to a tensor."""
        return type(self).__name__

    def set_state(self, **values: Any) -> None:
        """Change stage, calibrated, lo or hi, and the saved copy."""
        for name, value in values.items():
            setattr(self, name, value)
        state = [int(self.stage), int(self.calibrated), self.lo, self.hi, self.bits]
        self.state.copy_(torch.tensor(state, dtype=torch.int32))

    def learn(self, x: Tensor, step: Tensor, scale: Tensor | float, inside: bool = True) -> Tensor:
        """Fake quantization whose step learns, see functional.learned_step_quantize.

        With frozen thresholds the gradient is 0, and not missing: DistributedDataParallel waits for all of them.
        """
        if self.stage == Stage.FREEZE:
            step, scale = step + 0 * sum(p.sum() for p in self.parameters()), 0.0
        return F.learned_step_quantize(x, step, self.lo, self.hi, scale, inside)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        known = len(args[2])  # local_metadata, strict, missing_keys, ...
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + 'state' not in state_dict:  # a float checkpoint: thresholds start from calibration
            del args[2][known:]
        else:
            stage, calibrated, lo, hi, _ = self.state.tolist()
            self.set_state(stage=Stage(stage), calibrated=bool(calibrated), lo=lo, hi=hi)


class WeightQuantizer(Quantizer):
    """Quantizes filters in groups; signed codes.

    Args:
        bits: 2 to 8.
        channels: C_out, the number of filters.
        groups: thresholds; a number of contiguous groups (at most C_out are used), or 'channel'; None: the method's
            `default_groups`.
        narrow_range: leave out the code -2^(n-1).
    """

    threshold: Tensor
    sizes: Tensor

    default_groups: int | str = 1
    """Groups where the config names none: those of the paper."""
    by_place = False
    """Whether `__init__` takes the size of the kernel, `kernel`."""

    def __init__(self, bits: int, channels: int, groups: int | str | None = None, narrow_range: bool = True) -> None:
        super().__init__(bits)
        groups = self.default_groups if groups is None else groups
        count = channels if groups == 'channel' else min(int(groups), channels)
        self.set_state(lo=F.code_range(bits, True, narrow_range)[0], hi=F.code_range(bits, True)[1])
        self.register_buffer('sizes', torch.tensor(F.group_sizes(channels, count)), persistent=False)
        self.register_buffer('threshold', torch.zeros(count))

    @property
    def groups(self) -> int:
        """Number of thresholds."""
        return len(self.sizes)

    def threshold_of(self, weight: Tensor) -> Tensor:
        """T of each group for these filters: (C, ...) gives (G,). Not called when thresholds are frozen."""
        raise NotImplementedError

    def reshape(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """The reshape stage: the weight in float, clipped or not."""
        return weight

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with a step that broadcasts against the weight."""
        return F.fake_quantize(weight, step, self.lo, self.hi)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        """Codes of a weight, as floats: the nearest ones, in [lo, hi]."""
        return (weight / torch.where(step > 0, step, 1)).round().clamp(self.lo, self.hi)

    def calibrate(self, weight: Tensor) -> None:
        """Set what must be known before training, from the loaded weight."""
        self.threshold.copy_(self.threshold_of(weight).detach())  # a first training forward is not under no_grad
        self.set_state(calibrated=True)

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        """Called once after optimizer step `step`, before EMA. Returns the filters to store, or None to keep them."""
        return None

    def current_threshold(self, weight: Tensor) -> Tensor:
        """T of each group, (G,), as `forward` uses it now."""
        return self.threshold if self.stage == Stage.FREEZE else self.threshold_of(weight)

    def step(self, weight: Tensor) -> Tensor:
        """Step of each filter, shaped to broadcast against the weight: (C, 1, ...)."""
        step = F.step_size(self.current_threshold(weight), self.lo, self.hi)
        return F.per_channel(step, self.sizes, weight.dim())

    def codes(self, weight: Tensor) -> Tensor:
        """Integer weights, (C, ...) int8: `codes * step` is what `forward` returns, unless the method is `uneven`."""
        return self.round(weight, self.step(weight)).to(torch.int8)

    def forward(self, weight: Tensor) -> Tensor:
        """Filters (C, ...) to filters of the same shape."""
        if self.stage in (Stage.OBSERVE, Stage.FLOAT):
            return weight
        if not self.calibrated:
            if not self.training:
                raise UserError(_uncalibrated(self.name))
            self.calibrate(weight.detach())
        with torch.autocast(weight.device.type, enabled=False):
            if self.stage == Stage.RESHAPE:
                return self.reshape(weight, F.per_channel(self.threshold_of(weight), self.sizes, weight.dim()))
            return self.quantize(weight, self.step(weight))

    def extra_repr(self) -> str:
        return f'bits={self.bits}, groups={self.groups}'


class ActivationQuantizer(Quantizer):
    """Quantizes one tensor with one threshold.

    Args:
        bits: 2 to 8.
        range: 'unsigned', 'signed', 'zero_point', or 'auto' to decide once, from calibration.
    """

    threshold: Tensor

    def __init__(self, bits: int, range: str = 'auto') -> None:
        super().__init__(bits)
        self.range = range
        self.register_buffer('threshold', torch.zeros(()))
        self._observed: list[Tensor] = []
        self.samples: Tensor | None = None
        """With `keeps_samples`: evenly spaced values of the calibration batches, (N,), while it lasts."""

    keeps_samples = False
    """Whether `start_threshold` reads `samples`."""

    def start_threshold(self, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """T from calibration: mean(|x|), min(x, 0) and max(x, 0), scalars; by default the largest |x|."""
        return torch.maximum(-low, high)

    def search_start(self, low: Tensor, high: Tensor, candidates: int = 64) -> Tensor:
        """The T of least squared error on `samples`, of evenly spaced ones up to the largest |x| (grid: ours)."""
        assert self.samples is not None
        x, kind, top = self.samples.double(), self.kind, float(torch.maximum(-low, high))
        best = torch.inf, top
        for threshold in (top * i / candidates for i in range(candidates, 0, -1)):
            zero_point = zero_point_of(threshold, float(low), self.bits) if kind == 'zero_point' else 0
            lo, hi = F.code_range(self.bits, kind == 'signed', zero_point=zero_point)
            step = F.step_size(x.new_tensor(threshold), lo, hi)
            best = min(best, (float((F.fake_quantize(x, step, lo, hi) - x).square().sum()), threshold))
        return high.new_tensor(best[1])

    def reshape(self, x: Tensor, threshold: Tensor) -> Tensor:
        """The reshape stage: the input in float, clipped or not."""
        return x

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with a scalar step."""
        return F.fake_quantize(x, step, self.lo, self.hi)

    follows = False
    """Whether T follows the inputs, see FollowingQuantizer."""

    def track(self, x: Tensor) -> None:
        """Collect what moves the threshold; called with every training input while thresholds follow."""

    def current_threshold(self) -> Tensor:
        """T as `forward` uses it now; a method that learns it overrides this. Not called when thresholds are frozen."""
        return self.threshold

    def freeze(self) -> None:
        """Keep the threshold of this moment."""
        self.threshold.copy_(self.current_threshold().detach())

    def step(self) -> Tensor:
        """The step d, a scalar."""
        threshold = self.threshold if self.stage == Stage.FREEZE else self.current_threshold()
        return F.step_size(threshold, self.lo, self.hi)

    @property
    def kind(self) -> str:
        """'unsigned', 'signed' or 'zero_point', as the range of the codes says; meaningless before calibration."""
        if self.lo == 0:
            return 'unsigned'
        return 'signed' if -self.lo >= self.hi else 'zero_point'

    def observe(self, x: Tensor) -> None:
        """Collect statistics of a calibration batch: sum|x|, count, count of non-zeros, -min, max."""
        x = x.detach().float()
        low, high = torch.aminmax(x)
        count = torch.tensor(float(x.numel()), device=x.device)
        self._observed.append(torch.stack([x.abs().sum(), count, torch.count_nonzero(x).float(), -low, high]).double())
        if self.keeps_samples:
            few = x.flatten()[:: math.ceil(x.numel() / SAMPLES)].clone()  # the model may go on in place
            self.samples = few if self.samples is None else torch.cat([self.samples, few])

    def observed(self) -> Tensor:
        """(5,) float64 summary of the calibration so far; count 0 if nothing came through."""
        if not self._observed:
            return torch.tensor([0, 0, 0, -torch.inf, -torch.inf], dtype=torch.float64, device=self.threshold.device)
        rows = torch.stack(self._observed)
        return torch.cat([rows[:, :3].sum(0), rows[:, 3:].amax(0)])

    def calibrate(self, observed: Tensor) -> None:
        """Decide the range and start the threshold from a summary like `observed`, the same on every rank."""
        self._observed = []
        total, count, nonzero, negative, high = observed.tolist()
        if count == 0:
            return
        mean = total / max(nonzero if self.mean_of == 'nonzero' else count, 1)
        kind = self.range if self.range != 'auto' else decide_range(-negative, high)
        self.set_range(kind)
        low, high = min(-negative, 0.0), max(high, 0.0)
        start = self.start_threshold(*(self.threshold.new_tensor(v) for v in (mean, low, high)))
        if not self.follows and not start > 0:  # zeros only, such as a residual branch at first: 0 would stay for good
            start = torch.ones_like(start)
        if kind == 'zero_point':
            self.set_range(kind, zero_point_of(float(start), low, self.bits))
        self.threshold.copy_(start)
        self.set_state(calibrated=True)
        self.samples = None

    mean_of = 'all'
    """Whether mean(|x|) is over 'all' elements or the 'nonzero' ones; a method may make it an option."""

    def set_range(self, kind: str, zero_point: int = 1) -> None:
        """Fix the smallest and largest code."""
        zero_point = zero_point if kind == 'zero_point' else 0
        lo, hi = F.code_range(self.bits, kind == 'signed', zero_point=zero_point)
        self.set_state(lo=lo, hi=hi)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape; an empty tensor passes."""
        if x.numel() == 0 or self.stage == Stage.FLOAT:
            return x
        if self.stage == Stage.OBSERVE:
            self.observe(x)
            return x
        if not self.calibrated:
            if not self.training:
                raise UserError(_uncalibrated(self.name))
            self.observe(x)
            self.calibrate(self.observed())
        if self.training and self.stage != Stage.FREEZE and torch._C._current_graph_task_id() == -1:
            self.track(x.detach())  # a graph task is a backward pass, where a checkpointed segment runs a second time
        with torch.autocast(x.device.type, enabled=False):
            if self.stage == Stage.RESHAPE:
                return self.reshape(x, self.threshold)
            return self.quantize(x, self.step())

    def extra_repr(self) -> str:
        return f'bits={self.bits}, range={self.range}'


def learned_parameters(model: nn.Module) -> dict[str, Quantizer]:
    """Name of each Parameter that a model's quantizers learn -> its quantizer; the float model has none of them."""
    return {
        f'{name}.{key}': module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer)
        for key, _ in module.named_parameters(recurse=False)
    }


def nonzero_start(start: Tensor, weight: Tensor) -> Tensor:
    """Where thresholds start; those of groups of zeros at 1 / sqrt(n), as layers do: one of 0 never learns (ours)."""
    return torch.where(start > 0, start, weight[0].numel() ** -0.5)


def decide_range(low: float, high: float) -> str:
    """The range of a tensor with these extremes (rule: ours).

    No negative value: 'unsigned' (ReLU). Zeros only: 'signed' (a residual branch that starts at zero).
    A short negative tail, at least -0.3 and at most half of the maximum:
    'zero_point' (SiLU ends at -0.278, GELU at -0.170). Otherwise 'signed'.
    """
    if low >= 0:
        return 'unsigned' if high > 0 else 'signed'
    return 'zero_point' if low >= -0.3 and -low <= high / 2 else 'signed'


def zero_point_of(threshold: float, low: float, bits: int) -> int:
    """Zero point z of an unsigned range that reaches from about `low` to T: at least 1, at most half the codes."""
    levels, low = 2**bits - 1, min(low, 0.0)
    if threshold <= 0:
        return 1
    return min(max(round(levels * -low / (threshold - low)), 1), levels // 2)


def _uncalibrated(name: str) -> str:
    layer = 'a layer' if name == '?' else f'layer {name}'  # one that a hand-written model has built itself
    return (
        f'{layer} has no threshold yet: train it first, or load a checkpoint of the quantized model '
        '(a float checkpoint holds no thresholds)'
    )
