"""What all quantizers share: stages, state, precision."""

import dataclasses

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import silu

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, TITLES, WEIGHT_METHODS, Stage, register, registry
from gdrq_mm.core.quantizers.following import collected
from gdrq_mm.core.quantizers.gdrq import GDRQActivation, GDRQWeight
from gdrq_mm.core.step import after_step, set_stage
from gdrq_mm.core.typed import check_fields
from tests.core import builders
from tests.core.builders import KINDS, activation_quantizer, everywhere, inputs

WEIGHTS = {
    'scale_clip': ('gdrq', {}),
    'search': ('gdrq', dict(threshold='search')),
    'learned': ('lsq', dict(start='scale_clip', narrow_range=True)),
}
"""Method and options of weights whose T is computed from the weights, stays, and is learned."""


def weight_quantizer(weight, bits=4, groups=1, source='scale_clip', **changes):
    method, options = WEIGHTS[source]
    return builders.weight_quantizer(method, weight, bits, groups, **{**options, **changes})


def unstarted(shape, bits=4, groups=1, source='scale_clip'):
    method, options = WEIGHTS[source]
    return WEIGHT_METHODS[method](bits, shape, groups, **options)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- stages, state, precision ---------------------------------------------------------------------------------------


def test_a_float_stage_passes_values_through():
    weight, x = torch.randn(4, 3), torch.randn(2, 3)
    for quantizer, value in (unstarted((4, 3)), weight), (GDRQActivation(4), x):
        assert quantizer.bits_in_use == 4
        quantizer.set_state(stage=Stage.FLOAT)
        assert quantizer.train()(value) is value and quantizer.eval()(value) is value
        assert quantizer.bits_in_use == 32


@pytest.mark.parametrize('quantizer', [unstarted((4, 3)), GDRQActivation(4)], ids=['weight', 'activation'])
def test_evaluating_without_a_threshold_is_an_error_that_names_the_layer(quantizer):
    quantizer.name = 'backbone.conv1'
    with pytest.raises(UserError, match=r'layer backbone\.conv1 has no threshold'):
        quantizer.eval()(torch.randn(4, 3))


@pytest.mark.parametrize('source', WEIGHTS)
def test_weight_thresholds_start_from_the_first_training_forward(source):
    weight = torch.randn(4, 3)
    fresh = unstarted((4, 3), source=source).train()
    assert torch.equal(fresh(weight), weight_quantizer(weight, source=source)(weight)) and fresh.calibrated


def test_an_activation_threshold_starts_from_the_first_training_forward():
    x = torch.randn(2, 3, 4, 4)
    fresh = GDRQActivation(4).train()
    assert torch.equal(fresh(x), activation_quantizer('gdrq', x)(x)) and fresh.calibrated


@pytest.mark.parametrize('source', WEIGHTS)
@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE, Stage.FREEZE])
def test_the_state_of_a_weight_quantizer_survives_a_checkpoint(source, stage):
    weight = torch.randn(6, 3, 3, 3)
    full = dict(narrow_range=False) if WEIGHTS[source][0] == 'lsq' else dict(levels='full')
    saved = weight_quantizer(weight, 3, groups=2, source=source, stage=stage, **full)
    loaded = unstarted(weight.shape, 3, 2, source)
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.stage, loaded.calibrated, loaded.lo, loaded.hi) == (stage, True, -4, 3)
    assert torch.equal(loaded.threshold, saved.threshold)
    assert torch.equal(loaded.eval()(weight), saved.eval()(weight))


@pytest.mark.parametrize('kind', KINDS)
def test_the_state_of_an_activation_quantizer_survives_a_checkpoint(kind):
    x = inputs(kind, 4, 8, 16, 16)
    saved = activation_quantizer('gdrq', x, stage=Stage.FREEZE)
    loaded = GDRQActivation(4)
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.stage, loaded.calibrated, loaded.lo, loaded.hi) == (Stage.FREEZE, True, saved.lo, saved.hi)
    assert loaded.kind == saved.kind and float(loaded.k) == float(saved.k) > 0
    assert torch.equal(loaded.eval()(x), saved.eval()(x))


@pytest.mark.parametrize('quantizer', [unstarted((4, 3), source='learned'), GDRQActivation(4)], ids=['weight', 'act'])
def test_a_float_checkpoint_loads_strictly(quantizer):
    quantizer.load_state_dict({}, strict=True)
    assert not quantizer.calibrated


def test_the_parameters_of_a_layer_are_still_missed():
    layer = nn.Sequential(nn.Linear(3, 4), GDRQActivation(4))
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight", "0\.bias"\.'):
        layer.load_state_dict({}, strict=True)


@pytest.mark.parametrize('stage', [Stage.RESHAPE, Stage.QUANTIZE])
def test_autocast_changes_nothing_for_float32(stage):
    weight, x = torch.randn(8, 3, 3, 3), torch.randn(2, 3, 9, 9)
    quantizers = weight_quantizer(weight, groups=4, stage=stage), activation_quantizer('gdrq', x, stage=stage)
    expected = quantizers[0](weight), quantizers[1](x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(quantizers[0](weight), expected[0]) and torch.equal(quantizers[1](x), expected[1])


def test_bfloat16_inputs_are_quantized_in_float32():
    x = torch.randn(2, 3, 9, 9).bfloat16()
    quantizer = activation_quantizer('gdrq', x.float())
    with torch.autocast('cpu', torch.bfloat16):
        out = quantizer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, quantizer(x.float()).bfloat16())


