"""Fake quantization in torch operations: what every kernel computes, to the last bit. It runs everywhere.

Nothing is stored that can be computed again. torch.compile traces it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _divisor(step: Tensor) -> Tensor:
    """The step; 1 for a step of 0 (dead group, empty batch), which then gives 0, never NaN."""
    return torch.where(step > 0, step, 1)


def nearest_codes(x: Tensor, step: Tensor, lo: int, hi: int, apart: int = 1) -> Tensor:
    """The codes in [lo, hi] that are nearest to x / d, as floats: half to even, or up where they are 2 apart."""
    ratio = _wide(x) / _divisor(step)
    return (ratio.round() if apart == 1 else 2 * (ratio * 0.5).floor() + 1).clamp(lo, hi)


def _quantized(x: Tensor, step: Tensor, lo: int, hi: int, apart: int = 1) -> Tensor:
    return (nearest_codes(x, step, lo, hi, apart) * step).to(x.dtype)


def _masked(grad: Tensor, x: Tensor, step: Tensor, lo: int, hi: int, apart: int = 1) -> Tensor:
    """The gradient where x is in [lo * d, hi * d], else 0; where codes are 2 apart, in the cells of lo and hi too."""
    x, beyond = _wide(x), apart - 1
    return torch.where((x < (lo - beyond) * step) | (x > (hi + beyond) * step), 0, grad)


class FakeQuantize(torch.autograd.Function):
    """d * clip(round(x / d), lo, hi), nothing stored but the input, which autograd keeps anyway."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, masked: bool, apart: int
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.args = lo, hi, masked, apart
        return _quantized(x, step, lo, hi, apart)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        lo, hi, masked, apart = ctx.args
        x, step = ctx.saved_tensors
        return _masked(grad, x, step, lo, hi, apart) if masked else grad, None, None, None, None, None


class LearnedStep(torch.autograd.Function):
    """The same values as FakeQuantize, and a gradient for the step."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, scale: Any, within: bool
    ) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.args = lo, hi, scale, within
        return _quantized(x, step, lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step = ctx.saved_tensors
        lo, hi, scale, within = ctx.args
        ratio = _wide(x) / _divisor(step)
        code = ratio.round().clamp(lo, hi)
        inside = (ratio > lo) & (ratio < hi)
        slope = torch.where(inside, code - ratio if within else 0, code)
        total = (_wide(grad) * slope).double().sum_to_size(step.shape).to(step.dtype)
        return _masked(grad, x, step, lo, hi), total * scale * (step > 0), None, None, None, None


class StraightThrough(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.to(surrogate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None


def sum_abs(x: Tensor) -> Tensor:
    """sum|x|, a float64 scalar."""
    return x.abs().sum(dtype=torch.float64)
