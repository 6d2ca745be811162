"""The arithmetic of GDRQ on plain tensors: no modules, no state.

Source: Yu et al., "Low-bit Quantization Needs Good Distribution", CVPR Workshops 2020, arXiv:1908.01477.

Words used throughout: `threshold` T is where values are clipped, `step` d is the distance of two neighbouring
levels, a `code` is the integer round(x / d), `lo` and `hi` are the smallest and the largest code.
Filters are dimension 0 of a weight: (C_out, ...). Everything is computed in float32 or better.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .kernels import sum_abs as sum_abs

LARGEST = 2.0**126
"""The largest threshold: float32 holds four times as much, so that no multiple of the step is infinite."""


def code_range(bits: int, signed: bool, narrow_range: bool = True, zero_point: int = 0) -> tuple[int, int]:
    """Smallest and largest code of an n-bit quantizer.

    Args:
        narrow_range: leave out the code -2^(n-1), so that a signed range is symmetric (ours; the paper's Fig. 5 draws
            the full range).
        zero_point: shift of an unsigned range, in codes: it becomes [-z, 2^n - 1 - z].

    Examples:
        >>> code_range(4, signed=True), code_range(4, signed=False), code_range(4, signed=False, zero_point=1)
        ((-7, 7), (0, 15), (-1, 14))
    """
    if signed:
        top = 2 ** (bits - 1)
        return (1 - top, top - 1) if narrow_range else (-top, top - 1)
    return -zero_point, 2**bits - 1 - zero_point


def step_size(threshold: Tensor, lo: int, hi: int) -> Tensor:
    """Step d = T / max(-lo, hi): the code farthest from zero stands for the threshold (docs/method.md, section 1)."""
    return threshold / max(-lo, hi)


def decide_range(low: float, high: float, mean: float) -> str:
    """The range of an activation with these extremes and this mean(|x|) of the values that are not zero (rule: ours).

    No negative value: 'unsigned' (ReLU). Zeros only: 'signed' (a residual branch that starts at zero).
    A short negative tail, at most half of the maximum and at most 0.4 or three times the mean: 'zero_point'. SiLU ends
    at -0.28, Hardswish at -0.38, sums of them at two or more times that; LeakyReLU shrinks what is negative.
    Otherwise 'signed': the tail of a normal distribution is five or more times its mean.
    """
    if low >= 0:
        return 'unsigned' if high > 0 else 'signed'
    return 'zero_point' if -low <= high / 2 and -low <= max(0.4, 3 * mean) else 'signed'


def zero_point_of(threshold: float, low: float, bits: int) -> int:
    """Zero point z of an unsigned range that reaches from about `low` to T: at least 1, at most half the codes."""
    levels, low = 2**bits - 1, min(low, 0.0)
    if threshold <= 0:
        return 1
    return min(max(round(levels * -low / (threshold - low)), 1), levels // 2)


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def straight_through(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` to the last bit, with the gradient of `surrogate`; both of one shape."""
    return kernels.straight_through(surrogate, value.detach())


_CUTS = {'log': 0.5**0.5, 'linear': 0.75, 'up': 0.5 + 2**-24}


def power_of_two(x: Tensor, nearest: str = 'log') -> Tensor:
    """A power of two for each x; zeros stay zeros. It takes no gradient.

    Args:
        nearest: 'log', the nearest on a logarithmic scale; 'linear', the nearest; 'up', the smallest not below x.

    Examples:
        >>> [power_of_two(torch.tensor([0.0, 1.1, 1.45, 1.5, 4.0]), how).tolist() for how in ('log', 'linear', 'up')]
        [[0.0, 1.0, 2.0, 2.0, 4.0], [0.0, 1.0, 1.0, 2.0, 4.0], [0.0, 2.0, 2.0, 2.0, 4.0]]
    """
    mantissa, exponent = torch.frexp(x.detach())  # x = mantissa * 2^exponent, with a mantissa in [1/2, 1)
    below = (mantissa < _CUTS[nearest]).int()
    return torch.where(x > 0, torch.exp2((exponent - below).to(x.dtype)), 0)


# ---- groups -----------------------------------------------------------------------------------------------------


def group_sizes(channels: int, groups: int) -> list[int]:
    """Sizes of contiguous groups of filters, which differ by one at most.

    Examples:
        >>> group_sizes(10, 4)
        [3, 3, 2, 2]
    """
    size, larger = divmod(channels, groups)
    return [size + (g < larger) for g in range(groups)]


def per_group(per_channel: Tensor, sizes: Tensor, reduce: str = 'sum') -> Tensor:
    """Reduce a statistic of each filter (C,) to each group (G,); `reduce` is 'sum', 'max' or 'min'."""
    if len(sizes) == len(per_channel):
        return per_channel
    return torch.segment_reduce(per_channel, reduce, lengths=sizes)


