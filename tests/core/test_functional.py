"""gdrq_mm/core/functional.py against the NumPy reference, and its laws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gdrq_mm.core import functional as F
from tests import reference

settings.register_profile('default', deadline=None, max_examples=60)
settings.load_profile('default')

BITS = st.integers(2, 8)
VALUES = st.floats(-10, 10, width=32, allow_subnormal=False)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6), elements=VALUES)
WEIGHTS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=VALUES)


def quantize(x, threshold, bits, signed=True, **kwargs):
    lo, hi = F.code_range(bits, signed, **kwargs)
    return F.fake_quantize(x, F.step_size(torch.as_tensor(threshold, dtype=x.dtype), lo, hi), lo, hi)


@given(ARRAYS, st.floats(0.125, 8, width=32), BITS, st.sampled_from(['signed', 'full', 'unsigned', 'zero_point']))
def test_quantize_equals_the_reference(x, threshold, bits, kind):
    signed, narrow = kind in ('signed', 'full'), kind != 'full'
    zero_point = 1 if kind == 'zero_point' else 0
    ours = quantize(torch.from_numpy(x).double(), threshold, bits, signed, narrow_range=narrow, zero_point=zero_point)
    expected = reference.quantize(x.astype(np.float64), threshold, bits, signed, narrow, zero_point)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-12)


@given(ARRAYS, st.floats(0.125, 8, width=32), BITS, st.booleans())
def test_at_most_two_to_the_bits_levels(x, threshold, bits, signed):
    assert len(torch.unique(quantize(torch.from_numpy(x), threshold, bits, signed))) <= 2**bits


@given(ARRAYS, st.floats(0.125, 8, width=32), BITS, st.integers(-6, 6))
def test_scaling_by_a_power_of_two_scales_the_result(x, threshold, bits, power):
    x, c = torch.from_numpy(x), 2.0**power
    assert torch.equal(quantize(c * x, c * threshold, bits), c * quantize(x, threshold, bits))


@given(ARRAYS, st.floats(0.125, 8, width=32), BITS)
def test_signed_is_odd(x, threshold, bits):
    x = torch.from_numpy(x)
    assert torch.equal(quantize(-x, threshold, bits), -quantize(x, threshold, bits))


@given(ARRAYS, st.floats(0.125, 8, width=32), BITS, st.booleans())
def test_quantizing_twice_is_quantizing_once(x, threshold, bits, signed):
    once = quantize(torch.from_numpy(x), threshold, bits, signed)
    assert torch.equal(quantize(once, threshold, bits, signed), once)


@given(WEIGHTS, st.integers(1, 6), st.floats(0.5, 12))
def test_scale_clip_threshold_equals_the_reference(weight, groups, k):
    groups = min(groups, len(weight))
    sizes = torch.tensor(F.group_sizes(len(weight), groups))
    ours = F.scale_clip_threshold(torch.from_numpy(weight), k, sizes)
    expected = reference.scale_clip_threshold(weight.astype(np.float64), k, groups)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 300), st.integers(1, 300))
def test_group_sizes(channels, groups):
    groups = min(groups, channels)
    sizes = F.group_sizes(channels, groups)
    assert sum(sizes) == channels and len(sizes) == groups and max(sizes) - min(sizes) <= 1
    expected = np.bincount(reference.groups_of(channels, groups))
    assert sizes == expected.tolist()


@given(WEIGHTS, st.sampled_from([1.0, 2.0]), BITS)
def test_quantized_loss_equals_the_reference(weight, p, bits):
    quantized = reference.quantize(weight.astype(np.float64), 1.0, bits)
    ours = F.quantized_loss(torch.from_numpy(weight).double(), torch.from_numpy(quantized), p=p)
    assert float(ours) == pytest.approx(reference.quantized_loss(weight.astype(np.float64), quantized, p), rel=1e-9)


@given(WEIGHTS, BITS)
def test_search_is_no_worse_than_any_candidate(weight, bits):
    weight = torch.from_numpy(weight)
    lo, hi = F.code_range(bits, True)
    sizes = torch.tensor([len(weight)])
    best = F.search_threshold(weight, lo, hi, sizes, candidates=16)
    loss = F.quantized_loss(weight, quantize(weight, best, bits), p=2)
    for i in range(1, 17):
        threshold = weight.abs().max() * (i / 16)
        assert loss <= F.quantized_loss(weight, quantize(weight, threshold, bits), p=2) + 1e-9


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'strided', 'large'])
def test_gradient_is_one_inside_and_zero_outside(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 300, 100) if layout == 'large' else torch.randn(2, 8, 9, 7)
    if layout == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    if layout == 'strided':
        x = x[:, ::2]
    x = x.detach().requires_grad_()
    step = torch.tensor(0.25)
    grad = torch.randn_like(x)
    y = F.fake_quantize(x, step, -3, 4)
    assert torch.equal(y, step * torch.clamp(torch.round(x / step), -3, 4))
    y.backward(grad)
    assert torch.equal(x.grad, grad * ((x >= -0.75) & (x <= 1.0)))


def test_straight_through_gradient_is_one_everywhere():
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    F.fake_quantize(x, torch.tensor(0.5), -1, 1, 'straight_through').sum().backward()
    assert torch.equal(x.grad, torch.ones(50))
    x.grad = None
    F.clip(x, torch.tensor(1.0), 'straight_through').sum().backward()
    assert torch.equal(x.grad, torch.ones(50))


def test_clip_masks_the_gradient():
    x = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    y = F.clip(x, torch.tensor(1.0))
    y.sum().backward()
    assert y.tolist() == [-1, -0.5, 0.5, 1] and x.grad.tolist() == [0, 1, 1, 0]


def test_learned_step_gradient():
    """LSQ's gradient of the step, Eq. 3, value by value."""
    x = torch.tensor([-3.0, -0.3, 0.2, 0.6, 5.0], dtype=torch.double, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.double, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.double)
    F.learned_step_quantize(x, step, -1, 1, 0.1).backward(upstream)
    v = (x / step).detach()
    each = torch.where(v <= -1, -1.0, torch.where(v >= 1, 1.0, v.round() - v))
    assert float(step.grad) == pytest.approx(float((upstream * each).sum() * 0.1), rel=1e-5)
    assert x.grad.tolist() == [0, 2, 3, 0, 0]


