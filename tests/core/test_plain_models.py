"""gdrq_mm.plain with models as people have them: averaged, hooked, half, on several devices, checkpointed in parts."""

import copy
import gc

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import silu
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import gdrq_mm as gq
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.step import set_stage
from tests.helpers import Block, Function, conv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))


def images():
    return torch.randn(4, 3, 8, 8)


def quantized(model, config='w4a4', example=None):
    example = images() if example is None else example
    gq.quantize(model, config, example=example, show=False)
    gq.calibrate(model, [example])
    return model


@pytest.mark.parametrize('decay', [0.9, 0.9995, 0.99998])
def test_an_average_of_buffers_keeps_bits_and_ranges(tmp_path, decay):
    """torch's average cuts integers down, as that of 15 and 15 is 14.999."""
    model = quantized(network()).eval()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    torch.save(gq.checkpoint(average.module), tmp_path / 'average.pth')
    loaded, x = gq.load(network(), tmp_path / 'average.pth').eval(), images()
    states = {name: value for name, value in model.state_dict().items() if name.endswith('.state')}
    assert states and all(torch.equal(loaded.state_dict()[name], value) for name, value in states.items())
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook'])
def test_the_handle_of_a_hook_removes_it_behind_quantize(kind):
    model, calls = network(), []
    handle = getattr(model[3], f'register_{kind}')(lambda *args: calls.append(args))
    quantized(model)
    gc.collect()
    model(images()).sum().backward()
    assert calls
    handle.remove()
    count = len(calls)
    model(images()).sum().backward()
    assert len(calls) == count


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_with_wrong_statistics_is_calibrated(dtype):
    model = network()
    model(images())
    model[1].running_var.mul_(100)
    model, x = model.to(dtype), images().to(dtype)
    quantized(model, example=x)
    assert all(layer.weight_quant.calibrated for layer in quant_layers(model).values())
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize('config', ['w4a4', 'w2a4', 'lsq_w4a4', 'dorefa_w4a4'])
@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_a_half_model_runs_in_each_stage(config, stage):
    model = quantized(network(), config).bfloat16()
    set_stage(model, stage)
    model(images().bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Elsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, device='meta')

    def forward(self, x):
        return self.b(self.a(x).to('meta'))


def test_a_model_on_several_devices_is_refused():
    with pytest.raises(UserError, match='the model is on several devices, cpu, meta; its quantizers need it on one'):
        gq.quantize(Elsewhere(), 'w4a4', example=torch.randn(2, 4), show=False)


def test_data_parallel_is_refused():
    """It calls this method of each module, where there are several devices."""
    with pytest.raises(UserError, match='DistributedDataParallel'):
        quantized(network())[0]._replicate_for_data_parallel()