def per_channel(per_group: Tensor, sizes: Tensor, shape: Sequence[int]) -> Tensor:
    """Spread a value of each group (G,) over its filters: (C, 1, ..., 1) for filters of the shape (C, ...)."""
    spread = torch.repeat_interleave(per_group, sizes, output_size=shape[0])
    return spread.view(-1, *[1] * (len(shape) - 1))


def mean_abs(weight: Tensor, sizes: Tensor) -> Tensor:
    """mean(|w|) of each group of filters: (C, ...) and group sizes (G,) give (G,). The sum is a float64."""
    rows = weight.detach().flatten(1)
    total = per_group(rows.abs().sum(1, dtype=torch.float64), sizes)
    return (total / (sizes * rows.shape[1])).float()


def mean_of_chosen(weight: Tensor, chosen: Tensor, sizes: Tensor) -> Tensor:
    """mean(|w|) over the weights of each group that a mask of the same shape chooses; 0 where it chooses none."""
    total = per_group((weight.detach().abs() * chosen).flatten(1).sum(1, dtype=torch.float64), sizes)
    return (total / per_group(chosen.flatten(1).sum(1, dtype=torch.float64), sizes).clamp(min=1)).float()


def max_abs(weight: Tensor, sizes: Tensor) -> Tensor:
    """max|w| of each group of filters: (C, ...) and group sizes (G,) give (G,)."""
    return per_group(weight.detach().float().flatten(1).abs().amax(1), sizes, 'max')


# ---- Scale-Clip ---------------------------------------------------------------------------------------------------


def scale_clip_threshold(weight: Tensor, k: float | Tensor, sizes: Tensor) -> Tensor:
    """Scale-Clip's threshold of each group, T_g = k * mean(|w|) over the group's filters: (C, ...) gives (G,)."""
    return scaled_mean(mean_abs(weight, sizes), k)


def scaled_mean(mean: Tensor, k: float | Tensor) -> Tensor:
    """T = k * mean(|w|), at most LARGEST."""
    return (k * mean).clamp(max=LARGEST)


def clip(x: Tensor, threshold: Tensor, gradient: str = 'masked', low: Tensor | None = None) -> Tensor:
    """min(max(x, low), T), where low is -T if it is not given; neither takes a gradient.

    Args:
        gradient: 'masked', a clipped value has gradient 0, or 'straight_through', it has gradient 1.
    """
    threshold = threshold.detach()
    low = -threshold if low is None else low.detach()
    if gradient == 'straight_through':
        return straight_through(x, torch.minimum(torch.maximum(x, low), threshold))
    return torch.clamp(x, low, threshold).to(x.dtype)  # thresholds are float32


def nonzero_start(start: Tensor, weight: Tensor) -> Tensor:
    """Where learned thresholds start; those of groups of zeros at 1 / sqrt(n), as layers do: 0 never learns (ours)."""
    return torch.where(start > 0, start, weight[0].numel() ** -0.5)


# ---- uniform fake quantization ------------------------------------------------------------------------------------


def fake_quantize(x: Tensor, step: Tensor, lo: int, hi: int, gradient: str = 'masked') -> Tensor:
    """Uniform quantization Q(x) = d * clip(round(x / d), lo, hi), round half to even (docs/method.md, section 1).

    Args:
        x: any shape and memory layout; half precision is computed in float32 and returned in its own type.
        step: d, a scalar tensor or one that broadcasts against x, such as (C, 1, 1, 1). It takes no gradient; 0
            gives 0.
        lo, hi: smallest and largest code, see :func:`code_range`.
        gradient: 'masked', 1 inside [lo * d, hi * d] and 0 outside, or 'straight_through', 1 everywhere.

    Examples:
        >>> fake_quantize(torch.tensor([-0.9, 0.2, 0.26, 3.0]), torch.tensor(0.5), -1, 1)
        tensor([-0.5000,  0.0000,  0.5000,  0.5000])
    """
    return kernels.fake_quantize(x, kernels.Uniform(step.detach(), lo, hi, gradient == 'masked'))


def learned_step_quantize(
    x: Tensor, step: Tensor, lo: int, hi: int, scale: Tensor | float, inside: bool = True
) -> Tensor:
    """Uniform quantization with a step that learns (LSQ, Esser et al. 2020, arXiv:1902.08153, Eq. 1 to 3).

    dQ/dd = lo below the range, hi above it, round(x/d) - x/d inside; times `scale`, LSQ's 1 / sqrt(N * Qp).
    dQ/dx = 1 inside the range, 0 outside. `inside=False` leaves out the gradient of the values inside the range, as
    PACT does, which learns where to clip.
    """
    return kernels.learned_step(x, step, lo, hi, scale, inside)


