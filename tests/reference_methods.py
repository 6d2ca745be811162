"""The equations of the other methods' papers written in NumPy, float64, independent of the package.

Weights are those of one group unless a function says otherwise: `by_groups` applies it to each. Where a module's
docstring names a deviation from its paper, the deviation is what is written here.
"""

import itertools
import math
from statistics import NormalDist

import numpy as np

from tests import reference

# ---- parts ----------------------------------------------------------------------------------------------------------


def by_groups(function, groups, *arrays):
    """A function of one group's filters applied to each group of some arrays of the same length."""
    groups = len(arrays[0]) if groups == 'channel' else min(groups, len(arrays[0]))
    return np.concatenate([function(*parts) for parts in zip(*(np.array_split(a, groups) for a in arrays))])


def nearest(x, step, lo, hi):
    """s * round(clip(x / s, lo, hi)); zeros for s = 0."""
    return np.zeros_like(x) if step == 0 else step * np.rint(np.clip(x / step, lo, hi))


def quantize_k(r, bits):
    """DoReFa's Eq. 5 for r in [0, 1]."""
    return np.rint((2**bits - 1) * r) / (2**bits - 1)


def with_mean_of(levels, w):
    """Levels times the constant that gives them the mean |w| of w."""
    return levels * np.abs(w).mean() / np.abs(levels).mean()


# ---- weights: values ------------------------------------------------------------------------------------------------


def dorefa_levels(w, bits):
    """DoReFa, Eq. 9."""
    squashed = np.tanh(w)
    return 2 * quantize_k(squashed / (2 * np.abs(squashed).max()) + 0.5, bits) - 1


def dorefa_weight(w, bits):
    return with_mean_of(dorefa_levels(w, bits), w) if w.any() else np.zeros_like(w)


def minmax_weight(w, bits):
    return reference.quantize(w, np.abs(w).max(), bits)


def ptq_weight(w, bits):
    return reference.quantize(w, reference.search_threshold(w, bits, 64), bits)


def lsq_start(w, bits):
    """LSQ, section 2.1: 2 <|v|> / sqrt(Qp)."""
    return 2 * np.abs(w).mean() / math.sqrt(2 ** (bits - 1) - 1)


def lsq_plus_start(w, bits):
    """LSQ+, section 3.3."""
    return max(abs(w.mean() - 3 * w.std()), abs(w.mean() + 3 * w.std())) / 2 ** (bits - 1)


