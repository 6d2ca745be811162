"""Fake quantization, by the fastest kernel there is: C++ on a CPU (native.py), Triton on CUDA, else torch operations.

All kernels compute what reference.py computes, to the last bit of a float32; sums over a tensor are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .choice import kernels_of, triton_of
from .reference import FakeQuantize, LearnedStep, StraightThrough, nearest_codes, sum_abs

__all__ = [
    'Codes',
    'Uniform',
    'fake_quantize',
    'kernels_of',
    'layer',
    'learned_step',
    'nearest_codes',
    'restored',
    'straight_through',
    'sum_abs',
    'triton_of',
]


class Uniform(NamedTuple):
    """d * clip(round(x / d), lo, hi), and what else the same pass over x does."""

    step: Tensor
    """d; for a tensor a scalar, for a weight one that broadcasts against it."""
    lo: int
    hi: int
    masked: bool = True
    """Whether the gradient is 0 outside [lo * d, hi * d], else it passes everywhere."""
    sums: Tensor | None = None
    """Adds sum|x| and a number of values to these, (2,) float64."""
    nonzero: bool = False
    """Which number: of the values that are not zero, or of all."""
    top: int = 1
    """d is `step` / `top`: a threshold and its code may stand for the step."""
    apart: int = 1
    """How far two neighbouring codes are apart; 2: odd codes, without 0. For weights."""


class Codes(NamedTuple):
    """A quantized weight."""

    codes: Tensor
    """code - lo, uint8, in the shape and layout of the weight."""
    steps: Tensor
    """d of each filter, (C,)."""
    uniform: Uniform


def fake_quantize(x: Tensor, how: Uniform, overwrite: bool = False) -> Tensor:
    """Uniform quantization, see functional.fake_quantize; `overwrite` allows to write the result into x."""
    step, lo, hi, masked, sums, nonzero, top, apart = how
    if apart == 1 and step.dim() == 0 and step.dtype == torch.float32 and (operators := kernels_of(x)) is not None:
        compute = operators.fake_quantize_ if overwrite else operators.fake_quantize
        return compute(x, step, lo, hi, masked, sums, nonzero, top)
    step = step if top == 1 else step / top
    if (gpu := triton_of(x, step)) is not None:
        return gpu.FakeQuantize.apply(x, step, lo, hi, masked, sums, nonzero, apart)
    if sums is not None:
        with torch.no_grad():
            sums[0] += sum_abs(x)
            sums[1] += (x != 0).sum() if nonzero else x.numel()
    return FakeQuantize.apply(x, step, lo, hi, masked, apart)


def learned_step(x: Tensor, step: Tensor, lo: int, hi: int, scale: Tensor | float, within: bool) -> Tensor:
    """Uniform quantization with a step that learns, see functional.learned_step_quantize."""
    simple = step.dim() == 0 and step.dtype == torch.float32 and isinstance(scale, float)
    if simple and (operators := kernels_of(x)) is not None:
        return operators.learned_step(x, step, lo, hi, scale, within)
    if simple and (gpu := triton_of(x, step)) is not None:
        return gpu.LearnedStep.apply(x, step, lo, hi, scale, within)
    return LearnedStep.apply(x, step, lo, hi, scale, within)


def straight_through(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of `surrogate`."""
    return StraightThrough.apply(surrogate, value)


def codes_of(weights: Sequence[Tensor], how: Sequence[Uniform], operators: Any) -> list[Codes]:
    """The codes of weights, (C, ...) each, in one pass over all of them."""
    steps = torch.cat([each.step.flatten() for each in how])
    ranges = zip(*[(each.lo, each.hi, each.apart) for each in how])
    found = operators.codes_of_weights(weights, steps, *map(list, ranges))
    return [Codes(*each) for each in zip(found, steps.split([len(w) for w in weights]), how)]


def restored(quantized: Codes) -> Tensor:
    """The quantized weight, (C, ...)."""
    return native.operators().weight_of_codes(quantized.codes, quantized.steps, quantized.uniform.lo)


def layer(
    x: Tensor,
    how: Uniform,
    weight: Tensor,
    quantized: Codes,
    bias: Tensor | None,
    geometry: tuple[Any, Any, Any, int],
    operators: Any,
) -> Tensor:
    """A convolution or a linear layer on a quantized input and weight, which saves bytes for its backward pass.

    Args:
        x: the input before its quantization by `how`.
        weight: the weight before its quantization: the gradient is its.
        geometry: stride, padding, dilation, groups; three empty ones for a linear layer.
    """
    codes, steps, of_weight = quantized
    of_codes = of_weight.lo, of_weight.hi, of_weight.masked, of_weight.apart
    return operators.layer(x, *how[:-1], weight, codes, steps, *of_codes, bias, *geometry)
