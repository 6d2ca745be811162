"""gdrq_mm/report/layers.py: the table of layers and the totals."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.convert import float_report
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.topology import record
from gdrq_mm.report.layers import layer_table, totals
from tests.core.networks import image, quantize
from tests.helpers import Block, Function, Net, OwnForward, conv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny():
    """216 + 576 + 80 weights, 10 biases, BN of 8 channels; 13,824 + 36,864 + 80 MACs on an 8x8 image."""
    return Function(
        lambda m, x: m.fc(m.b(m.bn(m.a(x))).mean((2, 3))),
        a=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        b=conv(8, 8),
        fc=nn.Linear(8, 10),
    )


def test_totals_equal_the_hand_count():
    model = tiny()
    report = quantize(model, image((1, 3, 8, 8)), weight=dict(bits=4, groups=4), activation=dict(bits=3))
    total = totals(model, report)
    assert total.parameters == 216 + 16 + 576 + 80 + 10
    assert total.quantized == 216 + 576 + 80
    assert total.float_bytes == 4 * (216 + 16 + 16 + 576 + 80 + 10)
    assert total.bytes == 216 + 576 // 2 + 80 + 3 * 4 * 4 + 4 * (16 + 16 + 10)
    assert total.bit_operations == 13_824 * 8 * 8 + 36_864 * 4 * 3 + 80 * 8 * 8


@pytest.mark.parametrize('method, scales', [('ttq', 2), ('syq', 3 * 3), ('fgq', 8 * 2 * 3 * 3)])
def test_totals_count_the_scales_that_a_method_has(method, scales):
    """Beside TWN, which has one for the middle layer."""

    def size(method):
        model = tiny()
        return totals(model, quantize(model, image((1, 3, 8, 8)), weight=dict(method=method, bits=2))).bytes

    assert size(method) - size('twn') == 4 * (scales - 1)


def test_totals_of_a_float_model():
    model, x = tiny(), image((1, 3, 8, 8))
    total = totals(model, float_report(model, record(model, lambda: model(x))))
    assert (total.parameters, total.quantized) == (898, 0) and total.bytes == total.float_bytes == 4 * 914
    assert total.bit_operations == (13_824 + 36_864 + 80) * 32 * 32


def test_totals_do_not_count_learned_thresholds():
    model = tiny()
    report = quantize(model, image((1, 3, 8, 8)), weight=dict(method='lsq', groups=4))
    assert totals(model, report).parameters == 898


def test_totals_leave_out_auxiliary_heads():
    """They are trained, and not part of a deployed model."""
    model, x = tiny(), image((1, 3, 8, 8))
    quantized = quantize(model, x)
    alone = totals(model, quantized)
    other = tiny()
    other.auxiliary_head = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
    report = quantize(other, x, training_only=['auxiliary_head'])
    assert totals(other, report) == alone
    assert {row.name: row.note for row in report.layers}['auxiliary_head.0'] == 'training only'
    assert quant_layers(other)['auxiliary_head.0'].bits == (2, 3)


def test_totals_count_a_weight_that_two_layers_share_once():
    model = Function(lambda m, x: m.b(m.a(x)), a=conv(), b=conv())
    model.b.weight = model.a.weight
    total = totals(model, quantize(model))
    assert (total.parameters, total.quantized) == (144, 144)
    assert 144 < total.bytes < total.float_bytes == 4 * 144


def test_totals_count_layers_out_of_reach_as_float():
    model = Function(lambda m, x: m.last(m.stem(x)), stem=conv(), never=conv(), last=conv())
    report = quantize(model)
    calibrate(model, [image()])
    total = totals(model, report)
    assert total.quantized == 2 * 144 and total.bytes == 2 * (144 + 4 * 4) + 144 * 4


def test_the_table_has_each_layer_with_its_bits_and_range():
    model, x = Net(Block(downsample=True)), image()
    model.other = OwnForward(4, 4, 1)
    report = quantize(model, x, weight=dict(bits=2, groups=4), skip=['blocks.0.conv2'])
    calibrate(model, [x])
    lines = {line.split()[0]: line.split() for line in layer_table(model, report).splitlines()}
    assert lines['stem'] == ['stem', 'Conv2d', '144', '8', '4', '8', 'signed', 'first']
    assert lines['blocks.0.conv1'] == ['blocks.0.conv1', 'Conv2d', '144', '2', '4', '3', 'unsigned']
    assert lines['blocks.0.conv2'] == [
        'blocks.0.conv2',
        'Conv2d',
        '144',
        '32',
        '32',
        'float:',
        'skipped',
        'by',
        'config',
    ]
    assert lines['fc'][:6] == ['fc', 'Linear', '20', '8', '4', '8'] and lines['fc'][-1] == 'last'
    assert lines['other'][:5] == ['other', 'OwnForward', '16', '32', '32']
    assert lines['blocks.0.bn2'][:4] == ['blocks.0.bn2', 'addition', '8', 'signed']
    assert set(lines) >= {row.name for row in report.layers} | {name for name, *_ in report.outputs}


@pytest.mark.parametrize(
    ('settings', 'bits', 'note'),
    [
        (dict(), 8, ''),
        (dict(attention=dict(bits=4)), 4, ''),
        (dict(attention=dict(bits=32)), 32, 'float: by config'),
        (dict(deployable=False), 32, 'float: by config'),
        (dict(skip=['product']), 32, 'float: skipped by config'),
    ],
)
def test_the_table_lists_products_and_operations_count_them(settings, bits, note):
    product = Function(lambda m, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).unsqueeze(-1))
    model = Function(lambda m, x: m.b(m.product(m.a(x))), a=conv(4, 8), product=product, b=nn.Conv2d(8, 4, 1))
    report = quantize(model, image((1, 4, 4, 4)), **settings)
    (line,) = (line for line in layer_table(model, report).splitlines() if line.startswith('product'))
    range_ = 'undecided' if bits < 32 else ''
    note = f'{note}, 1,024 operations'.removeprefix(', ')
    assert line.split() == f'product.product_quant.0 matmul {bits} {bits} {range_} {note}'.split()
    assert totals(model, report).bit_operations == 64 * (288 * 16 + 32 * 8) + 8 * 16 * 8 * bits * bits


def test_the_range_is_undecided_before_calibration():
    model = Net(Block())
    report = quantize(model)
    (line,) = [line for line in layer_table(model, report).splitlines() if line.startswith('stem')]
    assert 'undecided' in line


def test_the_table_ends_with_the_totals():
    model = tiny()
    report = quantize(model, image((1, 3, 8, 8)), weight=dict(bits=4, groups=4), activation=dict(bits=3))
    assert '872 of 898 parameters quantized' in layer_table(model, report).splitlines()[-1]


def test_a_name_is_no_markup():
    model = nn.Sequential()
    model.add_module('conv[bold]', conv(3, 8))
    assert 'conv[bold]' in layer_table(model, quantize(model, image((1, 3, 8, 8))))
