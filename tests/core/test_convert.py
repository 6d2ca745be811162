"""gdrq_mm/core/convert.py and gdrq_mm/report/layers.py: which layers are replaced, how, and what the report says."""

import copy

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import silu

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import Quantizer
from gdrq_mm.report.layers import layer_table
from tests.core.networks import W2A3, image, quantize
from tests.helpers import Block, Function, Net, OwnForward, conv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bits(model):
    return {name: layer.bits for name, layer in quant_layers(model).items()}


def notes(report):
    return {row.name: row.note for row in report.layers}


# ---- replacing ------------------------------------------------------------------------------------------------------


def test_layers_are_replaced_and_their_parameters_kept():
    model = Function(
        lambda m, x: m.fc(m.up(m.a(x)).mean((2, 3))), a=conv(), up=nn.ConvTranspose2d(4, 6, 2), fc=nn.Linear(6, 2)
    )
    parameters = dict(model.named_parameters())
    quantize(model)
    assert [type(m) for m in model.children()] == [QuantConv2d, QuantConvTranspose2d, QuantLinear]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()


def test_a_float_state_dict_loads_strictly():
    model = Net(Block())
    state = copy.deepcopy(model.state_dict())
    quantize(model)
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize('deployable', [True, False])
def test_a_quantized_model_trains_and_evaluates(deployable):
    model = Net(Block(), Block(downsample=True))
    quantize(model, deployable=deployable)
    model.train()(image((2, 4, 8, 8))).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for n, p in model.named_parameters())
    assert torch.isfinite(model.eval()(image())).all()


def test_32_bits_leave_the_results_exactly():
    model, x = Net(Block(), Block(downsample=True)).eval(), image()
    expected = model(x)
    quantize(model, weight=dict(bits=32), activation=dict(bits=32))
    assert torch.equal(model(x), expected)


def test_every_alias_of_a_shared_layer_becomes_the_same_object():
    shared = conv()
    model = Function(lambda m, x: m.b(m.a(x)), a=shared, b=shared, inner=nn.ModuleDict(dict(c=shared)), last=conv())
    report = quantize(model)
    assert model.a is model.b is model.inner['c'] and type(model.a) is QuantConv2d
    assert [row.name for row in report.layers] == ['a', 'last'] and list(quant_layers(model)) == ['a', 'last']


def test_a_module_called_twice_is_replaced_once():
    model = Function(lambda m, x: m.last(m.a(m.a(m.stem(x)))), stem=conv(), a=conv(), last=conv())
    quantize(model)
    assert bits(model) == {'stem': (8, 8), 'a': (2, 3), 'last': (8, 8)}


def test_a_model_without_a_layer_is_an_error():
    with pytest.raises(UserError, match='no convolution or linear layer'):
        quantize(Function(lambda m, x: x))


def test_errors_name_the_layer():
    model = Net(Block())
    quantize(model)
    with pytest.raises(UserError, match='layer stem has no threshold'):
        model.eval()(image())
    names = {n: m.name for n, m in model.named_modules() if isinstance(m, Quantizer)}
    assert names['stem.weight_quant'] == 'stem' and names['blocks.0.conv1.own_input_quant'] == 'blocks.0.conv1'


# ---- first and last layers ------------------------------------------------------------------------------------------


def test_first_and_last_layers_have_their_own_bits():
    model = Net(Block())
    report = quantize(model)
    inner = (2, 3)
    assert bits(model) == {'stem': (8, 8), 'blocks.0.conv1': inner, 'blocks.0.conv2': inner, 'fc': (8, 8)}
    assert notes(report) == {'stem': 'first', 'blocks.0.conv1': '', 'blocks.0.conv2': '', 'fc': 'last'}


def test_every_layer_that_reads_the_image_is_first():
    model = Function(lambda m, x: m.last(m.c(m.a(x) + m.b(x))), a=conv(), b=conv(), c=conv(), last=conv())
    quantize(model)
    assert bits(model) == {'a': (8, 8), 'b': (8, 8), 'c': (2, 3), 'last': (8, 8)}


def test_first_and_last_go_by_execution_and_not_by_definition():
    model = Function(lambda m, x: m.a(m.b(m.c(x))), a=conv(), b=conv(), c=conv())
    quantize(model)
    assert bits(model) == {'a': (8, 8), 'b': (2, 3), 'c': (8, 8)}


def test_without_a_record_first_and_last_go_by_definition():
    model = Function(lambda m, x: m.a(m.b(m.c(x))), a=conv(), b=conv(), c=conv())
    quantize_model(model, Quantization.from_dict(W2A3))
    assert bits(model) == {'a': (8, 8), 'b': (2, 3), 'c': (8, 8)}


