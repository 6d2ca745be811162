"""What users do around a quantized layer: hooks that make its weight, checkpoints, half precision, single images."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.kernels import native
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import METHODS, Stage
from gdrq_mm.core.step import after_step, set_stage
from tests.core.networks import quantize
from tests.helpers import Function, few_bits_of_both


def chain(first=nn.Identity, **cfg):
    """Four convolutions with ReLU between them, calibrated, in training, and an input; `first` changes the third."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())))
    first(model[4])
    x = torch.randn(4, 8, 9, 9)
    quantize(model, x, **cfg)
    calibrate(model, [x])
    return model.train(), x


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize(
    ('makes', 'parameter'),
    [
        (weight_norm, 'weight_v'),
        (spectral_norm, 'weight_orig'),
        (lambda layer: prune.l1_unstructured(layer, 'weight', 0.5), 'weight_orig'),
    ],
    ids=['weight_norm', 'spectral_norm', 'prune'],
)
@pytest.mark.filterwarnings('ignore:.*weight_norm.*')
def test_a_weight_that_a_hook_makes_is_the_one_of_this_forward(makes, parameter, grad):
    model, x = chain(makes)
    assert model[4] in quant_layers(model).values()
    model.train(grad)
    with torch.set_grad_enabled(grad):
        model(x)
        with torch.no_grad():
            getattr(model[4], parameter).mul_(torch.randn(8, 8, 3, 3))
        found = model(x)
        layer, before = model[4], model[:4](x)
        quantized = layer.weight_quant(layer.weight)
        expected = model[5:](layer.compute(layer.input_quant(before), quantized, layer.operands(before)[2]))
    torch.testing.assert_close(found, expected)


def test_a_weight_of_torch_parametrizations_stays_float_and_says_so():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    parametrizations.weight_norm(model[1])
    notes = {row.name: row.note for row in quantize(model).layers}
    assert 'has no quantized form' in notes['1'] and '1' not in quant_layers(model)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('between', ['another forward', 'a direct call'])
@pytest.mark.parametrize('method', ['gdrq', 'minmax'])
def test_a_checkpointed_segment_is_computed_again_as_it_was(reentrant, between, method):
    """Whatever ran before it, and between its forward and its backward pass."""
    model, x = chain(method=method, weight=dict(bits=4), activation=dict(bits=4))
    model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = []
    for compute in (lambda part, x: part(x), lambda part, x: checkpoint(part, x, use_reentrant=reentrant)):
        each = copy.deepcopy(model)
        first, part, last = each[:2], each[2:6], each[6:]
        each.forward = lambda x, first=first, run=partial(compute, part), last=last: last(run(first(x)))
        out = each(x) if between == 'another forward' else each.forward(x)
        if between == 'another forward':
            with torch.no_grad():
                each(2 * x)
        out.square().mean().backward()
        found.append([p.grad for p in each.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='autocast of a CPU had bfloat16 alone')
def test_float16_autocast_on_a_cpu():
    model, x = chain()
    expected = model(x)
    with torch.autocast('cpu', torch.float16):
        out = model(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.1)
    out.float().square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('method', METHODS)
def test_a_model_of_another_type(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(4, 8, 9, 9)
    quantize(model, x, **few_bits_of_both(method))
    calibrate(model, [x])
    expected = model.eval()(x)
    model, x = model.to(dtype), x.to(dtype)
    torch.testing.assert_close(model(x).float(), expected, atol=0.2 * float(expected.abs().max()), rtol=0)
    model.train()(x).sum().backward()
    after_step(model)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_an_image_without_a_batch():
    model, x = chain()
    torch.testing.assert_close(model(x[0]), model(x[:1])[0])
    model(x[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('kernels', ['C++', 'torch'])
@pytest.mark.parametrize('training', [True, False])
def test_a_weight_that_is_no_number_shows_in_the_output(training, kernels, monkeypatch):
    """Also where the threshold does not follow the weights."""
    if kernels == 'torch':
        monkeypatch.setattr(native, 'operators', lambda: None)
    model, x = chain()
    set_stage(model, Stage.FREEZE)
    model.train(training)
    with torch.no_grad():
        model[4].weight[3, 0, 0, 0] = torch.nan
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert bool(model[:5](x)[:, 3].isnan().any()) and bool(model(x).isnan().any())
            assert not model[:5](x)[:, :3].isnan().any()


@pytest.mark.parametrize(
    'cfg',
    [
        dict(weight=dict(bits=4, gdrq=dict(clip='project', k=1.5))),
        dict(method='bnn', weight=dict(bits=1), activation=dict(bits=1)),
        dict(method='inq', weight=dict(bits=3)),
    ],
    ids=['project', 'bnn', 'inq'],
)
def test_what_a_step_stores_goes_into_weights_that_learn_alone(cfg):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    ends = dict(a=nn.Linear(8, 8), z=nn.Linear(8, 8))
    model = Function(
        lambda self, x: self.z(self.t(*[self.b(self.a(x))] * 3)[0]), b=nn.Linear(8, 8), t=attention, **ends
    )
    x = torch.randn(4, 5, 8)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        nn.init.normal_(parameter, std=2)
        parameter.requires_grad_(name not in ('b.weight', 't.in_proj_weight'))
    quantize(model, x, **cfg)
    calibrate(model, [x])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model.train()(x)
    for step in range(3):
        after_step(model, step, progress=(step + 1) / 3)
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert moved == {'t.out_proj.weight'}


def heads_that_change_their_weight():
    def normalized(m, x):
        m.head.weight.data = nn.functional.normalize(m.head.weight.data, dim=1)
        return m.head(m.first(x).relu())

    def averaged(m, x):
        with torch.no_grad():
            m.head.weight.mul_(0.5).add_(m.other.weight)
        return m.head(m.first(x).relu()) + m.other(m.first(x).relu())

    return dict(normalized=normalized, averaged=averaged)


@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('way', heads_that_change_their_weight())
def test_a_weight_that_changes_in_the_forward_is_the_new_one(way, grad):
    """As those of cosine heads and of momentum encoders."""
    torch.manual_seed(0)
    layers = dict(first=nn.Linear(8, 16), head=nn.Linear(16, 5, bias=False), other=nn.Linear(16, 5, bias=False))
    model, x = Function(heads_that_change_their_weight()[way], **layers), torch.randn(16, 8)
    quantize(model, x)
    calibrate(model, [x])
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.mul_(7)
        other.head.weight.mul_(7)
    model.train(grad), other.train(grad)
    with torch.set_grad_enabled(grad):
        out = model(x)
        other.in_forward = False
        other._forward_pre_hooks.clear()  # each layer quantizes its weight itself
        torch.testing.assert_close(out, other(x))
