"""What quantization does to a tensor: the one measure of analysis, training statistics and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import functional as F
from ..core.quantizers import ActivationQuantizer

ROUNDING = 1e-6
"""A value outside the range by less than this share of its end is not clipped: T / d * d need not be T in float32."""


@dataclass(frozen=True)
class Damage:
    """What quantization does to one tensor."""

    bits: int
    sqnr: float
    """Signal-to-quantization-noise ratio sum(x^2) / sum((x - Q(x))^2) in dB; inf if Q changes nothing."""
    clip_ratio: float
    """Share of the values outside the range of the codes."""
    quantized_loss: float
    """sum|x - Q(x)| / sum|x|: the paper's Eq. 3 with p = 1."""
    distance_to_uniform: float
    """Kolmogorov-Smirnov distance of |x| / max|x| to the uniform distribution, see functional.distance_to_uniform."""


class Meter:
    """Adds up what quantization does to a tensor over several calls, such as the input of a layer over test batches.

    Args:
        keep: how many values of each call are kept for the distance to uniform.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._count, self._clipped = 0, 0
        self._sums = np.zeros(4)  # of x^2, (x - Q)^2, |x|, |x - Q|
        self._kept: list[Tensor] = []
        self._top = 0.0

    def add(self, x: Tensor, quantized: Tensor, low: Tensor, high: Tensor) -> None:
        """One call: `x` and `quantized` have one shape, the ends of the range broadcast against it."""
        if not x.numel():
            return
        x = x.detach().float()
        error = x - quantized.detach().float()
        margin = ROUNDING * torch.maximum(-low, high)
        self._clipped += int(((x > high + margin) | (x < low - margin)).sum())
        self._count += x.numel()
        sums = [v.sum(dtype=torch.float64) for v in (x.square(), error.square(), x.abs(), error.abs())]
        self._sums += torch.stack(sums).cpu().numpy()
        self._top = max(self._top, float(x.abs().amax()))
        spacing = max(1, x.numel() // self.keep) | 1  # odd, else it may hit the same pixel of every channel
        self._kept.append(x.flatten()[::spacing].clone())

    def result(self, bits: int) -> Damage | None:
        """The damage over all calls; None if there were no values."""
        if not self._count:
            return None
        signal, noise, size, error = self._sums
        with np.errstate(divide='ignore', invalid='ignore'):  # nothing but noise, or values that are infinite
            sqnr = float(10 * (np.log10(signal) - np.log10(noise))) if noise else float('inf')
        values = torch.cat(self._kept)
        if float(values.abs().amax()) < self._top:  # the distance is measured in shares of the largest value
            values = torch.cat([values, values.new_tensor([self._top])])
        return Damage(
            bits=bits,
            sqnr=sqnr,
            clip_ratio=self._clipped / self._count,
            quantized_loss=float(error / size) if size else 0.0,
            distance_to_uniform=float(F.distance_to_uniform(values)),
        )


def measure(x: Tensor, quantized: Tensor, low: Tensor, high: Tensor, bits: int) -> Damage | None:
    """The damage to one tensor, all of whose values count; arguments as in :meth:`Meter.add`. None if it is empty."""
    meter = Meter(keep=x.numel())
    meter.add(x, quantized, low, high)
    return meter.result(bits)


@torch.no_grad()
def quantized_weight(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters (C, ...), what they are quantized to, and the ends of the range, which broadcast against them."""
    weight, quant = layer.filters().detach(), layer.weight_quant
    step = quant.step(weight)
    beyond = quant.apart - 1  # in the cell of an outer level nothing is clipped
    return weight, quant.quantize(weight, step), (quant.lo - beyond) * step, (quant.hi + beyond) * step


def watch(quantizer: ActivationQuantizer, meter: Meter) -> Any:
    """Add every input of a quantizer, with what it is quantized to, to a meter; returns the handle of the hook."""

    def see(module: Any, args: Any, out: Tensor) -> None:
        step = module.step()
        meter.add(args[0], out, module.lo * step, module.hi * step)

    return quantizer.register_forward_hook(see)
