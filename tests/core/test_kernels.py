"""The C++ kernels against the torch code that they stand for, to the last bit."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core import kernels
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.functional import code_range
from gdrq_mm.core.kernels import Uniform, native
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.step import after_step
from tests.core.networks import quantize
from tests.helpers import Block, Net, same

settings.register_profile('kernels', deadline=None, max_examples=100)
settings.load_profile('kernels')

OPERATORS = native.operators()
pytestmark = pytest.mark.skipif(OPERATORS is None, reason='the kernels are not built here')

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-4, 4, width=32)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=7), elements=FLOATS)
STEPS = st.floats(0, 2.0**100, width=32) | st.floats(0.0078125, 1, width=32)
RANGES = st.tuples(st.integers(2, 8), st.sampled_from(['unsigned', 'signed', 'full', 'zero_point'])).map(
    lambda v: code_range(v[0], v[1] in ('signed', 'full'), v[1] != 'full', zero_point=2 if v[1] == 'zero_point' else 0)
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
LAYOUTS = st.sampled_from(
    [lambda x: x, lambda x: x.transpose(0, -1), lambda x: x[..., ::2], lambda x: x.expand(3, *x.shape)]
)


@pytest.fixture
def reference(monkeypatch):
    """Switch the kernels off: `reference()`, until the end of the test."""
    return lambda: monkeypatch.setattr(native, 'operators', lambda: None)


def bits_of(tensor):
    """The bits of a float tensor as integers, so that -0 is not 0; any NaN is one NaN."""
    wide = torch.where(torch.isnan(tensor), torch.nan, tensor.float())
    return wide.contiguous().view(torch.int32)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(bits_of(one), bits_of(other))


def both(compute, *tensors):
    """Value and gradients of a function by the kernels and by the torch code, with one upstream gradient."""
    found = []
    for operators in (OPERATORS, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, 'operators', lambda operators=operators: operators)
            leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
            out = compute(*leaves)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    return found


@given(ARRAYS, STEPS, RANGES, DTYPES, LAYOUTS, st.booleans())
def test_fake_quantize_and_its_gradient(x, step, ends, dtype, layout, masked):
    how = Uniform(torch.tensor(step), *ends, masked)
    ours, theirs = both(lambda x: kernels.fake_quantize(layout(x), how), torch.from_numpy(x).to(dtype))
    assert all(map(same_bits, ours, theirs))


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf, -0.0, 1e38, -1e-45])
@pytest.mark.parametrize('ends', [(0, 15), (-7, 7), (0, 255)])
def test_values_at_the_edge_of_floats(value, ends):
    x = torch.tensor([value, 1.0, value])
    ours, theirs = both(lambda x: kernels.fake_quantize(x, Uniform(torch.tensor(0.5), *ends)), x)
    assert all(map(same_bits, ours, theirs))


@given(ARRAYS, STEPS, RANGES, DTYPES, st.booleans())
def test_what_is_measured_in_the_same_pass(x, step, ends, dtype, nonzero):
    x, sums = torch.from_numpy(x).to(dtype), torch.tensor([1.5, 2.0], dtype=torch.float64)
    kernels.fake_quantize(x, Uniform(torch.tensor(step), *ends, sums=sums, nonzero=nonzero))
    count = np.count_nonzero(x.double()) if nonzero else x.numel()
    np.testing.assert_allclose(sums[0], 1.5 + x.double().abs().sum(), rtol=1e-12)
    assert sums[1] == 2 + count


@pytest.mark.parametrize('threads', [1, 2, 3])
def test_sums_do_not_depend_on_the_number_of_threads(threads):
    x, found = torch.randn(3, 5, 217, 131, generator=torch.Generator().manual_seed(0)), []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        sums = torch.zeros(2, dtype=torch.float64)
        kernels.fake_quantize(x, Uniform(torch.tensor(0.25), -7, 7, sums=sums))
        found.append(sums)
    torch.set_num_threads(before)
    assert torch.equal(*found)


@given(ARRAYS, st.floats(0.0078125, 4, width=32) | st.just(0.0), RANGES, DTYPES, LAYOUTS, st.booleans())
def test_a_learned_step_and_its_gradients(x, step, ends, dtype, layout, within):
    assume(np.abs(x).max() < 1e30)  # else sums are infinite in another order

    def compute(x, step):
        return kernels.learned_step(layout(x), step, *ends, 0.125, within)

    ours, theirs = both(compute, torch.from_numpy(x).to(dtype), torch.tensor(step))
    assert all(map(same_bits, ours[:2], theirs[:2]))
    torch.testing.assert_close(ours[2], theirs[2], rtol=3e-7, atol=0)  # the sum is a float64 in both


# ---- layers -------------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=1, bias=False),
    dict(kernel_size=3, stride=2, padding=(2, 1), dilation=2),
    dict(kernel_size=(3, 1), groups=4, bias=False),
]


def trained(model, x, steps=3, amp=False):
    """State, outputs and gradients of a quantized model over some steps of training."""
    torch.manual_seed(1)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            out = model.train()(x)
        out.float().square().mean().backward()
        found.append((out.detach(), *(p.grad.clone() for p in model.parameters())))
        optimizer.step()
        after_step(model)
    return found, model.state_dict()


def compare(make, x, reference, amp=False, **cfg):
    """Train a quantized model with the kernels and by the torch code: all that comes out is the same, to the last bit.

    Returns the model before training and the names of the operators that ran in a step.
    """
    torch.manual_seed(0)
    model = make()
    quantize(model, x, **cfg)
    calibrate(model, [x])
    with torch.profiler.profile() as profile:
        trained(copy.deepcopy(model), x, steps=1, amp=amp)
    ran = {event.key for event in profile.key_averages() if event.key.startswith('gdrq_mm::')}
    ours = trained(copy.deepcopy(model), x, amp=amp)
    reference()
    theirs = trained(copy.deepcopy(model), x, amp=amp)
    for one, other in zip(ours[0], theirs[0]):
        assert all(map(same_bits, one, other))
    assert all(same_bits(value, theirs[1][name]) for name, value in ours[1].items() if value.is_floating_point())
    return model, ran


@pytest.mark.parametrize('bits', [2, 4, 6, 8])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('options', CONVOLUTIONS, ids=lambda o: ' '.join(o))
def test_a_convolution(options, layout, bits, reference):
    def make():
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, **options), nn.Conv2d(8, 4, 1)).to(
            memory_format=layout
        )

    x = torch.randn(3, 4, 9, 8).to(memory_format=layout)
    _, ran = compare(make, x, reference, weight=dict(bits=bits), activation=dict(bits=bits))
    assert 'gdrq_mm::layer' in ran


@pytest.mark.parametrize('shape', [(6, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_a_linear_layer(shape, reference):
    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3))

    _, ran = compare(make, torch.randn(shape), reference, weight=dict(bits=4), activation=dict(bits=4))
    assert 'gdrq_mm::layer' in ran


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('deployable', [False, True])
def test_a_residual_network(deployable, amp, reference):
    x = torch.randn(4, 4, 8, 8)
    _, ran = compare(lambda: Net(Block(), Block(True)), x, reference, amp=amp, deployable=deployable)
    assert {'gdrq_mm::layer', 'gdrq_mm::codes_of_weights', 'gdrq_mm::sums_of_filters'} <= ran
    assert ('gdrq_mm::fake_quantize_' in ran) == deployable


# The gradient of a learned step is a sum in another order: test_a_learned_step_and_its_gradients
@pytest.mark.parametrize('method', ['gdrq', 'minmax', 'dorefa', 'hwgq', 'ptq'])
def test_every_method_without_a_learned_step(method, reference):
    def make():
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))

    compare(make, torch.randn(3, 4, 9, 8), reference, method=method, weight=dict(bits=4), activation=dict(bits=4))


@pytest.mark.parametrize(
    'options',
    [
        dict(weight=dict(bits=4, gdrq=dict(gradient='straight_through'))),
        dict(activation=dict(bits=4, gdrq=dict(gradient='straight_through', mean='all'))),
        dict(weight=dict(bits=4, groups='channel', gdrq=dict(clip='project', levels='full'))),
        dict(weight=dict(bits=4, gdrq=dict(threshold='search'))),
        dict(weight=dict(bits=2, gdrq=dict(threshold='search', gradient='straight_through'))),
        dict(weight=dict(bits=2, gdrq=dict(levels='narrow'))),
        dict(weight=dict(bits=3, groups='channel', gdrq=dict(levels='without_zero', clip='project'))),
    ],
    ids=str,
)
def test_every_option(options, reference):
    def make():
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))

    compare(make, torch.randn(3, 4, 9, 8), reference, **options)


def test_a_frozen_layer_and_an_input_without_gradient(reference):
    def make():
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
        model[2].bias.requires_grad_(True)
        return model

    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 4, 9, 9)
    quantize(model, x)
    calibrate(model, [x])
    model.train()(x).sum().backward()
    ours = model[2].bias.grad.clone(), model[4].weight.grad.clone()
    model.zero_grad()
    reference()
    model(x).sum().backward()
    assert same_bits(ours[0], model[2].bias.grad) and same_bits(ours[1], model[4].weight.grad)
    assert model[0].weight.grad is None and model[2].weight.grad is None


# ---- what is saved ------------------------------------------------------------------------------------------------


def chain(**cfg):
    """Convolutions with ReLU between them, quantized and calibrated, in training, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))))
    x = torch.randn(4, 8, 32, 32)
    quantize(model, x, **cfg)
    calibrate(model, [x])
    return model.train(), x


