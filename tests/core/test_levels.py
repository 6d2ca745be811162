"""`activation.per_level`: a threshold for each pyramid level in the layers that a head shares between them."""

import copy

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.onnx_export import export_onnx
from gdrq_mm.deploy.packed import load_packed, write_packed
from gdrq_mm.deploy.verify import compare
from gdrq_mm.deploy.verify_onnx import record_codes
from gdrq_mm.openmmlab.parts import parts_of
from gdrq_mm.report.layers import layer_table
from tests.deploy.test_onnx import pieces_of
from tests.helpers import Function, conv

SCALES = (1.0, 3.0, 0.2)


def head_forward(head, levels):
    """Two branches that read each level, as RetinaNet's head."""
    return [(head.cls(head.cls_conv(x)), head.reg(head.reg_conv(x))) for x in levels]


def model_of(per_level=True, **settings):
    torch.manual_seed(0)
    head = Function(head_forward, cls_conv=conv(), reg_conv=conv(), cls=conv(), reg=conv())
    model = Function(lambda m, x: m.head([scale * y for y in [m.stem(x)] for scale in SCALES]), stem=conv(), head=head)
    x = torch.randn(2, 4, 8, 8)
    config = Quantization.from_dict(dict(activation=dict(per_level=per_level), **settings))
    report = quantize_model(model, config, record(model, lambda: model(x)))
    return model, x, report


def test_each_level_has_the_threshold_of_its_own_values():
    model, x, _ = model_of()
    calibrate(model, [x])
    layer = model.head.cls_conv
    thresholds = torch.stack([quant.threshold for quant in layer.input_quant])
    # At 4 bits the default k is the same for all levels, capped at max/mean, which scaling does not change.
    torch.testing.assert_close(thresholds, thresholds[0] * torch.tensor(SCALES))
    one, _, _ = model_of(per_level=False)
    calibrate(one, [x])
    assert one.head.cls_conv.input_quant.threshold.dim() == 0
    assert thresholds[2] < one.head.cls_conv.input_quant.threshold < thresholds[1]


def test_a_level_is_quantized_with_its_own_threshold():
    """The levels differ by a scale only, so the outputs do too, whatever the scale is."""
    model, x, _ = model_of()
    calibrate(model, [x])
    model.eval()
    first, *others = model(x)
    for scale, other in zip(SCALES[1:], others):
        for one, another in zip(first, other):
            torch.testing.assert_close(another, scale * one)
    shared, _, _ = model_of(per_level=False)
    calibrate(shared, [x])
    first, *others = shared.eval()(x)
    assert not torch.allclose(others[1][0], SCALES[2] * first[0], rtol=0.1)


def test_the_level_starts_anew_with_each_forward_of_the_head():
    model, x, _ = model_of()
    calibrate(model, [x])
    model.eval()
    first = model(x)
    model.head.cls_conv.pyramid_level = 7  # a forward that an error ended
    again = model(x)
    assert all(torch.equal(a, b) for one, other in zip(first, again) for a, b in zip(one, other))


@pytest.mark.parametrize('count', [1, 2, 4])
def test_another_number_of_levels_is_an_error(count):
    model, x, _ = model_of()
    calibrate(model, [x])
    with pytest.raises(
        UserError, match=r'layer head.cls_conv has thresholds for 3 pyramid levels, but was called \d times'
    ):
        model.head([x] * count)


def test_readers_of_a_level_share_its_quantizer():
    model, *_ = model_of(deployable=True)
    assert model.head.reg_conv.input_quant is model.head.cls_conv.input_quant
    assert model.head.cls.input_quant is not model.head.reg.input_quant
    own, _, _ = model_of(deployable=False)
    assert own.head.reg_conv.input_quant is not own.head.cls_conv.input_quant


def test_gradients_averages_and_checkpoints():
    model, x, report = model_of()
    calibrate(model, [x])
    sum(a.sum() + b.sum() for a, b in model(x)).backward()
    assert all(layer.weight.grad is not None for layer in quant_layers(model).values())
    expected = model.eval()(x)
    for other in (copy.deepcopy(model), model_of()[0]):
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for p, q in zip(expected, other.eval()(x)) for a, b in zip(p, q))
    names = [name for name in activation_quantizers(model) if name.startswith('head.cls_conv')]
    assert names == [f'head.cls_conv.own_input_quant.{level}' for level in range(3)]
    assert activation_quantizers(model)[names[1]].name == 'head.cls_conv.1'
    (row,) = [line for line in layer_table(model, report).splitlines() if line.startswith('head.cls_conv ')]
    assert 'signed, 3 pyramid levels' in row


def test_layers_that_are_called_once_are_left_alone():
    model, x, _ = model_of()
    assert model.stem.input_quant.threshold.dim() == 0
    once = Function(lambda m, x: m.b(m.a(x)), a=conv(), b=nn.Conv2d(4, 2, 1))
    quantize_model(once, Quantization.from_dict(dict(activation=dict(per_level=True))), record(once, lambda: once(x)))
    assert len(activation_quantizers(once)) == 2


# ---- deployment -----------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A shared convolution with batch normalization, one without, and a linear layer; flat outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = (
            conv(),
            Function(self.levels, conv=conv(), bn=nn.BatchNorm2d(4), out=conv(), fc=nn.Linear(4, 3)),
        )
        self.head.bn.running_mean.normal_()
        self.head.bn.weight.data.normal_()

    @staticmethod
    def levels(head, xs):
        between = [head.bn(head.conv(x)).relu() for x in xs]
        return [*map(head.out, between), *(head.fc(y.mean((2, 3))) for y in between)]

    def forward(self, x):
        x = self.stem(x)
        return tuple(self.head([scale * x + shift for scale, shift in zip(SCALES, (0, 1, -2))]))