def lsq_weight(w, bits):
    return nearest(w, lsq_start(w, bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def lsq_plus_weight(w, bits):
    return nearest(w, lsq_plus_start(w, bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def balanced_levels(w, bits):
    """Balanced Quantization: cut at the mean again and again; the parts get evenly spaced levels in [-1, 1]."""
    levels = np.zeros_like(w)

    def cut(chosen, first, last):
        if not chosen.any():
            return
        if last == first:
            levels[chosen] = 2 * first / (2**bits - 1) - 1
            return
        above, middle = w > w[chosen].mean(), (first + last) // 2
        cut(chosen & ~above, first, middle)
        cut(chosen & above, middle + 1, last)

    cut(np.ones(w.shape, bool), 0, 2**bits - 1)
    return levels


def balanced_weight(w, bits):
    return with_mean_of(balanced_levels(w, bits), w)


def twn_weight(w, bits=2):
    """TWN, Eq. 5 and 6."""
    large = np.abs(w) > 0.7 * np.abs(w).mean()
    return np.sign(w) * large * (np.abs(w[large]).mean() if large.any() else 0)


def ttq_start(w, t=0.05):
    """W_p and W_n at the start: the mean |w| of either sign beyond t * max|w|."""
    sides = [w[w > t * np.abs(w).max()], w[w < -t * np.abs(w).max()]]
    return [np.abs(side).mean() if side.size else 0.0 for side in sides]


def ttq_weight(w, bits=2, t=0.05, scales=None):
    """TTQ, Eq. 6 and 9."""
    positive, negative = ttq_start(w, t) if scales is None else scales
    delta = t * np.abs(w).max()
    return np.where(w > delta, positive, np.where(w < -delta, -negative, 0))


def syq_codes(w, bits):
    """SYQ: signs, with two bits 0 for the small weights of the layer."""
    sign = np.where(w >= 0, 1, -1)
    return sign if bits == 1 else np.where(np.abs(w) > 0.05 * np.abs(w).max(), sign, 0)


def syq_weight(w, bits):
    """Of the whole layer: the mean |w| of each place of the kernel."""
    return syq_codes(w, bits) * np.abs(w).mean((0, 1))


def xnor_weight(w, bits=1):
    """XNOR-Net, Eq. 6."""
    return np.abs(w).mean() * np.where(w >= 0, 1, -1)


def power_of_two(x):
    """The nearest one on the logarithmic scale; 0 stays 0."""
    return 2.0 ** np.rint(np.log2(x)) if x > 0 else 0.0


def log_quantize(x, top, count):
    """Logarithmic representation: sign(x) * 2^e for the `count` exponents e up to log2(top), 0 below them."""
    with np.errstate(divide='ignore'):
        exponent = np.minimum(np.rint(np.log2(np.abs(x))), np.log2(top) if top > 0 else -np.inf)
        return np.where(exponent > np.log2(top) - count, np.sign(x) * 2.0**exponent, 0) if top > 0 else np.zeros_like(x)


def log2_weight(w, bits):
    return log_quantize(w, power_of_two(np.abs(w).max()), 2 ** (bits - 1) - 1)


def cut_at_ties(x, levels):
    """The nearest of some levels above 0, or 0: the larger one where |x| is in the middle, with the sign of x."""
    levels = [0.0, *sorted(levels)]
    found = np.zeros_like(x)
    for alpha, beta in itertools.pairwise(levels):
        found[np.abs(x) >= (alpha + beta) / 2] = beta
    return np.sign(x) * found


def lbw_weight(w, bits, mu=0.75):
    """LBW-Net: exact for 2 bits, by sorting; else the q are cut at multiples of mu, and the scale is the best one."""
    if not w.any():
        return np.zeros_like(w)
    if bits == 2:
        ordered = np.sort(np.abs(w).ravel())[::-1]
        best = 0.0, 0.0
        for k, total in enumerate(np.cumsum(ordered), 1):
            scale = 2.0 ** math.floor(math.log2(4 / 3 * total / k))
            best = min(best, (scale * scale * k - 2 * scale * total, scale))
        return cut_at_ties(w, [best[1]])
    n, mu = 2 ** (bits - 2), mu * np.abs(w).max()
    q = np.where(np.abs(w) >= mu, 1.0, 0.0)
    for t in range(1, n):
        low = mu * 2.0**-t * (2 / 3 if t == n - 1 else 1)
        q[(np.abs(w) >= low) & (np.abs(w) < mu * 2.0 ** (1 - t))] = 2.0**-t
    scale = 2.0 ** math.floor(math.log2(4 / 3 * (q * np.abs(w)).sum() / (q * q).sum())) if q.any() else 0
    return scale * q * np.sign(w)


def inq_weight(w, bits):
    """INQ, Eq. 1 to 4: from 2^n1 down to 2^n2."""
    if not w.any():
        return np.zeros_like(w)
    n1 = math.floor(math.log2(4 * np.abs(w).max() / 3))
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    return cut_at_ties(w, [2.0**e for e in range(n2, n1 + 1)])


def fgq_weight(w, bits=2, n=4):
    """FGQ: the best of all choices of the k largest in each group of n weights along the input channels."""
    if w.ndim > 2 and w.shape[1] < n:
        return fgq_weight(w.reshape(len(w), -1), bits, n).reshape(w.shape)
    out, count = np.zeros_like(w), math.ceil(w.shape[1] / n)
    each = math.ceil(w.shape[1] / count)
    for place in np.ndindex(len(w), *w.shape[2:]):
        for first in range(0, w.shape[1], each):
            index = (place[0], slice(first, first + each), *place[1:])
            group, best = w[index], np.inf
            for k in range(1, len(group) + 1):
                largest = np.argsort(-np.abs(group), kind='stable')[:k]
                value = np.zeros_like(group)
                value[largest] = np.sign(group[largest]) * np.abs(group[largest]).mean()
                if ((group - value) ** 2).sum() < best * (1 - 1e-12):
                    out[index], best = value, ((group - value) ** 2).sum()
    return out


def refit(w, threshold, bits, importance, rounds):
    """Alternating least squares for the codes and the step, from a threshold on."""
    hi = 2 ** (bits - 1) - 1
    for _ in range(rounds):
        codes = np.clip(np.rint(w / (threshold / hi)), -hi, hi)
        if codes.any():
            threshold = hi * (importance * codes * w).sum() / (importance * codes * codes).sum()
    return threshold


def least_squares_weight(w, bits):
    """From the T of least squared error, alternated."""
    if not w.any():
        return np.zeros_like(w)
    start = reference.search_threshold(w, bits, 64)
    return reference.quantize(w, refit(w, start, bits, np.ones_like(w), 10), bits)


def fixed_point_step(step, up):
    """Ristretto's dynamic fixed point: the smallest power of two that is not below a step; or (ours) the nearest."""
    exponents = range(-40, 41)
    if up:
        return 2.0 ** next(e for e in exponents if 2.0**e >= step)
    return 2.0 ** min(exponents, key=lambda e: abs(math.log2(step) - e))


WEIGHTS = {
    'dorefa': dorefa_weight,
    'lsq': lsq_weight,
    'lsq_plus': lsq_plus_weight,
    'minmax': minmax_weight,
    'ptq': ptq_weight,
    'balanced': balanced_weight,
    'twn': twn_weight,
    'ttq': ttq_weight,
    'syq': syq_weight,
    'xnor': xnor_weight,
    'log2': log2_weight,
    'bnn': xnor_weight,
    'lbw': lbw_weight,
    'inq': inq_weight,
    'fgq': fgq_weight,
    'loss_aware': least_squares_weight,
    'tsq': least_squares_weight,
}
"""Name of a method -> its function of the filters of a group and bits."""


# ---- weights: gradients ---------------------------------------------------------------------------------------------


def dorefa_weight_gradient(w, upstream):
    """c * tanh(w) / max|tanh(w)|, the rounding left out, differentiated; without the constant c."""
    squashed = np.tanh(w)
    top = np.unravel_index(np.abs(squashed).argmax(), w.shape)
    largest = np.abs(squashed[top])
    by_squashed = upstream / largest
    by_squashed[top] -= (upstream * squashed).sum() / largest**2 * np.sign(squashed[top])
    return by_squashed * (1 - squashed**2)


def learned_step_gradient(x, step, lo, hi, upstream, count, inside=True):
    """LSQ, Eq. 3 summed, times the scale 1 / sqrt(N * Qp); `inside=False` leaves out the values that are rounded."""
    v = x / step
    each = np.where(v <= lo, lo, np.where(v >= hi, hi, np.rint(v) - v if inside else 0))
    return (upstream * each).sum() / math.sqrt(count * hi)


def ttq_weight_gradient(w, upstream, t=0.05):
    """TTQ, Eq. 8 with the weights in the scale of the checkpoint."""
    top, (positive, negative) = np.abs(w).max(), ttq_start(w, t)
    return upstream * np.where(w > t * top, positive / top, np.where(w < -t * top, negative / top, 1))


def xnor_weight_gradient(w, upstream):
    """XNOR-Net, section 3.1, for the filters that share alpha."""
    return upstream * (1 / w.size + np.abs(w).mean() * (np.abs(w) <= 1))


BEST_LEVEL = 1.534
"""The level of least squared error in {0, t} for a rectified Gaussian, as a multiple of its mean above 0; a test
computes it anew."""


# ---- activations ----------------------------------------------------------------------------------------------------


def zero_point_of(threshold, low, bits):
    """The code that stands for zero in an unsigned range from about `low` to T, at most in its middle."""
    levels = 2**bits - 1
    return min(max(round(levels * -low / (threshold - low)), 1), levels // 2)


def codes_of(kind, bits, threshold=1.0, low=0.0):
    """Smallest and largest code."""
    zero_point = zero_point_of(threshold, low, bits) if kind == 'zero_point' else 0
    return reference.code_range(bits, kind == 'signed', zero_point=zero_point)


def uniform(x, threshold, kind, bits, low):
    """Evenly spaced levels with the largest at T."""
    lo, hi = codes_of(kind, bits, threshold, low)
    return nearest(x, threshold / hi, lo, hi)


def best_threshold(x, kind, bits, candidates=64):
    """The T of least squared error on an even grid up to max|x|."""
    grid = np.abs(x).max() * np.arange(1, candidates + 1) / candidates
    return grid[np.argmin([((uniform(x, t, kind, bits, x.min()) - x) ** 2).sum() for t in grid])]


def largest_level(step_of, kind, bits, low):
    """T = Qp * s of a method whose paper gives the step s, for the largest code Qp.

    With a zero point (ours) Qp depends on it, and it on T: it is the smallest one that is that of its own T.
    """
    zero_points = range(1, 2 ** (bits - 1)) if kind == 'zero_point' else [0]
    for zero_point in zero_points:
        qp = reference.code_range(bits, kind == 'signed', zero_point=zero_point)[1]
        threshold = qp * step_of(qp)
        if kind != 'zero_point' or zero_point_of(threshold, low, bits) <= zero_point:
            return threshold
    raise AssertionError('at most half of the codes are below zero')


def start_threshold(method, x, kind, bits, wave=None):
    """T of an activation method from the values of calibration.

    Args:
        wave: the step for unit variance of HWGQ and TSQ.
    """
    top, mean = np.abs(x).max(), np.abs(x).mean()
    if method == 'dorefa':
        return 1.0 if kind == 'unsigned' else top
    if method == 'lsq':  # section 2.1
        return largest_level(lambda qp: 2 * mean / math.sqrt(qp), kind, bits, x.min())
    if method in ('lsq_plus', 'ptq'):
        return best_threshold(x, kind, bits)
    if method == 'hwgq':
        sigma = mean * (math.sqrt(math.pi / 2) if kind == 'signed' else math.sqrt(2 * math.pi))
        return largest_level(lambda qp: wave * sigma, kind, bits, x.min())
    if method == 'log2':
        return power_of_two(top)
    if method == 'bnn':
        return mean if kind == 'signed' else BEST_LEVEL * np.abs(x[x != 0]).mean()
    if method == 'tsq':
        sigma = mean * (math.sqrt(math.pi / 2) if kind == 'signed' else math.sqrt(2 * math.pi))
        return sigma * wave * tsq_codes(kind, bits)
    return top  # pact, minmax


def activation(method, x, threshold, kind, bits, low, wave=None):
    """Quantized values for a threshold, the smallest value of calibration, and TSQ's step for unit variance."""
    if method == 'log2':
        signed = kind != 'unsigned'
        out = log_quantize(x, threshold, 2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        return out if signed else np.maximum(out, 0)
    if method == 'hwgq' and kind == 'unsigned':  # section 4.2: any x > 0 gets at least the first level
        step = threshold / (2**bits - 1)
        return np.where(x > 0, step * np.clip(np.rint(x / step), 1, 2**bits - 1), 0)
    if method == 'bnn':  # Eq. 1; 0 or T without a negative half
        return threshold * (np.where(x >= 0, 1, -1) if kind == 'signed' else x > threshold / 2)
    if method == 'tsq':
        return tsq_activation(x, threshold, kind, bits, wave)
    if method == 'lsq_plus' and kind == 'zero_point':  # Eq. 3 and 4
        lo, hi = codes_of(kind, bits, threshold, low)
        return lsq_plus_activation(x, threshold / hi, lo * threshold / hi, bits)
    return uniform(x, threshold, kind, bits, low)


def lsq_plus_activation(x, step, beta, bits):
    """LSQ+, Eq. 3 and 4, with the offset rounded to whole steps."""
    beta = np.rint(beta / step) * step
    return step * np.rint(np.clip((x - beta) / step, 0, 2**bits - 1)) + beta


def lsq_plus_gradients(x, step, beta, bits, upstream, count):
    """LSQ+, Eq. 5 and 6 summed, times LSQ's scale with Qp = 2^k - 1: those of x, s and beta."""
    levels = 2**bits - 1
    v = (x - np.rint(beta / step) * step) / step
    inside = (v > 0) & (v < levels)
    by_step = np.where(inside, np.rint(v) - v, np.where(v <= 0, 0, levels))
    scale = 1 / math.sqrt(count * levels)
    return upstream * inside, scale * (upstream * by_step).sum(), scale * (upstream * ~inside).sum()


def pact_gradient(x, alpha, lo, hi, upstream):
    """PACT, Eq. 3: 1 from alpha on; at the lower end, which is lo / hi * alpha, the derivative of that."""
    return (upstream * np.where(x >= alpha, 1, np.where(x <= lo / hi * alpha, lo / hi, 0))).sum()


def tsq_codes(kind, bits):
    """Levels above 0."""
    return 2 ** (bits - 1) - 1 if kind == 'signed' else 2**bits - 1


def tsq_activation(x, threshold, kind, bits, wave, sparsity=0.625):
    """TSQ: 0 up to epsilon, then the nearest of the levels above 0."""
    count = tsq_codes(kind, bits)
    levels = threshold * np.arange(1, count + 1) / count
    epsilon = NormalDist().inv_cdf(sparsity) * threshold / (wave * count)
    nearest = levels[np.abs(np.abs(x)[..., None] - levels).argmin(-1)]
    return np.where(np.abs(x) > epsilon, np.sign(x) * nearest, 0) * ((x > 0) | (kind == 'signed'))


def sparse_error(end, levels, sparsity):
    """Squared error of x beyond the quantile, x standard normal, with evenly spaced levels up to `end`."""
    epsilon, step = NormalDist().inv_cdf(sparsity), end / levels
    ends = [epsilon, *(max(step * (i + 0.5), epsilon) for i in range(1, levels)), math.inf]
    return sum(_error(step * (i + 1), ends[i], ends[i + 1]) for i in range(levels))


def best_sparse_error(levels, sparsity):
    return min(sparse_error(end / 1000, levels, sparsity) for end in range(500, 6000))


# ---- HWGQ's tables --------------------------------------------------------------------------------------------------


def _density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if x < math.inf else 0.0


def _below(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _error(level, low, high):
    """Integral of (level - x)^2 times the standard normal density."""
    mass, first = _below(high) - _below(low), _density(low) - _density(high)
    second = mass + low * _density(low) - (high * _density(high) if high < math.inf else 0.0)
    return level * level * mass - 2 * level * first + second


def wave_error(step, levels, zero):
    """Squared error of x > 0, x standard normal, with `levels` positive levels, and the level 0 if `zero`."""
    ends = [step * (i + 0.5) for i in range(levels)] + [math.inf]
    if not zero:
        ends[0] = 0.0
    inside = sum(_error(step * (i + 1), ends[i], ends[i + 1]) for i in range(levels))
    return inside + (_error(0.0, 0.0, ends[0]) if zero else 0.0)


def best_wave_step(levels, zero):
    """The step of least squared error, by golden section."""
    low, high, ratio = 0.001, 3.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if wave_error(a, levels, zero) < wave_error(b, levels, zero):
            high = b
        else:
            low = a
    return (low + high) / 2