# ---- skip and overrides ---------------------------------------------------------------------------------------------


def test_skipped_layers_stay_float_and_the_report_says_so():
    model = Net(Block())
    report = quantize(model, skip=['blocks.*'])
    assert list(bits(model)) == ['stem', 'fc'] and type(model.blocks[0].conv1) is nn.Conv2d
    assert notes(report)['blocks.0.conv1'] == 'float: skipped by config'


def test_a_skipped_first_layer_does_not_make_the_second_one_first():
    model = Net(Block())
    quantize(model, skip=['stem'])
    assert bits(model)['blocks.0.conv1'] == (2, 3)


def test_overrides_apply_to_the_layers_that_match():
    model = Net(Block())
    quantize(model, overrides={'*.conv2': dict(weight=dict(bits=5, groups=2)), 'fc': dict(activation=dict(bits=4))})
    assert bits(model) == {'stem': (8, 8), 'blocks.0.conv1': (2, 3), 'blocks.0.conv2': (5, 3), 'fc': (8, 4)}
    assert model.blocks[0].conv2.weight_quant.groups == 2


def test_a_layer_that_an_override_makes_float_is_float_by_config():
    model = Net(Block())
    report = quantize(model, overrides={'*.conv2': dict(weight=dict(bits=32), activation=dict(bits=32))})
    assert bits(model)['blocks.0.conv2'] == (32, 32) and notes(report)['blocks.0.conv2'] == 'float by config'


@pytest.mark.parametrize('cfg', [dict(skip=['blocks.1.*']), dict(overrides={'blocks.1.*': {}})], ids=str)
def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing(cfg):
    model = Net(Block())
    with pytest.raises(UserError, match=r"'blocks\.1\.\*' matches no layer; nearest: .*blocks\.0"):
        quantize(model, **cfg)
    assert quant_layers(model) == {}


# ---- layers that stay float -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'layer, shape, kind',
    [
        (OwnForward(4, 4, 3, padding=1), (1, 4, 8, 8), 'OwnForward'),
        (nn.Conv1d(4, 4, 3, padding=1), (1, 4, 8), 'Conv1d'),
        (nn.Conv3d(4, 4, 3, padding=1), (1, 4, 4, 4, 4), 'Conv3d'),
        (nn.ConvTranspose1d(4, 4, 3, padding=1), (1, 4, 8), 'ConvTranspose1d'),
    ],
    ids=['own forward', 'Conv1d', 'Conv3d', 'ConvTranspose1d'],
)
def test_a_layer_of_another_class_stays_float_with_a_reason(layer, shape, kind):
    width = shape[-1]
    model = Function(
        lambda m, x: m.last(m.other(m.stem(x))), stem=nn.Linear(width, width), other=layer, last=nn.Linear(width, 2)
    )
    report = quantize(model, image(shape))
    assert model.other is layer and list(bits(model)) == ['stem', 'last']
    row = {row.name: row for row in report.layers}['other']
    assert row.kind == kind and row.note.startswith('float: ') and kind in row.note
    assert row.weights == layer.weight.numel()


def test_a_layer_from_the_model_config_keeps_its_quantizers():
    layer = QuantConv2d(4, 4, 3, padding=1, quantization=dict(weight=dict(bits=5)))
    model = Function(lambda m, x: m.last(m.mid(m.stem(x))), stem=conv(), mid=layer, last=conv())
    report = quantize_model(model, Quantization.from_dict(W2A3))
    assert model.mid is layer and bits(model)['mid'] == (5, 4)
    assert notes(report)['mid'] == 'quantized by the model config'


def test_a_layer_that_is_never_called_stays_float_after_calibration():
    model = Function(lambda m, x: m.last(m.mid(m.stem(x))), stem=conv(), mid=conv(), never=conv(), last=conv())
    report = quantize(model)
    calibrate(model, [image()])
    assert bits(model) == {'stem': (8, 8), 'mid': (2, 3), 'never': (32, 32), 'last': (8, 8)}
    (line,) = [line for line in layer_table(model, report).splitlines() if line.startswith('never')]
    assert 'not reached' in line
    x = image()
    assert torch.equal(model.never.eval()(x), nn.functional.conv2d(x, model.never.weight, padding=1))


# ---- readers of one tensor ------------------------------------------------------------------------------------------


def fork(model, x):
    x = model.stem(x)
    return model.last(model.a(x) + model.b(x))


