"""gdrq_mm.plain: the functions for a plain torch loop."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn as nn

import gdrq_mm as gq
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import Stage
from tests.helpers import Block, conv, same


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block(True), nn.Flatten(), nn.Linear(256, 5)
    )


def images(count=4):
    return torch.randn(count, 3, 8, 8)


def quantized(config='w4a4', **kwargs):
    model = network()
    gq.quantize(model, config, example=images(), show=False, **kwargs)
    gq.calibrate(model, [(images(), torch.zeros(4)) for _ in range(2)])
    return model


def train(model, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(gq.parameter_groups(model, weight_decay=1e-4), lr=0.05)
    model.train()
    losses = []
    torch.manual_seed(1)
    x = images(20)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), torch.arange(20) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gq.after_step(model)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize('config', ['w4a4', 'w2a4', 'lsq_w4a4', 'lsq_plus_w3a3', dict(method='pact', deployable=False)])
def test_a_plain_loop_learns(config):
    model = quantized(config)
    losses = train(model, 40)
    assert losses[-1] < 0.5 * losses[0]
    gq.freeze(model)
    assert {q.stage for q in activation_quantizers(model).values()} == {Stage.FREEZE}


@pytest.mark.parametrize('config, bits', [('w4a4', (4, 4)), ('gdrq_w2a3', (2, 3)), ('lsq_w8a8', (8, 8))])
def test_bits_are_named_as_the_base_configs_are(config, bits):
    model = network()
    gq.quantize(model, config, example=images(), show=False)
    assert quant_layers(model)['3.conv1'].bits == bits
    assert quant_layers(model)['0'].bits == quant_layers(model)['6'].bits == (8, 8)


@pytest.mark.parametrize('config', ['4bit', 'w4', 'nothing_w4a4', dict(weigth=dict(bits=4)), 'w1a4'])
def test_a_wrong_config_is_one_message_and_changes_nothing(config):
    model = network()
    with pytest.raises(UserError, match=r'config|quantization'):
        gq.quantize(model, config, example=images())
    assert not quant_layers(model)


def test_the_table_says_what_was_quantized_and_what_not(capsys):
    model = network()
    model.append(nn.Conv1d(1, 1, 1))
    model[6] = nn.Sequential(nn.Linear(256, 5), nn.Unflatten(1, (1, 5)))
    gq.quantize(model, dict(weight=dict(bits=4), skip=['4.downsample.*']), example=images())
    text = capsys.readouterr().out
    assert 'float: skipped by config' in text and 'Conv1d has no quantized form' in text and 'first' in text


def test_example_may_be_several_arguments_or_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 4)

        def forward(self, x, scale):
            return self.b(self.a(x) * scale)

    for example in ((images(), 2.0), dict(x=images(), scale=2.0)):
        assert gq.quantize(Two(), 'w4a4', example=example, show=False).plan.calls == {'': 1, 'a': 1, 'b': 1}


def test_calibrate_restores_modes_and_statistics():
    model = network()
    gq.quantize(model, 'w4a4', example=images(), show=False)
    model.train()
    model[3].eval()
    train_first = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k or 'tracked' in k}
    gq.calibrate(model, iter(images() for _ in range(100)))
    assert train_first == [module.training for module in model.modules()]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(q.calibrated for q in activation_quantizers(model).values())


def test_calibrate_uses_as_many_batches_as_the_config_says():
    model = network()
    gq.quantize(model, dict(calibration_batches=3), example=images(), show=False)
    batches = iter([images() for _ in range(5)])
    gq.calibrate(model, batches)
    assert len(list(batches)) <= 2


def test_learned_steps_have_their_own_decay_and_rate():
    model = quantized(dict(method='pact', activation=dict(pact=dict(lr_mult=0.1))))
    with pytest.raises(UserError, match=r'lr_mult=0\.1'):
        gq.parameter_groups(model, weight_decay=1e-4)
    groups = gq.parameter_groups(model, weight_decay=1e-4, lr=0.5)
    found = {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    names = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    for name, values in names.items():
        assert values == ((0.05, 1e-4) if name.endswith('alpha') else (0.5, 1e-4)), name
    lsq = quantized('lsq_w4a4')
    (weights, steps) = gq.parameter_groups(lsq, weight_decay=1e-4)
    assert steps['weight_decay'] == 0 and len(steps['params']) == sum('step' in n for n, _ in lsq.named_parameters())
    assert weights['weight_decay'] == 1e-4


def test_a_checkpoint_goes_on_exactly(tmp_path):
    model = quantized('lsq_w4a4')
    train(model, 3)
    torch.save(gq.checkpoint(model), tmp_path / 'model.pth')
    again = gq.load(network(), tmp_path / 'model.pth')
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    x = images()
    assert torch.equal(model.eval()(x), again.eval()(x))
    assert train(model, 3) == train(again, 3)


def test_load_says_what_is_wrong(tmp_path):
    path = tmp_path / 'model.pth'
    with pytest.raises(UserError, match='does not exist'):
        gq.load(network(), path)
    path.write_bytes(b'nonsense')
    with pytest.raises(UserError, match='cannot be read'):
        gq.load(network(), path)
    torch.save(network().state_dict(), path)
    with pytest.raises(UserError, match='no checkpoint of gdrq_mm'):
        gq.load(network(), path)
    torch.save(gq.checkpoint(quantized()), path)
    with pytest.raises(UserError, match='another model'):
        gq.load(nn.Sequential(conv(3, 4), conv(4, 4)), path)
    other = network()
    other[0] = conv(3, 4, stride=2)
    other[6] = nn.Linear(64, 5)
    with pytest.raises(UserError, match='does not fit'):
        gq.load(other, path)
    with pytest.raises(UserError, match='takes the float model'):
        gq.load(quantized(), path)


@pytest.mark.parametrize(
    'function', [gq.freeze, gq.checkpoint, lambda m: gq.calibrate(m, []), lambda m: gq.export(m, images(), 'x')]
)
def test_a_float_model_is_refused(function):
    with pytest.raises(UserError, match='not quantized'):
        function(network())


def test_quantizing_twice_is_refused():
    with pytest.raises(UserError, match='quantized already'):
        gq.quantize(quantized(), 'w4a4', example=images())


def test_a_wrapped_model_is_trained_and_saved_by_its_own_names():
    model = quantized()
    wrapped = nn.DataParallel(copy.deepcopy(model))
    assert train(model, 3) == train(wrapped, 3)
    assert same(dict(gq.checkpoint(model)['state_dict']), dict(gq.checkpoint(wrapped)['state_dict']))


class Batch(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize('kind', [Batch, dict], ids=['namedtuple', 'dict'])
def test_batches_may_have_names(kind):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, y):
            return self.net(x)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(**batch) if kind is dict else model(*batch), torch.arange(4))

    batch = kind(x=images(), y=torch.arange(4))
    example, model = dict(x=images(), y=0), Named()
    gq.quantize(model, 'w4a4', example=example, show=False)
    gq.calibrate(model, [(batch, 'name')])
    assert all(q.calibrated for q in activation_quantizers(model).values())
    found = gq.allocate(Named(), 'w4a4', example, [batch], loss, budget=dict(bitops=0.05), show=False)
    gq.quantize(model := Named(), found.config('w4a4'), example=example, show=False)
    bits = {layer.name: layer.bits for layer in found.layers}
    assert {name: layer.bits for name, layer in quant_layers(model).items()} == bits and len(set(bits.values())) > 1


@pytest.mark.parametrize('bad', [torch.full((4, 3, 8, 8), torch.nan), 'no picture'])
def test_a_calibration_that_failed_leaves_nothing_behind(bad):
    model = network()
    gq.quantize(model, 'w4a4', example=images(), show=False)
    before = copy.deepcopy(model)
    with pytest.raises((UserError, AttributeError, TypeError)):
        gq.calibrate(model, [100 * images(), bad])
    x = images()
    stages = [each.stage for each in activation_quantizers(model).values()]
    assert stages == [Stage.QUANTIZE] * len(stages) and same(dict(model.state_dict()), dict(before.state_dict()))
    for each in (model, before):
        gq.calibrate(each, [x])
    assert same(dict(model.state_dict()), dict(before.state_dict()))


def test_a_calibration_without_a_batch_is_an_error():
    """Else every layer would stay float, and nobody would know."""
    model = quantized()
    batches = iter([images()])
    gq.calibrate(model, batches)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match='no batch reached a layer'):
        gq.calibrate(model, batches)
    assert same(dict(model.state_dict()), dict(before))


def test_the_last_layers_are_names_of_the_model():
    report = gq.quantize(network(), 'w4a4', example=images(), last='3.conv1', show=False)
    assert {name for name, edge in report.edges.items() if edge == 'last'} == {'3.conv1'}
    with pytest.raises(UserError, match=r"last='4\.conf2' is no layer of the model; did you mean '4\.conv2'"):
        gq.quantize(network(), 'w4a4', example=images(), last=['4.conf2'])


def test_a_layer_that_the_model_keeps_aside_too_is_told():
    """It is called as it was before."""

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(4, 4), conv(4, 4)
            self.plain = [self.b]

        def forward(self, x):
            return self.c(self.plain[0](self.a(x)))

    model = Aside()
    gq.quantize(model, 'w4a4', example=images(), show=False)
    with pytest.warns(UserWarning, match='no batch reached b, which the example of quantize did'):
        gq.calibrate(model, [images()])


def test_a_state_of_other_bits_is_refused():
    model, other = quantized('w4a4'), quantized('w2a4')
    before = {name: (q.bits, q.lo, q.hi) for name, q in quantizers(other).items()}
    with pytest.raises(RuntimeError, match=r'3\.conv1\.weight_quant has 4 bits in the checkpoint, and 2 in the model'):
        other.load_state_dict(model.state_dict())
    assert {name: (q.bits, q.lo, q.hi) for name, q in quantizers(other).items()} == before


def quantizers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, 'bits_in_use')}


def test_a_checkpoint_keeps_the_versions_of_modules(tmp_path):
    """A module may read states of another version in another way, as MNASNet of torchvision."""

    class Versioned(nn.Conv2d):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *others):
            assert metadata['version'] == 2
            super()._load_from_state_dict(state, prefix, metadata, *others)

    def build():
        return nn.Sequential(conv(3, 4), Versioned(4, 4, 1), conv(4, 4))

    model = build()
    gq.quantize(model, 'w4a4', example=images(), show=False)
    torch.save(gq.checkpoint(model), tmp_path / 'model.pth')
    again = gq.load(build(), tmp_path / 'model.pth')
    assert same(dict(model.state_dict()), dict(again.state_dict()))


def test_what_only_a_config_of_openmmlab_has_is_refused():
    for name, value in (('schedule', dict(freeze=0.9)), ('distill', dict()), ('control', True)):
        with pytest.raises(UserError, match=f'{name}.* configs of OpenMMLab'):
            gq.quantize(network(), {name: value}, example=images())
    gq.quantize(network(), dict(schedule=dict(reshape=0.0)), example=images(), show=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_model_is_loaded_on_its_device(tmp_path):
    model = quantized('lsq_w4a4')
    torch.save(gq.checkpoint(model), tmp_path / 'model.pth')
    again, x = gq.load(network().cuda(), tmp_path / 'model.pth'), images()
    assert {tensor.device.type for tensor in (*again.parameters(), *again.buffers())} == {'cuda'}
    torch.testing.assert_close(again.eval()(x.cuda()).cpu(), model.eval()(x), atol=1e-2, rtol=1e-2)
    gq.calibrate(again, [dict(input=x)])


@pytest.mark.parametrize(
    'read', [lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias), lambda layer, x: layer.forward(x)]
)
def test_a_layer_that_is_read_and_not_called_stays_float_and_is_exported(tmp_path, read):
    """As torchvision's Swin does with `attn.qkv`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c(read(self.b, self.a(x).relu()).relu())

    model, x = Net(), torch.randn(16, 8)
    report = gq.quantize(model, 'w4a4', example=x, show=False)
    (row,) = [row for row in report.layers if row.name == 'b']
    assert row.note == 'float: its weight is read outside of a call of the layer'
    assert type(model.b) is nn.Linear
    gq.calibrate(model, [x])
    gq.export(model.eval(), x, tmp_path / 'exported')
    loaded = gq.load(Net(), tmp_path / 'exported/model.safetensors')
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_quantized_part_of_a_new_model_follows_the_new_one():
    old, x = quantized().eval(), images()
    new = nn.Sequential(*old[:-1], nn.Linear(256, 2)).train()
    gq.after_step(new)
    assert moves(new, x)
    assert not moves(new.eval(), x)
    gq.after_step(old[3])  # of a part of it: the model stays the one that tells
    assert moves(new.train(), x)