def test_the_gradient_of_bfloat16_inputs_is_masked_in_float32():
    x = torch.linspace(0.9, 1.1, 500).bfloat16().requires_grad_()
    quantizer = activation_quantizer('gdrq', torch.ones(8), k=1.005)  # bfloat16 has 1 and 1.0078
    quantizer(x).sum().backward()
    assert torch.equal(x.grad.float(), (x.detach().float() <= 1.005).float())


def test_bfloat16_inputs_are_tracked_in_float32():
    quantizer = activation_quantizer('gdrq', torch.rand(8))
    quantizer(torch.full((100_000,), 1.0, dtype=torch.bfloat16))
    assert collected([quantizer]).tolist() == [[100_000, 100_000]]


# ---- the threshold in the checkpoint --------------------------------------------------------------------------------

COMBINATIONS = [*METHODS.values(), ('gdrq', 'pact'), ('lsq', 'hwgq')]


@pytest.mark.parametrize(('weight', 'activation'), COMBINATIONS)
def test_the_threshold_in_a_checkpoint_is_the_one_in_use(weight, activation):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3))
    quantize_model(model, Quantization.from_dict(everywhere(weight, activation)))
    x = torch.randn(4, 2, 8, 8)
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(2 * x).square().mean().backward()
        optimizer.step()
        after_step(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    steps = {}
    for name, layer in quant_layers(model).items():
        quantizer, filters = layer.weight_quant, layer.filters()
        assert torch.equal(saved[f'{name}.weight_quant.threshold'], quantizer.current_threshold(filters))
        steps[name] = quantizer.step(filters), layer.input_quant.step(), layer.input_quant.lo, layer.input_quant.hi
    for name, quantizer in activation_quantizers(model).items():
        assert torch.equal(saved[f'{name}.threshold'], quantizer.current_threshold())
        assert saved[f'{name}.state'].tolist()[2:4] == [quantizer.lo, quantizer.hi]
    expected = model.eval()(x)
    set_stage(model, Stage.FREEZE)  # keeps exactly these
    frozen = model.state_dict()
    assert all(torch.equal(saved[name], frozen[name]) for name in saved if not name.endswith('.state'))
    for name, layer in quant_layers(model).items():
        found = layer.weight_quant.step(layer.filters()), layer.input_quant.step()
        assert all(torch.equal(now, before) for now, before in zip(found, steps[name]))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('activation', ACTIVATION_METHODS)
@pytest.mark.parametrize('weight', WEIGHT_METHODS)
def test_what_reads_changes_nothing(weight, activation):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU())
    quantize_model(model, Quantization.from_dict(everywhere(weight, activation)))
    x = torch.randn(4, 2, 8, 8)
    calibrate(model, [silu(x)])
    for parameter in model.parameters():
        parameter.data *= 1.3
    layer = model[0]
    before = {name: value.clone() for name, value in [*layer.named_buffers(), *layer.named_parameters()]}
    layer.weight_quant.step(layer.filters()), layer.weight_quant.codes(layer.filters()), layer.input_quant.step()
    layer.weight_quant.current_threshold(layer.filters()), layer.input_quant.current_threshold()
    model.eval()(x)
    model.train().eval()
    after = dict([*layer.named_buffers(), *layer.named_parameters()])
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---- registering ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registries(monkeypatch):
    for name in ('WEIGHT_METHODS', 'ACTIVATION_METHODS', 'METHODS', 'TITLES'):
        for key in ('mine', 'yours'):
            monkeypatch.setitem(getattr(registry, name), key, None)
            monkeypatch.delitem(getattr(registry, name), key)


def test_registering_makes_a_method_of_one_or_two_classes(registries):
    class Mine(GDRQWeight):
        pass

    class Yours(GDRQActivation):
        pass

    assert register('mine', title='Mine')(Mine) is Mine
    assert WEIGHT_METHODS['mine'] is Mine and 'mine' not in METHODS and TITLES['mine'] == 'Mine'
    register('mine')(Yours)
    assert ACTIVATION_METHODS['mine'] is Yours and METHODS['mine'] == ('mine', 'mine') and TITLES['mine'] == 'Mine'
    register('yours', activations=Yours)(type('Again', (Mine,), {}))
    assert METHODS['yours'] == ('yours', 'mine') and TITLES['yours'] == 'yours'


@pytest.mark.parametrize(
    ('name', 'base', 'sides', 'message'),
    [
        ('gdrq', GDRQWeight, {}, "'gdrq' is registered twice: GDRQWeight, Mine"),
        ('gdrq', GDRQActivation, {}, "'gdrq' is registered twice: GDRQActivation, Mine"),
        ('mine', GDRQWeight, dict(weights=GDRQWeight), 'for its own side'),
        ('mine', GDRQActivation, dict(activations=GDRQActivation), 'for its own side'),
        ('mine', GDRQWeight, dict(activations=GDRQWeight), 'is not registered as the other side'),
        ('mine', GDRQWeight, dict(activations='gdrq'), 'is not registered as the other side'),
        ('mine', nn.Module, {}, 'is no weight or activation quantizer'),
    ],
)
def test_a_wrong_registration_is_an_error(registries, name, base, sides, message):
    with pytest.raises(ValueError, match=message):
        register(name, **sides)(type('Mine', (base,), {}))
    assert 'mine' not in {**WEIGHT_METHODS, **ACTIVATION_METHODS, **METHODS, **TITLES}


def test_a_misspelt_side_is_an_error():
    with pytest.raises(TypeError, match='weight'):
        register('mine', weight=GDRQWeight)


def test_every_option_has_a_type_that_its_default_fits():
    for methods in (WEIGHT_METHODS, ACTIVATION_METHODS):
        for name, method in methods.items():
            defaults = dataclasses.asdict(method.Options())
            assert check_fields(method.Options, defaults, name) == defaults
