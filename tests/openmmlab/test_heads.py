"""gdrq_mm/openmmlab/{heads,models}.py: last layers by head class, wrappers, layers that stay float."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.openmmlab.models import bare_model, record_plan
from tests.helpers import Block, Function, conv

W2A3 = dict(weight=dict(bits=2), activation=dict(bits=3), first_last_bits=8)


class ClsHead(nn.Module):
    """A head whose class name says which layers are the last ones; `fc` is not what it calls last."""

    def __init__(self):
        super().__init__()
        self.fc, self.after = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x):
        return self.after(self.fc(x.mean((2, 3))))


class SpecialHead(ClsHead):
    """Inherits the rule."""


def quantize(model):
    x = torch.randn(1, 4, 8, 8)
    return quantize_model(model, Quantization.from_dict(W2A3), record_plan(model, lambda: model(x)))


def bits(model):
    return {name: layer.bits for name, layer in quant_layers(model).items()}


def notes(report):
    return {row.name: row.note for row in report.layers}


@pytest.mark.parametrize('head', [ClsHead, SpecialHead])
def test_a_head_class_says_which_layers_are_last(head):
    model = Function(lambda m, x: m.head(m.mid(m.stem(x))), stem=conv(), mid=conv(), head=head())
    report = quantize(model)
    assert bits(model) == {'stem': (8, 8), 'mid': (2, 3), 'head.fc': (8, 8), 'head.after': (2, 3)}
    assert notes(report)['head.fc'] == 'last'


def test_a_head_as_the_whole_model_has_its_last_layer():
    model = ClsHead()
    quantize(model)
    assert bits(model)['fc'] == (8, 8) and notes(quantize(ClsHead()))['fc'] == 'last'


def test_a_deformable_convolution_stays_float_with_a_reason():
    ops = pytest.importorskip('mmcv.ops')
    layer = ops.DeformConv2d(4, 4, 3, padding=1)

    def forward(model, x):
        x = model.stem(x)
        return model.last(model.deform(x, model.offset(x)))

    model = Function(forward, stem=conv(), offset=conv(4, 18), deform=layer, last=conv())
    report = quantize(model)
    assert model.deform is layer and bits(model)['offset'] == (2, 3)
    assert 'DeformConv2d' in notes(report).get('deform', 'is not in the report')


def test_a_wrapper_is_taken_off():
    model = Block()
    assert bare_model(model) is model
    assert bare_model(nn.parallel.DataParallel(model)) is model