def test_readers_of_one_tensor_share_one_input_quantizer():
    model = Function(fork, stem=conv(), a=conv(), b=conv(), last=conv())
    quantize(model)
    assert model.a.input_quant is model.b.input_quant is not model.last.input_quant
    assert 'a.own_input_quant' in activation_quantizers(model)
    assert 'b.own_input_quant' not in activation_quantizers(model)


def test_the_downsample_convolution_shares_the_quantizer_of_the_first_of_its_block():
    model = Net(Block(downsample=True))
    quantize(model)
    block = model.blocks[0]
    assert block.conv1.input_quant is block.downsample[0].input_quant


def test_nothing_is_shared_if_the_model_is_not_to_be_deployed():
    model = Function(fork, stem=conv(), a=conv(), b=conv(), last=conv())
    quantize(model, deployable=False)
    assert model.a.input_quant is not model.b.input_quant


@pytest.mark.parametrize(
    'override', [dict(bits=4), dict(range='signed'), dict(gdrq=dict(k=2.0)), dict(gdrq=dict(mean='nonzero'))], ids=str
)
def test_readers_with_other_settings_do_not_share(override):
    model = Function(fork, stem=conv(), a=conv(), b=conv(), last=conv())
    quantize(model, overrides={'b': dict(activation=override)})
    assert model.a.input_quant is not model.b.input_quant


def test_a_float_reader_does_not_share():
    model = Function(fork, stem=conv(), a=conv(), b=conv(), last=conv())
    quantize(model, overrides={'a': dict(activation=dict(bits=32))})
    assert model.a.input_quant is None and model.b.own_input_quant is not None


def test_readers_before_and_after_an_in_place_relu_do_not_share():
    def forward(model, x):
        x = model.stem(x)
        a = model.a(x)
        return model.last(a + model.b(model.relu(x)))

    model = Function(forward, stem=conv(), a=conv(), relu=nn.ReLU(inplace=True), b=conv(), last=conv())
    quantize(model)
    assert model.a.input_quant is not model.b.input_quant


# ---- operands of additions ------------------------------------------------------------------------------------------


def outputs(model):
    """Module -> bits of the quantizer behind it."""
    return {n: m.output_quant.bits for n, m in model.named_modules() if hasattr(m, 'output_quant')}


def test_operands_of_additions_are_quantized_at_8_bits_identity_shortcuts_too():
    model = Net(Block(), Block())
    report = quantize(model)
    # the shortcut of the first block is the stem's ReLU; that of the second the first block, whose ReLU runs twice
    assert outputs(model) == {'relu': 8, 'blocks.0.bn2': 8, 'blocks.0': 8, 'blocks.1.bn2': 8}
    assert sorted(report.outputs) == sorted((name, 'addition', '8 bits') for name in outputs(model))


def test_a_downsample_shortcut_is_quantized_behind_its_batch_normalization():
    model = Net(Block(downsample=True))
    quantize(model)
    assert outputs(model) == {'blocks.0.bn2': 8, 'blocks.0.downsample.1': 8}


def test_an_identity_module_as_shortcut_is_quantized_once():
    model = Net(Block())
    model.blocks[0].downsample = nn.Identity()
    quantize(model)
    assert outputs(model) == {'relu': 8, 'blocks.0.bn2': 8}


def test_an_operand_of_two_additions_is_quantized_once():
    def forward(model, x):
        a = model.a(x)
        return model.last(model.b(a + model.c(x)) + a)

    model = Function(forward, a=conv(), b=conv(), c=conv(), last=conv())
    report = quantize(model)
    assert [name for name, *_ in report.outputs] == ['a', 'c', 'b'] and len(model.a._forward_hooks) == 1


def test_no_operand_is_quantized_if_the_model_is_not_to_be_deployed():
    model = Net(Block(), Block(downsample=True))
    assert quantize(model, deployable=False).outputs == [] and outputs(model) == {}


def test_no_operand_is_quantized_if_activations_are_float():
    model = Net(Block())
    assert quantize(model, activation=dict(bits=32)).outputs == [] and outputs(model) == {}


def test_an_operand_that_a_function_made_stays_float_with_a_reason():
    model = Function(lambda m, x: m.last(m.a(x) + nn.functional.relu(m.b(x))), a=conv(), b=conv(), last=conv())
    report = quantize(model)
    assert outputs(model) == {'a': 8} and report.outputs[0] == ('a', 'addition', '8 bits')
    assert report.outputs[1] == ('model, operand 1', 'addition', 'float: made by a function')


