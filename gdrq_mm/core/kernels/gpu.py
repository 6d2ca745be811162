"""Fake quantization on CUDA by Triton: one pass over memory forward, one backward. What is computed is in reference.py.

Steps are scalars, or there is one for each filter of a weight. A sum over a tensor is that of the sums of its blocks,
float64, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096


@triton.jit
def _load(x, at, n):  # type: ignore[no-untyped-def]
    return tl.load(x + at, mask=at < n, other=0).to(tl.float32)


@triton.jit
def _ratio_and_code(v, d, lo, hi, APART: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / d, and the nearest code in [lo, hi], half to even, or the nearest odd one; a step of 0 gives 0."""
    ratio = tl.div_rn(v, tl.where(d > 0, d, 1.0))
    code = ratio if APART == 1 else tl.floor(ratio * 0.5) * 2 + 1
    code = tl.where(code < lo, lo, code)
    code = tl.where(code > hi, hi, code)
    return ratio, (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fractions from there on


@triton.jit
def _outside(v, d, lo, hi):  # type: ignore[no-untyped-def]
    return (v < lo * d) | (v > hi * d)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x,
    steps,
    out,
    parts,
    n,
    inner,
    lo,
    hi,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(steps + at // inner, mask=at < n, other=0) if ROWS else tl.load(steps)
    v = _load(x, at, n)
    _, code = _ratio_and_code(v, d, lo, hi, APART)
    tl.store(out + at, (code * d).to(out.dtype.element_ty), mask=at < n)
    if ADD:
        tl.store(parts + 2 * block, tl.sum(tl.abs(v).to(tl.float64)))
        tl.store(parts + 2 * block + 1, tl.sum((v != 0).to(tl.int32)).to(tl.float64))


@triton.jit
def _mask(grad, x, steps, out, n, inner, lo, hi, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(steps + at // inner, mask=at < n, other=0) if ROWS else tl.load(steps)
    g = tl.where(_outside(_load(x, at, n), d, lo, hi), 0.0, _load(grad, at, n))
    tl.store(out + at, g.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _learn(grad, x, step, out, parts, n, lo, hi, WITHIN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    d, v, g = tl.load(step), _load(x, at, n), _load(grad, at, n)
    ratio, code = _ratio_and_code(v, d, lo, hi, 1)
    inside = (ratio > lo) & (ratio < hi)
    slope = tl.where(inside, code - ratio if WITHIN else 0.0, code)
    tl.store(parts + block, tl.sum((g * slope).to(tl.float64)))
    tl.store(out + at, tl.where(_outside(v, d, lo, hi), 0.0, g).to(out.dtype.element_ty), mask=at < n)


def takes(x: Tensor, step: Tensor) -> bool:
    """Whether the kernels compute with this tensor and step."""
    if not x.numel() or step.dtype != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    rows = step.numel() == len(step) == len(x) if step.dim() and x.dim() else False
    return step.dim() == 0 or (rows and step.dim() == x.dim() and x.stride(0) == x[0].numel())


def _laid_out(t: Tensor, layout: Tensor) -> Tensor:
    """A tensor in the layout of another."""
    return t if t.stride() == layout.stride() else torch.empty_like(layout, dtype=t.dtype).copy_(t)


def _launch(kernel: Any, *args: Any, n: int, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):
        kernel[(triton.cdiv(n, BLOCK),)](*args, **constants, BLOCK=BLOCK, enable_fp_fusion=False)


def _parts(x: Tensor, *shape: int) -> Tensor:
    """Room for the sums of the blocks."""
    return torch.empty(triton.cdiv(x.numel(), BLOCK), *shape, dtype=torch.float64, device=x.device)


class FakeQuantize(torch.autograd.Function):
    """d * clip(round(x / d), lo, hi); adds to `sums` what kernels.Uniform says."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, masked: bool, sums: Any, nonzero: bool, apart: int
    ) -> Tensor:
        out = torch.empty_like(x)
        x = _laid_out(x, out)
        ctx.save_for_backward(*((x, step) if masked else ()))
        n, rows = x.numel(), step.dim() > 0
        inner, beyond = n // len(x) if rows else n, apart - 1
        ctx.args = n, inner, float(lo - beyond), float(hi + beyond)
        parts = out if sums is None else _parts(x, 2)
        options = dict(ADD=sums is not None, ROWS=rows, APART=apart)
        _launch(_quantize, x, step, out, parts, n, inner, float(lo), float(hi), n=n, **options)
        if sums is not None:
            total, count = parts.sum(0).unbind()
            sums[0] += total
            sums[1] += count if nonzero else n
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.saved_tensors:
            x, step = ctx.saved_tensors
            grad, out = _laid_out(grad, x), torch.empty_like(x, dtype=grad.dtype)
            _launch(_mask, grad, x, step, out, *ctx.args, n=x.numel(), ROWS=step.dim() > 0)
            grad = out
        return grad, None, None, None, None, None, None, None


class LearnedStep(torch.autograd.Function):
    """The same values, and a gradient for a scalar step."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, step: Tensor, lo: int, hi: int, scale: float, within: bool
    ) -> Tensor:
        out = torch.empty_like(x)
        x = _laid_out(x, out)
        ctx.save_for_backward(x, step)
        ctx.args = float(lo), float(hi), scale, within
        n = x.numel()
        _launch(_quantize, x, step, out, out, n, n, float(lo), float(hi), n=n, ADD=False, ROWS=False, APART=1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step = ctx.saved_tensors
        lo, hi, scale, within = ctx.args
        grad, out, parts, n = _laid_out(grad, x), torch.empty_like(x, dtype=grad.dtype), _parts(x), x.numel()
        _launch(_learn, grad, x, step, out, parts, n, lo, hi, n=n, WITHIN=within)
        return out, parts.sum().to(step.dtype) * scale * (step > 0), None, None, None, None