def deployed_model(deployable=True):
    torch.manual_seed(0)
    model, x = Dense().eval(), torch.randn(4, 4, 8, 8)
    config = Quantization.from_dict(dict(activation=dict(per_level=True), deployable=deployable))
    plan = record(model, lambda: model(x))
    quantize_model(model, config, plan)
    calibrate(model, [x])
    return model, plan, x


@pytest.mark.parametrize('deployable', [True, False])
def test_levels_are_merged_with_their_own_multipliers(deployable):
    model, plan, x = deployed_model(deployable)
    merged = merge_model(model, plan)
    results = compare(model, merged, plan, lambda m: m(x))
    assert [r.name for r in results if 'conv' in r.name] == ['head.conv.0', 'head.conv.1', 'head.conv.2']
    assert len(results) == 10 and all(r.accumulator_errors == r.wrong == 0 for r in results)
    assert max(r.largest for r in results) < 1e-4
    for one, other in zip(model(x), merged(x)):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    levels = [merged.head.conv.get_submodule(str(level)) for level in range(3)]
    assert levels[0].codes is levels[1].codes and not torch.equal(levels[0].multiplier, levels[1].multiplier)
    with pytest.raises(UserError, match=r'head\.conv has thresholds for 3 pyramid levels, but was called 2 times'):
        merged.head([x, x])


def test_another_level_of_the_merged_model_is_seen():
    model, plan, x = deployed_model()
    merged = merge_model(model, plan)
    merged.head.conv.get_submodule('1').multiplier.mul_(1.02)
    wrong = [r.name for r in compare(model, merged, plan, lambda m: m(x)) if r.wrong or r.largest > 1e-4]
    assert wrong == ['head.conv.1']


@pytest.mark.parametrize('deployable', [True, False])
def test_levels_give_the_same_codes_in_both_runtimes(deployable):
    model, plan, x = deployed_model(deployable)
    graph = export_onnx(merge_model(model, plan), x, [f'y{i}' for i in range(6)])
    stored = [t.name for t in graph.graph.initializer if t.name.startswith('head.conv.') and 'codes' in t.name]
    assert sorted(stored) == ['head.conv.0.codes.factor', 'head.conv.0.codes.int4']  # once for all levels
    seen, out = record_codes(model, lambda: model(x))
    for name, pieces in pieces_of(graph, seen, x, [y.numpy() for y in out]).items():
        assert {f'head.{layer}.{level}' for layer in ('conv', 'out', 'fc') for level in range(3)} < {
            p.name for p in pieces
        }
        assert sum(p.wrong for p in pieces) == 0, (name, pieces)
        assert sum(p.differing for p in pieces if p.step) <= (2 if deployable else 20), (name, pieces)


def test_levels_in_a_packed_file(tmp_path):
    model, plan, x = deployed_model()
    merged = merge_model(model, plan)
    write_packed(merged, tmp_path / 'model.gdrq')
    other = Dense().eval()
    quantize_model(other, Quantization.from_dict(dict(activation=dict(per_level=True), deployable=True)), plan)
    again, _ = load_packed(other, tmp_path / 'model.gdrq')
    assert sum(isinstance(m, IntegerLayer) for m in again.modules()) == 10
    assert all(torch.equal(a, b) for a, b in zip(again(x), merged(x)))


def test_a_packed_file_of_other_levels_is_refused(tmp_path):
    model, plan, _ = deployed_model()
    write_packed(merge_model(model, plan), tmp_path / 'model.gdrq')
    plain = Dense().eval()
    quantize_model(plain, Quantization.from_dict(dict(deployable=True)), plan)
    with pytest.raises(UserError, match=r'is that of another model: the config has no head\.conv\.0'):
        load_packed(copy.deepcopy(plain), tmp_path / 'model.gdrq')
    calibrate(plain, [torch.randn(2, 4, 8, 8)])
    write_packed(merge_model(plain, plan), tmp_path / 'plain.gdrq')
    with pytest.raises(UserError, match=r'is that of another model: it has no layer head\.conv\.0'):
        load_packed(copy.deepcopy(model), tmp_path / 'plain.gdrq')


class Segmentor(nn.Module):
    """Calls the `forward` of its head, as mmseg does, so the level is counted around the model."""

    def __init__(self):
        super().__init__()
        self.stem, self.decode_head = conv(), Function(lambda head, x: head.conv(head.conv(x).relu() * 2), conv=conv())

    def extract_feat(self, x):
        return self.stem(x)

    def forward(self, x):
        return self.decode_head.forward(self.extract_feat(x))


def test_a_part_without_the_forward_of_its_model_counts_anew():
    torch.manual_seed(0)
    model, x = Segmentor().eval(), torch.randn(2, 4, 8, 8)
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization.from_dict(dict(activation=dict(per_level=True), deployable=True)), plan)
    calibrate(model, [x])
    (part,), (merged,) = parts_of(model, 'seg'), parts_of(merge_model(model, plan), 'seg')
    expected = model(x)
    for _ in range(2):
        seen, (out,) = record_codes(model, lambda: part.module(x))
        assert torch.equal(out, expected)
    graph = export_onnx(merged.module, x, ['y'])
    for pieces in pieces_of(graph, seen, x, out.numpy()).values():
        assert [p.name for p in pieces if p.step] == ['stem', 'decode_head.conv.0', 'decode_head.conv.1']
        assert sum(p.wrong for p in pieces) == 0
