"""The formulas of docs/method.md written once more in NumPy, float64, independent of the package."""

import numpy as np


def code_range(bits, signed, narrow=True, zero_point=0):
    if signed:
        high = 2 ** (bits - 1) - 1
        return (-high if narrow else -high - 1), high
    return -zero_point, 2**bits - 1 - zero_point


def quantize(x, threshold, bits, signed=True, narrow=True, zero_point=0):
    """d * clip(round(x / d), lo, hi) for one threshold."""
    lo, hi = code_range(bits, signed, narrow, zero_point)
    if threshold == 0:
        return np.zeros_like(x)
    step = threshold / (-lo if signed else hi)
    return step * np.clip(np.rint(x / step), lo, hi)


def quantize_without_zero(x, threshold, bits):
    """The nearest of 2^n levels that are symmetric and evenly spaced, with T and -T at the ends."""
    levels = np.linspace(-threshold, threshold, 2**bits)
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


def inside_without_zero(x, threshold, bits):
    """1 where x is in a cell of a level: not farther from the nearest than half of their distance."""
    nearest = quantize_without_zero(x, threshold, bits)
    return (np.abs(x - nearest) <= threshold / (2**bits - 1)).astype(x.dtype)


def groups_of(channels, groups):
    """Group index of each channel: contiguous, sizes differ by one at most."""
    return np.concatenate([np.full(len(part), g) for g, part in enumerate(np.array_split(np.arange(channels), groups))])


def scale_clip_threshold(weight, k, groups):
    index = groups_of(len(weight), groups)
    return np.array([k * np.abs(weight[index == g]).mean() for g in range(groups)])


def quantized_loss(weight, quantized, p):
    norm = (np.abs(weight) ** p).sum() ** (1 / p)
    return 0.0 if norm == 0 else (np.abs(weight - quantized) ** p).sum() ** (1 / p) / norm


def quantize_groups(weight, thresholds, bits, narrow=True):
    """Each group of filters with its own threshold."""
    index = groups_of(len(weight), len(thresholds))
    return np.stack([quantize(filters, thresholds[g], bits, True, narrow) for filters, g in zip(weight, index)])


def inside_range(x, threshold, bits, signed=True, narrow=True, zero_point=0):
    """1 where x is between the smallest and the largest level: the gradient of the straight-through estimator."""
    lo, hi = code_range(bits, signed, narrow, zero_point)
    step = threshold / (-lo if signed else hi)
    return ((x >= lo * step) & (x <= hi * step)).astype(x.dtype)


def search_threshold(weight, bits, candidates, p=2, quantize=quantize):
    """The threshold of least quantized loss on an even grid up to max|w|."""
    grid = np.abs(weight).max() * np.arange(1, candidates + 1) / candidates
    return grid[np.argmin([quantized_loss(weight, quantize(weight, t, bits), p) for t in grid])]


def lsq_step_gradient(w, step, bits, upstream):
    """LSQ (arXiv:1902.08153): Eq. 3 summed over the tensor, times the scale 1 / sqrt(N * Qp)."""
    lo, hi = code_range(bits, True)
    v = w / step
    each = np.where(v <= lo, lo, np.where(v >= hi, hi, np.rint(v) - v))
    return (upstream * each).sum() / np.sqrt(w.size * hi)


def running_threshold(threshold, k, momentum, values):
    """T + m * (k * mean(|x|) - T), the mean over all elements of the forwards of one optimizer step."""
    together = np.concatenate([np.abs(v).ravel() for v in values])
    return threshold + momentum * (k * together.mean() - threshold)


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Cross-correlation of (N, C, H, W) with (C_out, C / groups, kH, kW), zeros around it."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    c_out, c_in, kh, kw = weight.shape
    height = (x.shape[2] - dilation * (kh - 1) - 1) // stride + 1
    width = (x.shape[3] - dilation * (kw - 1) - 1) // stride + 1
    out = np.zeros((len(x), c_out, height, width))
    for o in range(c_out):
        first = o // (c_out // groups) * c_in
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dilation, i * dilation + stride * (height - 1) + 1, stride)
                columns = slice(j * dilation, j * dilation + stride * (width - 1) + 1, stride)
                patch = x[:, first : first + c_in, rows, columns]
                out[:, o] += (patch * weight[o, :, i, j][None, :, None, None]).sum(1)
    return out if bias is None else out + bias[None, :, None, None]


def conv_transpose2d(x, weight, bias=None, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    """Each input value spreads its kernel: (N, C, H, W) and (C, C_out / groups, kH, kW)."""
    n, c_in, height, width = x.shape
    _, c_out, kh, kw = weight.shape
    full_height = (height - 1) * stride + dilation * (kh - 1) + 1 + output_padding
    full_width = (width - 1) * stride + dilation * (kw - 1) + 1 + output_padding
    full = np.zeros((n, c_out * groups, full_height, full_width))
    for c in range(c_in):
        first = c // (c_in // groups) * c_out
        for y in range(height):
            for z in range(width):
                for i in range(kh):
                    for j in range(kw):
                        spread = x[:, c, y, z][:, None] * weight[c, :, i, j][None]
                        full[:, first : first + c_out, y * stride + i * dilation, z * stride + j * dilation] += spread
    out = full[:, :, padding : full_height - padding, padding : full_width - padding]
    return out if bias is None else out + bias[None, :, None, None]