def moves(model, x):
    """Whether a step moves the thresholds."""
    before = [float(q.threshold) for q in activation_quantizers(model).values()]
    model(3 * x)
    gq.after_step(model)
    return [float(q.threshold) for q in activation_quantizers(model).values()] != before


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('method', ['gdrq', 'lsq'])
def test_thresholds_stay_float32(method, dtype):
    """In half precision a running mean stops, since a hundredth of its way is below its resolution."""
    model = quantized(f'{method}_w4a4').to(dtype)
    assert model[0].weight.dtype == dtype
    kept = [*activation_quantizers(model).values(), *(layer.weight_quant for layer in quant_layers(model).values())]
    for quantizer in kept:
        tensors = [*quantizer.buffers(), *quantizer.parameters()]
        assert {each.dtype for each in tensors if each.is_floating_point()} == {torch.float32}
    model.train()(images().to(dtype))
    assert {each.dtype for each in quantized(f'{method}_w4a4').double()[0].weight_quant.buffers()} >= {torch.float64}


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda model: torch.compile(model, backend='eager')])
def test_a_wrapped_model_is_refused(wrap):
    with pytest.raises(UserError, match='wrapped'):
        gq.quantize(wrap(network()), 'w4a4', example=images(), show=False)


def test_a_scripted_part_and_an_example_of_inference_mode():
    model = nn.Sequential(conv(3, 4), torch.jit.script(nn.ReLU()), conv(4, 4))
    with torch.inference_mode():
        x = images()
    gq.quantize(model, 'w4a4', example=x, show=False)
    gq.calibrate(model, [images()])
    assert len(quant_layers(model)) == 2