def test_a_layer_saves_a_byte_a_value(reference):
    """ReLU, quantizer and convolution share it: float training would save four bytes a value."""
    model, x = chain(weight=dict(bits=4), activation=dict(bits=4))
    values = x.numel()
    allocated = []
    for _ in range(2):
        with torch.profiler.profile(profile_memory=True) as profile:
            out = model(x)
        allocated.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        del out
        reference()
    # The first layer's input and the last ReLU's output are float; two layers of 4 bits save a byte a value.
    assert allocated[0] < allocated[1] - 2 * 2 * 3 * values


def test_an_output_of_relu_that_was_changed_is_an_error():
    conv = chain()[0][2]
    y = torch.randn(2, 8, 9, 9, requires_grad=True).mul(1).relu()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        kernels.fake_quantize(y, Uniform(torch.tensor(0.1), 0, 15))
    assert conv is not None


def test_others_may_read_the_output_of_relu(reference):
    x = torch.randn(2, 8, 9, 9)

    def compute(x):
        y = x.mul(1).relu_()
        return kernels.fake_quantize(y, Uniform(torch.tensor(0.1), 0, 15)) + y.sin() + y.square()

    ours, theirs = both(compute, x)
    assert all(map(same_bits, ours, theirs))


@pytest.mark.parametrize('outside', [[], [40_000], [0, 32_767, 98_304], [32_768, 65_535]])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_piece_without_values_outside_of_the_range_needs_no_mask(outside, dtype):
    """A gradient that nobody else holds is masked in place, in pieces of 32768 values."""
    x = torch.rand(3 * 32_768 + 1).to(dtype)
    x[outside] = 2

    def compute(x):
        return kernels.fake_quantize(x.mul(1), Uniform(torch.tensor(0.01), 0, 127)).mul(3)

    ours, theirs = both(compute, x)
    assert all(map(same_bits, ours, theirs))
    assert (ours[1] == 0).sum() == len(outside)