def test_an_operand_of_a_module_called_twice_stays_float_with_a_reason():
    model = Function(lambda m, x: m.last(m.a(x) + m.a(2 * x)), a=conv(), last=conv())
    report = quantize(model)
    assert outputs(model) == {} and {what.split(':')[0] for *_, what in report.outputs} == {'float'}


def test_the_operands_that_are_added_are_quantized():
    added = []

    def forward(model, x):
        added[:] = model.a(x), model.b(x)
        return model.last(added[0] + added[1])

    model = Function(forward, a=conv(), b=conv(), last=conv())
    quantize(model)
    x = image()
    calibrate(model, [x])
    model.eval()(x)
    for operand, layer in zip(added, (model.a, model.b)):
        codes = operand / layer.output_quant.step()
        assert torch.equal(codes.round(), codes.round().clamp(-127, 127))
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert len(torch.unique(codes.round())) > 16


def test_a_k_for_few_bits_is_not_used_for_the_operands():
    model = Net(Block())
    quantize(model, activation=dict(bits=3, gdrq=dict(k=1.0, mean='nonzero')))
    quantizer = model.blocks[0].bn2.output_quant
    assert quantizer.options.k is None and quantizer.options.mean == 'nonzero'


def test_a_copied_model_quantizes_its_own_operands():
    model, x = Net(Block()), image()
    quantize(model)
    other = copy.deepcopy(model)
    calibrate(model, [x])
    assert model.relu.output_quant.calibrated and not other.relu.output_quant.calibrated
    other.train()(x)
    assert other.relu.output_quant.calibrated


# ---- outputs in front of activation functions -----------------------------------------------------------------------


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, nn.Identity])
def test_a_convolution_in_front_of_silu_is_quantized_behind_its_batch_normalization(norm):
    model = Function(lambda m, x: m.last(silu(m.bn(m.a(x)))), a=conv(), bn=norm(4), last=conv())
    report = quantize(model)
    place = 'bn' if norm is nn.BatchNorm2d else 'a'
    assert outputs(model) == {place: 8} and report.outputs == [(place, 'activation', '8 bits')]


def test_the_activation_function_reads_what_was_quantized():
    read = []

    def forward(model, x):
        read.append(model.a(x))
        return model.last(silu(read[-1]))

    model, x = Function(forward, a=conv(), last=conv()), image()
    quantize(model, x)
    calibrate(model, [x])
    model(x)
    step = model.a.output_quant.step()
    torch.testing.assert_close(read[-1], (read[-1] / step).round() * step)
    assert len(read[-1].unique()) > 15  # 8 bits


@pytest.mark.parametrize(
    'forward',
    [
        lambda m, x: m.last(torch.relu(m.bn(m.a(x)))),  # the clip of the next quantizer takes it up
        lambda m, x: silu(m.last(m.bn(m.a(x)))),  # the output of the model
        lambda m, x: m.last(silu(m.group(m.a(x)))),  # not merged: the convolution does not end there
        lambda m, x: m.last(silu(m.a(x)) + m.a(2 * x)),  # one call of two
        lambda m, x: m.last(silu(m.up(x))),  # no integer kernel has it
        lambda m, x: m.last(silu(m.fc(x))),  # its integer kernel has a float output
    ],
)
def test_other_layers_keep_their_float_output(forward):
    model = Function(
        forward,
        a=conv(),
        bn=nn.BatchNorm2d(4),
        group=nn.GroupNorm(1, 4),
        up=nn.ConvTranspose2d(4, 4, 2),
        fc=nn.Linear(8, 8),
        last=conv(),
    )
    report = quantize(model)
    assert outputs(model) == {} and not any(before == 'activation' for _, before, _ in report.outputs)


@pytest.mark.parametrize(
    'quantization',
    [
        dict(deployable=False),
        dict(activation=dict(bits=32)),
        dict(skip=['a']),
        dict(overrides={'a': dict(weight=dict(bits=32))}),
    ],
    ids=str,
)
def test_an_output_of_what_does_not_become_an_integer_layer_stays_float(quantization):
    model = Function(lambda m, x: m.last(silu(m.a(m.first(x)))), first=conv(), a=conv(), last=conv())
    quantize(model, **quantization)
    assert outputs(model) == {}


def test_an_output_that_is_added_and_activated_is_quantized_once():
    def forward(model, x):
        y = model.a(x)
        return model.last(y + silu(y))

    model = Function(forward, a=conv(), last=conv())
    report = quantize(model)
    assert report.outputs[0] == ('a', 'addition', '8 bits') and len(model.a._forward_hooks) == 1