# ---- quantized loss -----------------------------------------------------------------------------------------------


def quantized_loss(weight: Tensor, quantized: Tensor, sizes: Tensor | None = None, p: float = 1.0) -> Tensor:
    """The paper's Eq. 3, QL = ||W - Q(W)||_p / ||W||_p: a scalar, or (G,) by groups of filters. 0 for W = 0."""
    error = (weight - quantized).abs().double().pow(p)
    norm = weight.abs().double().pow(p)
    if sizes is None:
        top, bottom = error.sum(), norm.sum()
    else:
        top, bottom = per_group(error.flatten(1).sum(1), sizes), per_group(norm.flatten(1).sum(1), sizes)
    return torch.where(bottom > 0, top / bottom.clamp(min=1e-300), 0).pow(1 / p)


def search_threshold(
    weight: Tensor, lo: int, hi: int, sizes: Tensor, apart: int = 1, p: float = 2.0, candidates: int = 64
) -> Tensor:
    """The threshold of each group that minimizes its quantized loss: (C, ...) gives (G,).

    `candidates` thresholds are tried, evenly spaced up to the largest |w| of the group (grid: ours).
    """
    weight = weight.detach().float()
    top = max_abs(weight, sizes)
    best, best_loss = top, torch.full_like(top, torch.inf, dtype=torch.float64)
    for i in range(1, candidates + 1):
        threshold = top * (i / candidates)
        step = per_channel(step_size(threshold, lo, hi), sizes, weight.shape)
        quantized = kernels.fake_quantize(weight, kernels.Uniform(step, lo, hi, apart=apart))
        loss = quantized_loss(weight, quantized, sizes, p)
        better = loss < best_loss
        best, best_loss = torch.where(better, threshold, best), torch.where(better, loss, best_loss)
    return best


def refit_threshold(
    weight: Tensor,
    threshold: Tensor,
    lo: int,
    hi: int,
    sizes: Tensor,
    importance: Tensor | None = None,
    rounds: int = 1,
) -> Tensor:
    """Alternating least squares: the threshold of each group of least squared error for its codes, (G,).

    Each round takes the codes c nearest to w / d, and then the step d = sum(i c w) / sum(i c^2) that is best for them.
    A threshold whose codes are all 0 stays.

    Args:
        weight: filters, (C, ...).
        threshold: T of each group to begin with, (G,).
        importance: i, what the squared error of each weight counts, in the shape of the weight; None: 1.
    """
    weight, top = weight.detach().float(), max(-lo, hi)
    counted = torch.ones_like(weight, dtype=torch.float64) if importance is None else importance.double()
    for _ in range(rounds):
        codes = kernels.nearest_codes(weight, per_channel(threshold / top, sizes, weight.shape), lo, hi)
        square = per_group((counted * codes * codes).flatten(1).sum(1), sizes)
        product = per_group((counted * codes * weight).flatten(1).sum(1), sizes)
        best = (product / torch.where(square > 0, square, 1) * top).clamp(max=LARGEST).float()
        threshold = torch.where(square > 0, best, threshold)
    return threshold


def search_activation_threshold(
    x: Tensor, low: Tensor, high: Tensor, kind: str, bits: int, candidates: int = 64
) -> Tensor:
    """The T of least squared error on x, of evenly spaced ones up to max|x| (grid: ours), a scalar.

    Args:
        low, high: min(x, 0) and max(x, 0), scalars.
        kind: 'unsigned', 'signed' or 'zero_point', where each T has its own zero point.
    """
    x, top = x.double(), float(torch.maximum(-low, high))
    best = torch.inf, top
    for threshold in (top * i / candidates for i in range(candidates, 0, -1)):
        zero_point = zero_point_of(threshold, float(low), bits) if kind == 'zero_point' else 0
        lo, hi = code_range(bits, kind == 'signed', zero_point=zero_point)
        step = step_size(x.new_tensor(threshold), lo, hi)
        best = min(best, (float((fake_quantize(x, step, lo, hi) - x).square().sum()), threshold))
    return high.new_tensor(best[1])


def distance_to_uniform(x: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of |x| / max|x| to the uniform distribution on [0, 1]; 0 is uniform.

    The statistic is our choice: the paper shows histograms. Laplace noise has about 0.7, Gaussian about 0.5.
    """
    values = x.detach().float().abs().flatten()
    if values.numel() == 0 or not bool(values.amax() > 0):
        return torch.zeros((), device=x.device)
    values = torch.sort(values / values.amax()).values
    expected = torch.linspace(0, 1, len(values) + 1, device=x.device)
    return torch.maximum((values - expected[:-1]).abs(), (values - expected[1:]).abs()).amax()
