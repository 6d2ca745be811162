"""The formulas of METHOD written once more in NumPy, float64, independent of the package."""

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


def groups_of(channels, groups):
    """Group index of each channel: contiguous, sizes differ by one at most."""
    return np.concatenate([np.full(len(part), g) for g, part in enumerate(np.array_split(np.arange(channels), groups))])


def scale_clip_threshold(weight, k, groups):
    index = groups_of(len(weight), groups)
    return np.array([k * np.abs(weight[index == g]).mean() for g in range(groups)])


def quantized_loss(weight, quantized, p):
    norm = (np.abs(weight) ** p).sum() ** (1 / p)
    return 0.0 if norm == 0 else (np.abs(weight - quantized) ** p).sum() ** (1 / p) / norm