def test_dead_group_gives_zero_and_no_nan():
    x = torch.randn(4, 3, 3, 3)
    x[2:] = 0
    sizes = torch.tensor([2, 2])
    step = F.per_channel(F.step_size(F.scale_clip_threshold(x, 2.0, sizes), -7, 7), sizes, x.shape)
    y = F.fake_quantize(x.requires_grad_(), step, -7, 7)
    y.sum().backward()
    assert torch.equal(y[2:], torch.zeros_like(y[2:])) and torch.isfinite(x.grad).all()
    assert F.fake_quantize(torch.randn(5), torch.tensor(0.0), 0, 15).tolist() == [0] * 5


def test_half_precision_is_computed_in_float32():
    x = torch.randn(1000).bfloat16()
    step = torch.tensor(0.1)
    expected = (step * torch.clamp(torch.round(x.float() / step), -7, 7)).bfloat16()
    assert torch.equal(F.fake_quantize(x, step, -7, 7), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(st.floats(0, 2, width=32), BITS, st.sampled_from(['signed', 'unsigned', 'zero_point']), st.integers(0, 99))
def test_the_gradient_mask_holds_the_ends_in_every_type(dtype, step, bits, kind, seed):
    lo, hi = F.code_range(bits, kind == 'signed', zero_point=1 if kind == 'zero_point' else 0)
    step, generator = torch.tensor(step), torch.Generator().manual_seed(seed)
    ends = torch.stack([lo * step, hi * step])
    inner = torch.randn(30, generator=generator) * step * hi
    x = torch.cat([ends, ends * 1.001, ends * 0.999, inner]).to(dtype).requires_grad_()
    upstream = torch.randn(36, generator=generator).to(dtype)
    F.fake_quantize(x, step, lo, hi).backward(upstream)
    values = x.detach().double()
    assert torch.equal(x.grad, upstream * ((values >= ends[0].double()) & (values <= ends[1].double())))


def test_clipping_leaves_a_uniform_distribution_alone_from_k_2():
    uniform = torch.linspace(-1, 1, 10001)[:, None]
    sizes = torch.tensor([len(uniform)])
    assert float(F.scale_clip_threshold(uniform, 2.0, sizes)) == pytest.approx(1.0, rel=1e-3)


def test_distance_to_uniform_orders_the_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20000, generator=generator)
    gaussian = torch.randn(20000, generator=generator)
    assert F.distance_to_uniform(uniform) < 0.02 < 0.3 < F.distance_to_uniform(gaussian)