class Attention(nn.Module):
    """A part of it is computed again in the backward pass, the product with it."""

    def __init__(self, reentrant):
        super().__init__()
        self.qkv, self.last, self.reentrant = nn.Linear(8, 24), nn.Linear(8, 3), reentrant

    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v

    def forward(self, x):
        found = self.attend(x) if self.reentrant is None else checkpoint(self.attend, x, use_reentrant=self.reentrant)
        return self.last(found)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_product_that_is_computed_again_without_its_module_is_refused(reentrant):
    x = torch.randn(2, 5, 8, requires_grad=True)
    model = quantized(Attention(reentrant), example=x.detach())
    with pytest.raises(UserError, match=r'activation checkpointing holds a part .* attention=dict\(bits=32\)'):
        model(x)
    model.eval()
    with torch.no_grad():
        model(x)
    gradients = []
    for each in (None, reentrant):
        torch.manual_seed(0)
        model = quantized(Attention(each), dict(attention=dict(bits=32)), example=x.detach())
        model(x).sum().backward()
        gradients.append(model.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_whole_attention_module_may_be_checkpointed(reentrant):
    x, gradients = torch.randn(2, 5, 8, requires_grad=True), []
    for whole in (False, True):
        torch.manual_seed(0)
        model = quantized(Attention(None), example=x.detach())
        (checkpoint(model, x, use_reentrant=reentrant) if whole else model(x)).sum().backward()
        gradients.append(model.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


class WithCodebook(nn.Module):
    """A part of it has the name that our attribute had."""

    def __init__(self):
        super().__init__()
        self.first, self.quantization = conv(3, 4), conv()

    def forward(self, x):
        return self.quantization(self.first(x))


def test_a_model_may_have_a_part_called_quantization(tmp_path):
    torch.save(gq.checkpoint(quantized(WithCodebook())), tmp_path / 'model.pth')
    assert set(quant_layers(gq.load(WithCodebook(), tmp_path / 'model.pth'))) == {'first', 'quantization'}


@pytest.mark.parametrize(('content', 'kind'), [(torch.zeros(3), 'Tensor'), ([1, 2], 'list'), (4, 'int')])
def test_a_file_of_something_else_is_one_message(tmp_path, content, kind):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=f'is no checkpoint of gdrq_mm.checkpoint: it holds a {kind}'):
        gq.load(network(), tmp_path / 'x.pth')


def test_a_model_without_a_quantizer_left_can_be_frozen():
    model = network()
    gq.quantize(model, dict(weight=dict(bits=32), activation=dict(bits=32)), example=images(), show=False)
    gq.freeze(model)
    with pytest.raises(UserError, match='the model is not quantized'):
        gq.freeze(network())


def test_batches_of_any_kind_have_the_same_sensitivities():
    model, x = network().eval(), images()
    losses = []
    for batch in (
        (x, torch.zeros(4)),
        dict(x=x, y=torch.zeros(4)),
        dict(scale=torch.ones(()), data=dict(x=x), count=[4, 4]),
    ):

        def loss(model, batch):
            given = batch[0] if isinstance(batch, tuple) else batch['x'] if 'x' in batch else batch['data']['x']
            return model(given).square().mean()

        found = gq.allocate(
            model, 'w4a4', example=x, batches=[batch], loss=loss, budget=dict(size=0.3), bits=[2, 4, 8], show=False
        )
        losses.append(found.best.loss)
    assert losses[0] > 0 and losses == pytest.approx([losses[0]] * 3)


# ---- back to float --------------------------------------------------------------------------------------------------


def convolutions():
    parts = dict(a=conv(3, 4), bn=nn.BatchNorm2d(4), block=Block(), up=nn.ConvTranspose2d(4, 6, 2))
    parts['last'] = nn.Linear(6, 3)
    return Function(lambda m, x: m.last(m.up(m.block(silu(m.bn(m.a(x))))).mean((2, 3))), **parts), images()


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    parts = dict(first=nn.Linear(6, 8), layer=layer, last=nn.Linear(8, 3))
    return Function(lambda m, x: m.last(m.layer(m.first(x))), **parts), torch.randn(4, 5, 6)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    mask = torch.arange(5) > torch.tensor([[4], [3], [4], [2]])
    parts = dict(first=nn.Linear(6, 8), encoder=nn.TransformerEncoder(layer, 2), last=nn.Linear(8, 3))
    return Function(lambda m, x: m.last(m.encoder(m.first(x), src_key_padding_mask=mask)), **parts), torch.randn(
        4, 5, 6
    )


def products():
    multiply = Function(lambda m, x: (x @ x.mT).softmax(-1) @ x)
    parts = dict(first=nn.Linear(6, 8), multiply=multiply, last=nn.Linear(8, 3))
    return Function(lambda m, x: m.last(m.multiply(m.first(x)))[:, 0], **parts), torch.randn(4, 5, 6)


def pyramid():
    head = Function(lambda m, levels: [m.layer(x) for x in levels], layer=conv(4, 4))
    parts = dict(a=conv(3, 4), head=head, last=conv(4, 2))
    return Function(lambda m, x: m.last(sum(m.head([m.a(x), m.a(x).relu()]))), **parts), images()


def described(model):
    """Of each module its class, attributes, their values and numbers of hooks; Parameters as objects."""
    modules = {
        name: (type(m), {k: len(v) if '_hooks' in k else v if isinstance(v, int) else '' for k, v in vars(m).items()})
        for name, m in model.named_modules()
    }
    return modules, {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('make', [convolutions, transformer, encoder, products, pyramid])
@pytest.mark.parametrize('config', ['w4a4', dict(method='lsq_plus'), dict(activation=dict(per_level=True))])
def test_to_float_undoes_all_that_quantize_did(make, config):
    model, x = make()
    model.eval()
    before, out, other = described(model), model(x), copy.deepcopy(model)
    at_4_bits = quantized(model, config, x)(x)
    gq.to_float(model)
    assert described(model) == before
    assert torch.equal(model(x), out)
    for each in (model, other):  # it can be quantized again
        assert torch.equal(quantized(each, config, x)(x), at_4_bits)


def test_to_float_keeps_the_weights_that_training_found():
    model = quantized(network())
    model(images()).sum().backward()
    torch.optim.SGD(gq.parameter_groups(model), lr=0.1).step()
    weights, layer = [parameter.detach().clone() for parameter in model.parameters()], model[0]
    gq.to_float(model)
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(model.parameters(), weights, strict=True))
    assert type(model[0]) is nn.Conv2d and model[0].weight is layer.weight


def test_a_hook_of_attention_is_removed_behind_to_float():
    (model, x), calls = transformer(), []
    handle = model.layer.self_attn.register_forward_hook(lambda *args: calls.append(args))
    quantized(model.train(), 'w4a4', x)
    gq.to_float(model)
    calls.clear()
    model(x)
    assert calls
    handle.remove()
    calls.clear()
    model(x)
    assert not calls


def test_a_module_that_hands_attributes_on_stays_as_it_is():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == 'inner' else getattr(self.inner, name)

        def forward(self, x):
            return self.inner(x)

    model, x = pyramid()
    model.head = Around(model.head)
    before = described(model)
    quantized(model, dict(activation=dict(per_level=True)), x)
    gq.to_float(model)
    assert described(model) == before


def test_to_float_takes_a_bare_quantized_model():
    with pytest.raises(UserError, match=r'the model is not quantized: call gdrq_mm\.quantize first'):
        gq.to_float(network())
    with pytest.raises(UserError, match='to_float takes the model itself, not a DataParallel around it'):
        gq.to_float(nn.DataParallel(quantized(network())))
