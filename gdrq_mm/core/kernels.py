"""Fake quantization as autograd functions: few passes over memory, nothing stored that can be computed again.

On a CPU a pass works on pieces that fit the cache, so that the next pass finds them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 17
"""Elements a pass works on at once on a CPU: small enough that the next pass finds them in the cache (ours)."""


def _dense(x: Tensor) -> Tensor:
    """x itself if its elements fill its memory (contiguous, channels_last), else a contiguous copy."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def block_size() -> int:
    """Elements of a piece: CHUNK for each thread."""
    return CHUNK * torch.get_num_threads()


def blocks(tensors: tuple[Tensor, ...], steps: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]] | None:
    """Cut dense tensors of one layout, and steps (scalars, or one a filter), into pieces that fit a CPU's cache.

    Returns None where that is impossible or of no use: on an accelerator, for a layout without filters outermost.

    What it gains, on one thread: rounding 16x64x56x56 activations takes 1.4 ms in pieces and 5.2 ms at once; weights
    take as long forwards, and 4.5 instead of 6.0 ms backwards.
    """
    x = tensors[0]
    if x.device.type != 'cpu' or not x.numel() or any(t.stride() != x.stride() for t in tensors):
        return None
    if steps[0].dim() == 0:
        pieces = zip(*(t.as_strided((t.numel(),), (1,)).split(block_size()) for t in tensors))
        return ((*piece, *steps) for piece in pieces)
    filters, inner = len(x), x.numel() // len(x)
    if steps[0].numel() != filters or x.stride(0) != inner:
        return None
    rows = max(1, block_size() // inner)
    flat = (t.as_strided((filters, inner), (inner, 1)).split(rows) for t in tensors)
    return zip(*flat, *(s.reshape(-1, 1).split(rows) for s in steps))


def _wide(x: Tensor) -> Tensor:
    """float32 or better."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _beyond(bound: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """The first number of `dtype` beyond a scalar bound: above it for `towards` = inf, below it for -inf."""
    near = bound.to(dtype)
    already_beyond = near > bound if towards > 0 else near < bound  # rounding to `dtype` may have moved it there
    if bool(already_beyond):
        return near
    return torch.nextafter(near, near.new_full((), towards))


def _quantized(x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    divisor = torch.where(step > 0, step, 1)  # a step of 0 (dead group, empty batch) gives 0, never NaN
    out = torch.empty_like(x)
    pieces = blocks((x, out), (divisor, step))
    if pieces is None:
        return (_wide(x) / divisor).round_().clamp_(lo, hi).mul_(step).to(x.dtype)
    for a, b, d, s in pieces:
        if _wide(a) is a:
            torch.div(a, d, out=b).round_().clamp_(lo, hi).mul_(s)
        else:
            b.copy_(torch.div(a.float(), d).round_().clamp_(lo, hi).mul_(s))
    return out


def _masked(grad: Tensor, x: Tensor, step: Tensor, lo: int, hi: int) -> Tensor:
    """The gradient where x is in [lo * d, hi * d], else 0."""
    low, high = lo * step, hi * step
    if x.device.type == 'cpu' and step.dim() == 0 and grad.dtype == x.dtype:
        # One pass that leaves out the ends, hence bounds just beyond them. Reading a number makes only a GPU wait.
        ends = float(_beyond(low, x.dtype, -torch.inf)), float(_beyond(high, x.dtype, torch.inf))
        return torch.ops.aten.hardtanh_backward(grad, x, *ends)
    out = torch.empty_like(grad)
    pieces = blocks((x, grad, out), (low, high)) if grad.dtype == x.dtype else None
    if pieces is None:
        x = _wide(x)
        return grad * ((x >= low) & (x <= high))
    for a, g, o, bottom, top in pieces:  # on a CPU comparisons that write bool are far slower than these
        wide = _wide(a)
        inside = o if wide is a else torch.empty_like(wide)
        torch.minimum(wide, top, out=inside)
        torch.maximum(inside, bottom, out=inside)
        torch.eq(inside, wide, out=inside)
        torch.mul(inside, g, out=o)
    return out


class FakeQuantize(torch.autograd.Function):
    """d * clip(round(x / d), lo, hi), nothing stored but the input, which autograd keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, masked: bool) -> Tensor:  # type: ignore[override]
        x = _dense(x)
        ctx.save_for_backward(x, step)
        ctx.args = lo, hi, masked
        return _quantized(x, step, lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        lo, hi, masked = ctx.args
        x, step = ctx.saved_tensors
        return _masked(grad, x, step, lo, hi) if masked else grad, None, None, None, None


class LearnedStep(torch.autograd.Function):
    """The same values as FakeQuantize, and a gradient for the step."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, scale: Any, inside: bool
    ) -> Tensor:
        x = _dense(x)
        ctx.save_for_backward(x, step)
        ctx.args = lo, hi, scale, inside
        return _quantized(x, step, lo, hi)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step = ctx.saved_tensors
        lo, hi, scale, inside = ctx.args
        divisor = torch.where(step > 0, step, 1)

        def each(x: Tensor, divisor: Tensor) -> Tensor:
            """dQ/dd of each element."""
            v = _wide(x) / divisor
            code = v.round().clamp_(lo, hi)
            # hardtanh_backward gives its first argument where lo < v < hi and 0 elsewhere, in one pass
            return code.sub_(torch.ops.aten.hardtanh_backward(v if inside else code, v, lo, hi))

        pieces = blocks((x, grad), (divisor,)) if step.dim() == 0 else None
        if pieces is None:
            step_grad = (_wide(grad) * each(x, divisor) * scale).sum_to_size(step.shape)
        else:
            step_grad = torch.stack([torch.dot(each(a, d), _wide(g)) for a, g, d in pieces]).sum() * scale
        return _masked(grad, x, step, lo, hi), step_grad * (step > 0), None, None, None, None


class StraightThrough(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.to(surrogate.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None
