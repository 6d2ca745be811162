"""The base class of weight quantizers: groups of filters with a threshold each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..compat import is_compiling
from ..errors import UserError
from ..kernels import Codes, Uniform, fake_quantize, nearest_codes, restored
from .base import Quantizer, Stage, uncalibrated


class WeightQuantizer(Quantizer):
    """Quantizes filters in groups; signed codes.

    Args:
        bits: 2 to 8.
        shape: of the filters, (C_out, ...).
        groups: thresholds; a number of contiguous groups (at most C_out are used), or 'channel'; None: the method's
            `default_groups`.
        options: the method's own.
    """

    default_groups: int | str = 1
    """Groups where the config names none: those of the paper."""

    keeps: bool = True
    """Whether a weight that is a code times the step has this code."""

    progress: float | None = None
    """Fraction of the training that is done, told before each `after_step`; None where nobody tells it."""
    sizes: Tensor
    """Number of filters in each group, (G,)."""

    def __init__(self, bits: int, shape: Sequence[int], groups: int | str | None = None, **options: Any) -> None:
        super().__init__(bits, **options)
        self.shape = tuple(shape)
        self.prepared: tuple[Any, Codes] | None = None
        """The filters as prepare.py has quantized them for this forward of the model, see `codes_in_use`, behind what
        `version_of` said of them."""
        groups = self.default_groups if groups is None else groups
        count = shape[0] if groups == 'channel' else min(int(groups), shape[0])
        lo, hi = self.code_range()
        self.set_state(lo=lo, hi=hi)
        self.register_buffer('sizes', torch.tensor(F.group_sizes(shape[0], count)), persistent=False)
        self.register_buffer('threshold', torch.zeros(count))

    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code; an option `narrow_range=False` adds -2^(n-1)."""
        return F.code_range(self.bits, True, getattr(self.options, 'narrow_range', True))

    @property
    def apart(self) -> int:
        """How far two neighbouring codes are apart: 1, or 2 where the codes are odd, so that 0 is no level."""
        return 2 if self.hi >= 2 ** (self.bits - 1) else 1

    @property
    def groups(self) -> int:
        """Number of thresholds."""
        return len(self.sizes)

    @property
    def scale_count(self) -> int:
        """Number of float32 scales that its levels take in a file."""
        return self.threshold.numel()

    def start(self, weight: Tensor) -> None:
        """Set what must be known before training, from the loaded weight."""
        self.threshold.copy_(self.start_threshold(weight).detach())  # a first training forward is not under no_grad
        self.set_state(calibrated=True)

    def start_threshold(self, weight: Tensor) -> Tensor:
        """T of each group before training: (C, ...) gives (G,)."""
        return self.current_threshold(weight)

    def current_threshold(self, weight: Tensor) -> Tensor:
        """T of each group now, (C, ...) gives (G,); by default it stays. Not called when thresholds are frozen."""
        return self.threshold

    def step(self, weight: Tensor) -> Tensor:
        """Step of each filter, shaped to broadcast against the weight: (C, 1, ...)."""
        threshold = self.threshold if self.stage == Stage.FREEZE else self.current_threshold(weight)
        return self.spread(F.step_size(self.in_use(threshold), self.lo, self.hi))

    def spread(self, values: Tensor) -> Tensor:
        """A value of each group, (G,), shaped to broadcast against the weight: (C, 1, ...)."""
        return F.per_channel(values, self.sizes, self.shape)

    def quantize(self, weight: Tensor, step: Tensor) -> Tensor:
        """Fake quantization with a step that broadcasts against the weight."""
        return fake_quantize(weight, self.uniform(step))

    def codes_in_use(self, weight: Tensor) -> Codes | None:
        """The filters as they are quantized already, in a forward of the model that has not changed them. None
        elsewhere, and where torch.compile traces: there they would be constants."""
        runs = any(getattr(model, 'in_forward', False) for model in self.root)
        prepared = self.prepared  # read once: the forward of another thread may end meanwhile
        if prepared is None or not runs or is_compiling():
            return None
        version, codes = prepared
        return codes if version == version_of(weight) else None

    def is_uniform(self) -> bool:
        """Whether the filters are rounded now, and as in :meth:`quantize` of this class."""
        return self.rounds() and type(self).quantize is WeightQuantizer.quantize

    def factor_of_mean(self) -> float | None:
        """k, if the threshold is k * mean(|w|) of the group now, see prepare.py; None: it is another."""
        return None

    def uniform(self, step: Tensor) -> Uniform:
        """What a kernel needs to quantize the filters with this step."""
        return Uniform(step, self.lo, self.hi, self.masked, apart=self.apart)

    def round(self, weight: Tensor, step: Tensor) -> Tensor:
        """Codes of a weight, as floats: the nearest ones, in [lo, hi]."""
        return nearest_codes(weight, step, self.lo, self.hi, self.apart)

    def reshape(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """The reshape stage: the weight in float, clipped or not."""
        return weight

    def after_step(self, weight: Tensor, step: int) -> Tensor | None:
        """Called once after optimizer step `step`, before EMA. Returns the filters to store, or None to keep them."""
        return None

    def codes(self, weight: Tensor) -> Tensor:
        """Integer weights, (C, ...) int8: `codes * step` is what `forward` returns, unless the method is `uneven`."""
        return self.round(weight, self.step(weight)).to(torch.int8)

    def forward(self, weight: Tensor) -> Tensor:
        """Filters (C, ...) to filters of the same shape."""
        if self.stage in (Stage.OBSERVE, Stage.FLOAT):
            return weight if self.stage == Stage.OBSERVE else self.unused(weight)
        if not self.calibrated:
            self.begin(weight)
        codes = None if torch.is_grad_enabled() else self.codes_in_use(weight)
        if codes is not None:
            return restored(codes)
        with torch.autocast(weight.device.type, enabled=False):
            if self.stage == Stage.RESHAPE:
                return self.unused(self.reshape(weight, self.spread(self.in_use(self.current_threshold(weight)))))
            return self.quantize(weight, self.step(weight)).to(weight.dtype)  # thresholds are float32

    def begin(self, weight: Tensor) -> None:
        """Start in a first training forward what was not calibrated."""
        if not self.trains:
            raise UserError(uncalibrated(self.name))
        self.start(weight.detach())

    def extra_repr(self) -> str:
        return f'bits={self.bits}, groups={self.groups}'


def version_of(weight: Tensor) -> tuple[int, int]:
    """Another one after each change of a tensor that torch knows of: not after one in place of its `.data`."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version
