"""The Triton kernels against the torch code: in Triton's interpreter, as compiled for a GPU, and on one if there is."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gdrq_mm.core import kernels
from gdrq_mm.core.functional import code_range
from gdrq_mm.core.kernels import Uniform, reference
from tests.helpers import ENV

pytest.importorskip('triton', '3.0', reason='the kernels need Triton 3')
from gdrq_mm.core.kernels import gpu

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
computes = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason='needs a GPU')

VALUES = (
    st.floats(width=32, allow_infinity=False) | st.floats(-4, 4, width=32) | st.integers(-9, 9).map(lambda n: n / 2)
)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7), elements=VALUES)
STEPS = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.25, 0.5, 1.0])
RANGES = st.tuples(st.integers(2, 8), st.booleans(), st.integers(0, 1)).map(
    lambda v: code_range(v[0], v[1], zero_point=0 if v[1] else v[2])
)
# The interpreter cuts the digits that a bfloat16 does not hold off; a GPU rounds.
DTYPES = st.sampled_from([torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16])
LAYOUTS = st.sampled_from(
    [lambda x: x, lambda x: x.transpose(0, -1), lambda x: x[..., ::2], lambda x: x.expand(3, *x.shape)]
)
many = settings(deadline=None, max_examples=60)


def tensor(values, dtype, layout):
    return layout(torch.from_numpy(values).to(DEVICE, dtype)).detach().requires_grad_()


def equal(one, other):
    """To the last bit, where NaN is NaN."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def both(ours, theirs, inputs):
    """Outputs and gradients of two functions."""
    found, upstream = [], None
    for function in (ours, theirs):
        out = function(*inputs)
        upstream = torch.randn_like(out) if upstream is None else upstream
        found.append((out, *torch.autograd.grad(out, inputs, upstream)))
    return found


def test_in_the_interpreter():
    """The tests of this file once more, in a process where Triton interprets its kernels with NumPy."""
    if INTERPRETED:
        pytest.skip('runs already')
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-rs', __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV | {'TRITON_INTERPRET': '1'})
    assert done.returncode == 0 and '\n4 passed, ' in done.stdout, done.stdout


@computes
@many
@given(ARRAYS, DTYPES, LAYOUTS, STEPS, RANGES, st.booleans(), st.booleans())
def test_quantized_values_gradients_and_sums(values, dtype, layout, step, ends, masked, nonzero):
    x, step = tensor(values, dtype, layout), torch.tensor(step, device=DEVICE)
    if not gpu.takes(x, step):
        return
    sums = torch.ones(2, dtype=torch.float64, device=DEVICE)
    ours, theirs = both(
        lambda x: gpu.FakeQuantize.apply(x, step, *ends, masked, sums, nonzero, 1),
        lambda x: reference.FakeQuantize.apply(x, step, *ends, masked, 1),
        [x],
    )
    equal(ours, theirs)
    count = torch.count_nonzero(x) if nonzero else torch.tensor(x.numel(), device=DEVICE)
    expected = 1 + torch.stack([reference.sum_abs(x.detach().float()), count.double()])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0, equal_nan=True)


@computes
@many
@given(
    ARRAYS,
    DTYPES,
    STEPS,
    RANGES.map(lambda ends: (*ends, 1)) | st.sampled_from([(-3, 3, 2), (-7, 7, 2)]),
    st.integers(0, 99),
)
def test_a_step_for_each_filter(values, dtype, step, levels, seed):
    x = tensor(values, dtype, lambda x: x)
    torch.manual_seed(seed)
    steps = (step * torch.rand(len(x), *[1] * (x.dim() - 1))).to(DEVICE)
    assert gpu.takes(x, steps)
    *ends, apart = levels
    ours, theirs = both(
        lambda x: gpu.FakeQuantize.apply(x, steps, *ends, True, None, False, apart),
        lambda x: reference.FakeQuantize.apply(x, steps, *ends, True, apart),
        [x],
    )
    equal(ours, theirs)


@computes
@many
@given(ARRAYS, DTYPES, LAYOUTS, STEPS, RANGES, st.floats(0, 2), st.booleans())
def test_a_step_that_learns(values, dtype, layout, step, ends, scale, within):
    x, step = tensor(values, dtype, layout), torch.tensor(step, device=DEVICE, requires_grad=True)
    if not gpu.takes(x, step):
        return
    ours, theirs = both(
        lambda x, step: gpu.LearnedStep.apply(x, step, *ends, scale, within),
        lambda x, step: reference.LearnedStep.apply(x, step, *ends, scale, within),
        [x, step],
    )
    equal(ours[:2], theirs[:2])
    torch.testing.assert_close(ours[2], theirs[2], equal_nan=True)


@computes
def test_a_tensor_of_many_blocks():
    x, step = torch.randn(3, 50, 41, 37, device=DEVICE, requires_grad=True), torch.tensor(0.3, device=DEVICE)
    sums = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    ours, theirs = both(
        lambda x: gpu.FakeQuantize.apply(x, step, -7, 7, True, sums, True, 1),
        lambda x: reference.FakeQuantize.apply(x, step, -7, 7, True, 1),
        [x],
    )
    equal(ours, theirs)
    expected = torch.stack([reference.sum_abs(x.detach()), torch.count_nonzero(x).double()])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_tensors_on_a_gpu_take_the_kernels():
    x = torch.randn(2, 3, 4, 5, device='cuda', requires_grad=True)
    step = torch.tensor(0.3, device='cuda', requires_grad=True)
    assert kernels.fake_quantize(x, Uniform(step.detach(), 0, 15)).grad_fn.name() == 'FakeQuantizeBackward'
    assert kernels.triton_of(x, step) is gpu


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason='nothing is compiled')
@pytest.mark.parametrize('capability, dtype', [(75, 'fp32'), (90, 'bf16')])
def test_they_compile_for_a_gpu_to_exact_arithmetic(capability, dtype):
    """Division rounds to nearest, products and sums are not fused, and small numbers are not flushed to zero."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tensors, numbers = (
        dict.fromkeys(['grad', 'x', 'out'], f'*{dtype}'),
        dict(n='i32', inner='i32', lo='fp32', hi='fp32'),
    )
    types = {**tensors, **numbers, 'steps': '*fp32', 'step': '*fp32', 'parts': '*fp64'}
    values = dict(ADD=True, ROWS=True, WITHIN=True, BLOCK=gpu.BLOCK)
    divisions = []
    for kernel in (gpu._quantize, gpu._mask, gpu._learn):
        constants = {name: values[name] for name in kernel.arg_names if name in values}
        signature = {name: types.get(name, 'constexpr') for name in kernel.arg_names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        target = GPUTarget('cuda', capability, 32)
        code = triton.compile(source, target=target, options=dict(enable_fp_fusion=False)).asm['ptx']
        assert not re.search(r'\bfma\.|\.ftz|\.approx|div\.full', code)
        assert kernel is not gpu._quantize or dtype == 'fp32' or 'cvt.rn.bf16' in code
        divisions.append('div.rn.f32' in code)
    assert divisions == [True, False, True]