def test_an_example_of_export_is_one_tensor(tmp_path):
    with pytest.raises(UserError, match='export: example is a tuple, not a tensor'):
        gq.export(quantized(), (images(),), tmp_path / 'exported')
    with pytest.raises(UserError, match='export: example is empty'):
        gq.export(quantized(), images()[:0], tmp_path / 'exported')


def test_the_settings_are_kept_as_they_were_given():
    config = dict(weight=dict(bits=4))
    model = network()
    gq.quantize(model, config, example=images(), show=False)
    config['weight']['bits'] = 2
    assert gq.checkpoint(model)['meta']['quantization']['weight']['bits'] == 4


def test_the_last_layers_are_layers():
    with pytest.raises(UserError, match="last='2' is a ReLU, which has no weights to quantize"):
        gq.quantize(network(), 'w4a4', example=images(), last='2', show=False)


def test_a_recurrent_layer_has_a_row():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.rnn, self.b = nn.Linear(4, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.rnn(self.a(x))[0])

    model, x = Net(), torch.randn(2, 5, 4)
    report = gq.quantize(model, 'w4a4', example=x, show=False)
    (row,) = [row for row in report.layers if row.name == 'rnn']
    assert row.note.startswith('float: ') and row.weights == 2 * 24 * 8
    gq.calibrate(model, [x])
    assert model(x).shape == (2, 5, 2)
