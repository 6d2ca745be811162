"""What quantization does to a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import functional as F
from ..core.quantizers import ActivationQuantizer
from .analysis import Damage

ROUNDING = 1e-6
"""A value beyond the range by this share of it is not clipped: T / d * d need not give T in float32."""


class Meter:
    """Compares a tensor with what quantization makes of it, over all calls together.

    Args:
        keep: values of each call that are kept for the distance to uniform.
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
        """None if nothing came through."""
        if not self._count:
            return None
        signal, noise, size, error = self._sums
        with np.errstate(divide='ignore'):
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


@torch.no_grad()
def quantized_weight(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Filters (C, ...), what they are quantized to, and the ends of the range, which broadcast against them."""
    weight, quant = layer.filters().detach(), layer.weight_quant
    quantized = quant(weight)
    step = quant.step(weight)
    return weight, quantized, quant.lo * step, quant.hi * step


def measure_weight(layer: Any) -> Damage | None:
    """What quantization does to the weight of a layer."""
    values = quantized_weight(layer)
    meter = Meter(values[0].numel())
    meter.add(*values)
    return meter.result(layer.weight_quant.bits)


def watch(quantizer: ActivationQuantizer, meter: Meter) -> Any:
    """Show a meter every input of a quantizer with what becomes of it; returns the hook's handle."""

    def see(module: Any, args: Any, out: Tensor) -> None:
        step = module.step()
        meter.add(args[0], out, module.lo * step, module.hi * step)

    return quantizer.register_forward_hook(see)
