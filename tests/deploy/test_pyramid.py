"""Thresholds for pyramid levels, deployed: merged, exported, packed."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.flat import Flat
from gdrq_mm.deploy.from_packed import load_packed
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.onnx_export import export_onnx
from gdrq_mm.deploy.packed import write_packed
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.deploy.saturation import saturating
from gdrq_mm.deploy.verify import compare
from gdrq_mm.deploy.verify_onnx import record_codes
from tests.deploy.builders import pieces_of
from tests.helpers import Function, conv

SCALES = (1.0, 3.0, 0.2)


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


def deployed_model(deployable=True, bits=4, **weight):
    torch.manual_seed(0)
    model, x = Dense().eval(), torch.randn(4, 4, 8, 8)
    activation = dict(bits=bits, per_level=True)
    config = Quantization.from_dict(
        dict(weight=dict(bits=bits, **weight), activation=activation, deployable=deployable)
    )
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
    stored = [t.name for t in graph.graph.initializer if t.name.startswith('model.head.conv.') and 'codes' in t.name]
    assert sorted(stored) == ['model.head.conv.0.codes.factor', 'model.head.conv.0.codes.int4']  # once for all levels
    seen, out = record_codes(model, lambda: model(x))
    for name, pieces in pieces_of(graph, seen, x, [y.numpy() for y in out]).items():
        assert {f'head.{layer}.{level}' for layer in ('conv', 'out', 'fc') for level in range(3)} < {
            p.name for p in pieces
        }
        assert sum(p.wrong for p in pieces) == 0, (name, pieces)
        assert sum(p.differing for p in pieces if p.step) <= (2 if deployable else 20), (name, pieces)


@pytest.mark.parametrize('backend', RUNTIMES)
def test_levels_of_8_bits_run_without_vnni(backend, monkeypatch):
    """There sums of 8-bit products saturate, and what ONNX Runtime has against that fails where layers share codes."""
    monkeypatch.setattr('gdrq_mm.deploy.runtime.has_vnni', lambda: False)
    model, plan, x = deployed_model(bits=8, gdrq=dict(k=2.0))
    graph = export_onnx(merge_model(model, plan), x, [f'y{i}' for i in range(6)])
    assert saturating(graph)
    found = open_runtime(backend, graph.SerializeToString())([x.numpy()])
    for one, other in zip(model(x), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(other), one, atol=0.02 * float(one.abs().max()), rtol=0)


def test_levels_in_a_packed_file(tmp_path):
    model, plan, x = deployed_model()
    merged = merge_model(model, plan)
    write_packed(merged, tmp_path / 'model.safetensors')
    again, _ = load_packed(Dense(), tmp_path / 'model.safetensors')
    assert sum(isinstance(m, IntegerLayer) for m in again.modules()) == 10
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(again(x), merged(x)))
    assert again.head.conv.get_submodule('0').codes is again.head.conv.get_submodule('2').codes
    with pytest.raises(UserError, match=r'head\.conv has thresholds for 3 pyramid levels, but was called 2 times'):
        again.head([x, x])


def test_levels_that_the_config_does_not_have_are_refused(tmp_path):
    model, plan, _ = deployed_model()
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    config = Quantization.from_dict(dict(activation=dict(per_level=True)))
    load_packed(Dense(), tmp_path / 'model.safetensors', config)
    with pytest.raises(UserError, match=r'pyramid levels in layer head\.conv, the config has activation\.per_level='):
        load_packed(Dense(), tmp_path / 'model.safetensors', Quantization())


class Segmentor(nn.Module):
    """Calls the `forward` of its head, as mmseg does, so the level is counted around the model."""

    def __init__(self):
        super().__init__()
        self.stem, self.decode_head = conv(), Function(lambda head, x: head.conv(head.conv(x).relu() * 2), conv=conv())

    def extract_feat(self, x):
        return self.stem(x)

    def forward(self, x):
        return self.decode_head.forward(self.extract_feat(x))


def decoded(model, x):
    return model.decode_head(model.extract_feat(x))


def test_a_part_without_the_forward_of_its_model_counts_anew():
    torch.manual_seed(0)
    model, x = Segmentor().eval(), torch.randn(2, 4, 8, 8)
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization.from_dict(dict(activation=dict(per_level=True), deployable=True)), plan)
    calibrate(model, [x])
    part, merged = (Flat(m, decoded) for m in (model, merge_model(model, plan)))
    expected = model(x)
    for _ in range(2):
        seen, (out,) = record_codes(model, lambda: part(x))
        assert torch.equal(out, expected)
    graph = export_onnx(merged, x, ['y'])
    for pieces in pieces_of(graph, seen, x, out.numpy()).values():
        assert [p.name for p in pieces if p.step] == ['stem', 'decode_head.conv.0', 'decode_head.conv.1']
        assert sum(p.wrong for p in pieces) == 0
