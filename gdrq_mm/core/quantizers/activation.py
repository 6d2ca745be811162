"""The base class of activation quantizers: calibration, the range of the codes, one threshold a tensor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from ..compat import after_state_dict
from ..errors import UserError
from ..kernels import Uniform, fake_quantize
from ..ranks import world_size
from .base import Quantizer, Stage, in_backward, layer_called, uncalibrated

SAMPLES = 1 << 13
"""Values that a method which looks at more than mean and extremes keeps of each calibration batch (ours)."""


class Statistics(NamedTuple):
    """What calibration saw of a tensor: mean(|x|), also without zeros, min(x, 0) and max(x, 0), scalars."""

    mean: Tensor
    nonzero_mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """max|x|."""
        return torch.maximum(-self.low, self.high)


class ActivationQuantizer(Quantizer):
    """Quantizes one tensor with one threshold.

    Args:
        bits: 2 to 8.
        range: 'unsigned', 'signed', 'zero_point', or 'auto' to decide once, from calibration.
        options: the method's own.
    """

    keeps_samples = False
    """Whether `start_threshold` reads `samples`."""
    follows = False
    """Whether T follows the inputs, see FollowingQuantizer."""

    def __init__(self, bits: int, range: str = 'auto', **options: Any) -> None:
        super().__init__(bits, **options)
        self.range = range
        self.register_buffer('threshold', torch.zeros(()))
        self._observed: list[Tensor] = []
        self.samples: Tensor | None = None
        """With `keeps_samples`: evenly spaced values of the calibration batches, (N,), while it lasts."""
        after_state_dict(self, _settle)

    def observe(self, x: Tensor) -> None:
        """Collect statistics of a calibration batch: sum|x|, count, count of non-zeros, -min, max."""
        x = x.detach().float()
        low, high = torch.aminmax(x)
        counts = torch.tensor(x.numel(), device=x.device), (x != 0).sum()
        self._observed.append(torch.stack([v.double() for v in (F.sum_abs(x), *counts, -low, high)]))
        if self.keeps_samples:
            few = x.flatten()[:: math.ceil(x.numel() / SAMPLES)].clone()  # the model may go on in place
            self.samples = few if self.samples is None else torch.cat([self.samples, few])

    def forget(self) -> None:
        """Start the calibration anew."""
        self._observed, self.samples = [], None

    def observed(self) -> Tensor:
        """(5,) float64 summary of the calibration so far; count 0 if nothing came through."""
        if not self._observed:
            return torch.tensor([0, 0, 0, -torch.inf, -torch.inf], dtype=torch.float64, device=self.threshold.device)
        rows = torch.stack(self._observed)
        return torch.cat([rows[:, :3].sum(0), rows[:, 3:].amax(0)])

    def start(self, observed: Tensor) -> None:
        """Decide the range and start the threshold from a summary like `observed`, the same on every rank."""
        self._observed = []
        total, count, nonzero, negative, high = observed.tolist()
        if count == 0:
            return
        if not math.isfinite(total):
            raise UserError(f'{layer_called(self.name)} has inputs in calibration that are not finite')
        means, low = (total / count, total / max(nonzero, 1)), min(-negative, 0.0)
        seen = Statistics(*(self.threshold.new_tensor(v) for v in (*means, low, max(high, 0.0))))
        self.set_range(F.decide_range(-negative, high, means[1]) if self.range == 'auto' else self.range)
        start = self.start_threshold(seen)
        if self.kind == 'zero_point':
            # T may depend on hi, hence on the zero point, which depends on T: the first one that fits its own T
            while (zero_point := F.zero_point_of(float(self.in_use(start)), low, self.bits)) > -self.lo:
                self.set_range('zero_point', zero_point)
                start = self.start_threshold(seen)
        if not self.follows and not start > 0:  # zeros only, such as a residual branch at first: 0 would stay for good
            start = torch.ones_like(start)
        self.threshold.copy_(start.clamp(max=F.LARGEST))
        self.set_state(calibrated=True)
        self.samples = None

    def start_threshold(self, seen: Statistics) -> Tensor:
        """T from calibration, for the codes lo to hi; by default the largest |x|."""
        return seen.largest

    def set_range(self, kind: str, zero_point: int = 1) -> None:
        """Fix the smallest and largest code."""
        zero_point = zero_point if kind == 'zero_point' else 0
        lo, hi = F.code_range(self.bits, kind == 'signed', zero_point=zero_point)
        self.set_state(lo=lo, hi=hi)

    @property
    def kind(self) -> str:
        """'unsigned', 'signed' or 'zero_point', as the range of the codes says; meaningless before calibration."""
        if self.lo == 0:
            return 'unsigned'
        return 'signed' if -self.lo >= self.hi else 'zero_point'

    def current_threshold(self) -> Tensor:
        """T now, a scalar; by default it stays. Not called when thresholds are frozen."""
        return self.threshold

    def step(self) -> Tensor:
        """The step d, a scalar."""
        return F.step_size(self.threshold_in_use(), self.lo, self.hi)

    def threshold_in_use(self) -> Tensor:
        """T, a scalar."""
        return self.in_use(self.threshold if self.stage == Stage.FREEZE else self.current_threshold())

    def quantize(self, x: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with a scalar step."""
        return fake_quantize(x, Uniform(step, self.lo, self.hi, self.masked))

    def uniform(self) -> Uniform | None:
        """What a kernel needs to quantize the input, and measure it in the same pass; None: `track` and `quantize`."""
        if self.follows or type(self).quantize is not ActivationQuantizer.quantize:
            return None
        return Uniform(self.threshold_in_use(), self.lo, self.hi, self.masked, top=max(-self.lo, self.hi))

    def reshape(self, x: Tensor, threshold: Tensor) -> Tensor:
        """The reshape stage: the input in float, clipped or not."""
        return x

    def tracks(self) -> bool:
        """Whether the threshold follows this input; not in a backward pass, which runs a checkpointed segment again."""
        return self.follows and self.trains and self.stage != Stage.FREEZE and not in_backward()

    def track(self, x: Tensor) -> None:
        """Collect what moves the threshold; called with every training input that it follows."""

    def after_step(self, step: int) -> None:
        """Called once after optimizer step `step`, before EMA, under no_grad."""

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Any shape to the same shape; an empty tensor passes. `overwrite`: nobody else will read x."""
        if x.numel() == 0 or self.stage == Stage.FLOAT:
            return self.unused(x)
        if self.stage == Stage.OBSERVE:
            self.observe(x)
            return x
        if not self.calibrated:
            self.begin(x)
        with torch.autocast(x.device.type, enabled=False):
            how = None if self.stage == Stage.RESHAPE else self.uniform()
            if how is not None:
                return fake_quantize(x, how, overwrite)
            if self.tracks():
                self.track(x.detach())
            if self.stage == Stage.RESHAPE:
                return self.unused(self.reshape(x, self.threshold))
            return self.quantize(x, self.step())

    def begin(self, x: Tensor) -> None:
        """Start from a first training batch what was not calibrated."""
        if not self.trains:
            raise UserError(uncalibrated(self.name))
        if world_size() > 1:
            who = layer_called(self.name)
            raise UserError(f'{who} is not calibrated: each process would start its own threshold')
        self.observe(x)
        self.start(self.observed())

    def extra_repr(self) -> str:
        return f'bits={self.bits}, range={self.range}'


def _settle(quantizer: ActivationQuantizer, *_: Any) -> None:
    """A hook of state_dict(), whose tensors share their memory with the buffers.

    The integers come from the attributes: an average of buffers, as torch's AveragedModel makes it, cuts them down.
    """
    quantizer.settle()
    quantizer.set_state()