LOOKS = 'nobody, hook before, hook after, retain before, retain, ask, read before, change after, read after, twice'


@pytest.mark.parametrize('look', LOOKS.split(', '))
@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('reader', ['quantizer', 'layer'])
def test_the_gradient_of_a_relu_is_seen_by_whoever_looks(look, inplace, reader):
    """Its reader puts a function of its own in place of the backward pass of the ReLU in front."""
    seen, layer = [], chain(weight=dict(bits=4), activation=dict(bits=4))[0][2]

    def read(y):
        return layer(y) if reader == 'layer' else kernels.fake_quantize(y, Uniform(torch.tensor(0.1), 0, 15))

    def watch(grad):
        seen.append(grad.clone())
        return grad * 3

    def compute(x):
        made = x.mul(2)
        y = torch.relu_(made) if inplace else torch.relu(made)
        del made
        other = y.sin() if look == 'read before' else 0
        if look == 'hook before':
            y.register_hook(watch)
        if look == 'retain before':
            y.retain_grad()
        out = read(y)
        if look == 'hook after':
            y.register_hook(watch)
        if look == 'retain':
            y.retain_grad()
        if look.startswith('retain'):
            out.sum().backward(retain_graph=True)
            seen.append(y.grad)
        if look == 'ask':
            seen.append(torch.autograd.grad(out.square().sum() + y.sum(), y, retain_graph=True)[0])
        if look == 'change after':
            other = y.mul(1).add_(1)
        if look == 'read after':
            other = y.cos()
        del y
        if look == 'twice':
            seen.append(torch.autograd.grad(out.sum(), x, retain_graph=True)[0])
        return out + other

    ours, theirs = both(compute, torch.randn(2, 8, 9, 9))
    assert all(map(same_bits, ours, theirs))
    assert len(seen) in (0, 2) and all(same_bits(seen[0], each) for each in seen)


def test_a_second_backward_pass_needs_the_graph():
    y = torch.randn(2, 3, requires_grad=True).mul(1).relu()
    out = kernels.fake_quantize(y, Uniform(torch.tensor(0.1), 0, 15)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        y.sum().backward()


@pytest.mark.parametrize('module', [nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Sigmoid(), nn.ReLU(), nn.Identity()])
def test_an_output_is_overwritten_only_where_its_maker_does_without_it(module):
    how = Uniform(torch.tensor(0.05), -127, 127)
    x = torch.randn(2, 3, 5, 5)

    def compute(x):
        return kernels.fake_quantize(module(x.mul(1)), how, overwrite=True)

    ours, theirs = both(compute, x)
    assert all(map(same_bits, ours, theirs))
    out = module(x.clone().requires_grad_().mul(1))
    overwritten = kernels.fake_quantize(out, how, overwrite=True).data_ptr() == out.data_ptr()
    assert overwritten == isinstance(module, (nn.BatchNorm2d, nn.Conv2d))


def test_a_hook_sees_the_output_before_it_is_quantized():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    x, seen = torch.randn(2, 4, 6, 6), []
    quantize(model, x, deployable=True)
    calibrate(model, [x])
    handle = model[1].output_quant.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(x)
    handle.remove()
    assert len(seen[0].unique()) > 255


def test_somebody_who_looks_at_a_quantizer_sees_its_values():
    model, x = chain()
    seen = []
    handles = [
        model[2].own_input_quant.register_forward_hook(lambda *args: seen.append(args[2])),
        model[4].weight_quant.register_forward_hook(lambda *args: seen.append(args[2])),
    ]
    model(x)
    for handle in handles:
        handle.remove()
    assert len(seen[0].unique()) <= 8 and len(seen[1].unique()) <= 4 * 4


# ---- other ways to run a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing(reentrant):
    model, x = chain(weight=dict(bits=4), activation=dict(bits=4))
    other = copy.deepcopy(model)
    other.forward = lambda x: other[6:](checkpoint(other[2:6], other[:2](x), use_reentrant=reentrant))
    for each in (model, other):
        each(x).square().mean().backward()
        after_step(each)
    assert all(same_bits(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))
    assert same(model.state_dict(), other.state_dict())


def test_two_forwards_before_a_backward():
    model, x = chain()
    (model(x).square().mean() + model(2 * x).mean()).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    model(2 * x).mean().backward()
    for one, p in zip(ours, model.parameters()):
        torch.testing.assert_close(one, p.grad)


def test_a_graph_that_is_kept_can_be_used_twice():
    model, x = chain()
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.backward()
    assert all(same_bits(a, p.grad) for a, p in zip(once, model.parameters()))


def test_a_gradient_that_somebody_keeps_is_not_masked_in_place():
    x = torch.linspace(-2, 2, 9).requires_grad_()
    out = kernels.fake_quantize(x.mul(1), Uniform(torch.tensor(0.1), 0, 3))
    kept = torch.ones(9)
    out.backward(kept)
    assert torch.equal(kept, torch.ones(9)) and x.grad.unique().tolist() == [0, 1]


def test_second_derivatives_are_an_error():
    model, x = chain()
    with pytest.raises(RuntimeError, match='second derivatives of a quantized layer need GDRQ_KERNELS=off'):
        torch.autograd.grad(model(x).sum(), model[0].weight, create_graph=True)


def test_a_weight_that_changes_between_two_forwards():
    """By an optimizer that writes to .data, too."""
    model, x = chain()
    before = model(x)
    model[2].weight.data.mul_(-1)
    after, layer = model(x), model[2]
    assert not torch.equal(before, after)
    with torch.no_grad():
        once = model.eval()(x)
        layer.weight.data.mul_(-1)
        assert not torch.equal(model(x), once)


def test_a_forward_that_fails_leaves_no_weights_behind():
    model, x = chain()
    model[3].forward = None
    with pytest.raises(TypeError):
        model(x)
    assert all(layer.weight_quant.codes_in_use(layer.filters()) is None for layer in quant_layers(model).values())
