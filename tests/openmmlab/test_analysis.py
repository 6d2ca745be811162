"""gdrq_mm.report, tools/analyze.py: statistics by NumPy, one layer quantized as by a config, what is written."""

import copy
import json
import math
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch

from gdrq_mm.core import functional as F
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import Quantizer, Stage
from gdrq_mm.data import digits
from gdrq_mm.openmmlab import analysis
from gdrq_mm.openmmlab.analysis import analyze, load, prepare, take_samples, weights_of
from gdrq_mm.openmmlab.models import bare_model
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.report.analysis import (
    Analysis,
    Damage,
    Metric,
    Row,
    analysis_dict,
    analysis_table,
    cost_picture,
    weight_sheet,
    worst_first,
)
from gdrq_mm.report.damage import Meter
from gdrq_mm.report.units import choose, only, units_of
from tests.helpers import ROOT, same
from tests.runs import QUANTIZATION, TEST_ONLY, checkpoint_of, task_config, tiny_config

FORKED = ('backbone.layer2.0.conv1', 'backbone.layer2.0.downsample.0')
"""Two layers that read one tensor."""
TOP1 = 'accuracy/top1'


def start(cfg, checkpoint):
    """A runner that is ready for the analysis."""
    calibrate = prepare(cfg, str(checkpoint))
    runner = QuantRunner.from_cfg(cfg)
    load(runner, calibrate)
    return runner


@pytest.fixture(scope='module')
def runner(digits_root, float_checkpoint, tmp_path_factory):
    """A model that was calibrated from the float checkpoint."""
    return start(tiny_config(digits_root, tmp_path_factory.mktemp('analysis')), float_checkpoint)


@pytest.fixture(scope='module')
def found(runner):
    return analyze(runner, show_progress=False)


def stages(runner):
    return {name: m.stage for name, m in runner.model.named_modules() if isinstance(m, Quantizer)}


def unit_of(runner, name):
    return next(unit for unit in units_of(runner.model, runner.report.plan) if unit.name == name)


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_a_meter_is_numpys_formulas_over_all_calls():
    calls = [torch.randn(2, 3, 4, 5) * scale for scale in (0.5, 1, 4)]
    low, high = torch.tensor(-1.5), torch.tensor(2.0)
    meter = Meter(keep=1000)
    for x in (*calls, torch.zeros(0, 3)):
        meter.add(x, F.fake_quantize(x, torch.tensor(0.5), -3, 4), low, high)
    x = torch.cat([each.flatten() for each in calls]).double().numpy()
    error = x - np.clip(np.round(x / 0.5), -3, 4) * 0.5
    damage = meter.result(bits=3)
    assert damage.bits == 3
    assert damage.sqnr == pytest.approx(10 * np.log10((x**2).sum() / (error**2).sum()), abs=1e-4)
    assert damage.clip_ratio == ((x > 2) | (x < -1.5)).mean() > 0
    assert damage.quantized_loss == pytest.approx(np.abs(error).sum() / np.abs(x).sum(), rel=1e-5)
    uniform = float(F.distance_to_uniform(torch.tensor(x)))
    assert damage.distance_to_uniform == pytest.approx(uniform, abs=1e-6)


def test_a_meter_keeps_a_sample_and_the_largest_value():
    """Every 1024th value would be the corner of each channel, which is 0 here."""
    x = torch.rand(4, 64, 32, 32)
    x[:, :, 0, 0] = 0
    x[3, 3, 3, 3] = 2.0
    meter = Meter(keep=256)
    meter.add(x, x, torch.tensor(0.0), torch.tensor(2.0))
    assert len(meter._kept[0]) < 300
    assert meter.result(8).distance_to_uniform == pytest.approx(float(F.distance_to_uniform(x)), abs=0.06)


def test_ends_of_a_meter():
    one, zero = torch.ones(4), torch.zeros(4)
    assert Meter(4).result(4) is None
    for x, quantized, sqnr, loss in ((one, one, math.inf, 0), (one, zero, 0, 1), (zero, zero, math.inf, 0)):
        meter = Meter(4)
        meter.add(x, quantized, -one[0], one[0])
        damage = meter.result(4)
        assert (damage.sqnr, damage.quantized_loss, damage.clip_ratio) == (sqnr, loss, 0)
    meter = Meter(4)
    meter.add(zero, one, -one[0], one[0])  # binary weights have no 0
    assert meter.result(1).sqnr == -math.inf


def test_a_value_at_the_end_of_the_range_is_not_clipped():
    """Rounding puts T / 7 * 7 below T for some T."""
    weight = torch.linspace(0.1, 1, 500)[:, None]
    step = weight / 7
    assert bool((step * 7 < weight).any())
    meter = Meter(500)
    meter.add(weight, weight, -7 * step, 7 * step)
    assert meter.result(4).clip_ratio == 0


def test_statistics_of_weights(runner, found):
    layers = quant_layers(runner.model)
    rows = [row for row in found.rows if row.weight]
    assert len(rows) == len(layers)
    for row in rows:
        layer, quant = layers[row.name], layers[row.name].weight_quant
        w, step = layer.weight.detach(), quant.step(layer.filters()).detach()
        quantized = quant.codes(layer.filters()) * step
        error = (w - quantized).double().numpy()
        sqnr = 10 * np.log10((w.double().numpy() ** 2).sum() / (error**2).sum())
        assert row.weight.bits == layer.bits[0] == (8 if row.name in ('backbone.conv1', 'head.fc') else 4)
        assert row.weight.sqnr == pytest.approx(sqnr, abs=1e-3)
        assert row.weight.quantized_loss == pytest.approx(float(F.quantized_loss(w, quantized)), rel=1e-5)
        outside = (w.abs() / (quant.hi * step) > 1 + 1e-6).double().mean()
        assert row.weight.clip_ratio == pytest.approx(float(outside), abs=1e-9)
        assert row.weight.distance_to_uniform == pytest.approx(float(F.distance_to_uniform(w)), abs=1e-6)


def test_statistics_of_inputs(runner, found):
    """Those that the quantized model computes, over all test pictures."""
    for row in (r for r in found.rows if (r.input and r.kind != 'layer') or r.name == 'backbone.layer1.0.conv1'):
        (quant,) = unit_of(runner, row.name).inputs
        seen = []
        handle = quant.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].flatten()))
        analysis.evaluate(runner)
        handle.remove()
        x, step = torch.cat(seen).double().numpy(), float(quant.step())
        error = x - np.clip(np.round(x / step), quant.lo, quant.hi) * step
        assert row.input.bits == (8 if row.kind == 'output' else 4)
        assert row.input.sqnr == pytest.approx(10 * np.log10((x**2).sum() / (error**2).sum()), abs=0.01)
        outside = (x > quant.hi * step) | (x < quant.lo * step)
        assert row.input.clip_ratio == pytest.approx(outside.mean(), abs=1e-5)
        assert row.input.quantized_loss == pytest.approx(np.abs(error).sum() / np.abs(x).sum(), rel=1e-3)
        uniform = float(F.distance_to_uniform(torch.cat(seen)))
        assert row.input.distance_to_uniform == pytest.approx(uniform, abs=0.02)


# ---- units ----------------------------------------------------------------------------------------------------------


def test_every_quantizer_is_in_one_unit(runner):
    units = units_of(runner.model, runner.report.plan)
    counted = [quantizer for unit in units for quantizer in unit.quantizers]
    assert len(counted) == len(set(counted)) == len(stages(runner))
    kinds = {unit.name: unit.kind for unit in units}
    assert kinds[f'{FORKED[0]} (input of 2)'] == 'shared input'
    assert kinds['backbone.layer1.0.bn2 (output)'] == 'output'
    shared = unit_of(runner, f'{FORKED[0]} (input of 2)')
    assert shared.readers == FORKED and shared.layer is None
    for name in FORKED:
        assert unit_of(runner, name).inputs == ()
    assert len(unit_of(runner, 'backbone.layer1.0.conv1').quantizers) == 2


def test_what_stays_float_is_in_no_unit(digits_root, float_checkpoint, tmp_path):
    quantization = {**QUANTIZATION, 'skip': ['backbone.layer1.*'], 'overrides': {'head.fc': dict(weight=dict(bits=32))}}
    runner = start(tiny_config(digits_root, tmp_path, quantization), float_checkpoint)
    units = {unit.name: unit for unit in units_of(runner.model, runner.report.plan)}
    assert not [name for name, unit in units.items() if unit.kind == 'layer' and 'layer1' in name]
    assert units['head.fc'].layer is None and len(units['head.fc'].inputs) == 1
    quant_layers(runner.model)['head.fc'].input_quant.stage = Stage.FLOAT  # as where calibration sees no batch
    assert 'head.fc' not in {unit.name for unit in units_of(runner.model, runner.report.plan)}


def test_patterns_choose_layers(runner):
    units = units_of(runner.model, runner.report.plan)
    assert choose(units, []) == units
    names = [unit.name for unit in choose(units, [FORKED[1], 'head.*'])]
    assert names == [FORKED[1], 'head.fc', f'{FORKED[0]} (input of 2)']
    with pytest.raises(UserError, match=r"pattern 'head.fx' matches no quantized layer; did you mean 'head.fc'"):
        choose(units, ['head.fx'])
    with pytest.raises(UserError, match='leaves every layer float'):
        choose([], [])


# ---- one unit quantized ---------------------------------------------------------------------------------------------


def logits(runner):
    bare_model(runner.model).eval()
    with torch.no_grad():
        return torch.stack([p.pred_score for batch in runner.test_dataloader for p in runner.model.test_step(batch)])


def take_weights(runner, source):
    """Weights, statistics and thresholds of another runner, as far as the model has them."""
    state = source.model.state_dict()
    runner.model.load_state_dict({key: state[key] for key in runner.model.state_dict()})


def top1(runner):
    runner.call_hook('before_run')
    return runner.test_loop.run()[TOP1]


FLOAT_SIDES = dict(weight=dict(bits=32), activation=dict(bits=32))


@pytest.mark.parametrize('name', ['backbone.layer1.0.conv1', 'head.fc', FORKED[1], f'{FORKED[0]} (input of 2)'])
def test_a_unit_alone_is_what_a_config_quantizes_alone(runner, found, digits_root, tmp_path, name):
    """By `skip`, or by `overrides` where only a weight or only an input is quantized."""
    quantization = copy.deepcopy(QUANTIZATION)
    unit = unit_of(runner, name)
    if unit.kind == 'shared input':  # outputs are quantized only where inputs are by default
        quantization['activation'] = dict(bits=32)
        only_input = dict(weight=dict(bits=32), activation=dict(bits=4))
        quantization['overrides'] = {'*': FLOAT_SIDES, **dict.fromkeys(unit.readers, only_input)}
    else:
        quantization['deployable'] = False
        quantization['skip'] = [other for other in quant_layers(runner.model) if other != name]
        if not unit.inputs:
            quantization['overrides'] = {name: dict(activation=dict(bits=32))}
    alone = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path, quantization, **TEST_ONLY))
    take_weights(alone, runner)
    if not quantization.get('deployable', True):  # the biases of the integer graph, as the whole model has them
        names, layers = {m: n for n, m in runner.model.named_modules()}, quant_layers(runner.model)
        for layer_name, layer in quant_layers(alone.model).items():
            norm = layers[layer_name].norm
            layer.deploy_with(None if norm is None else alone.model.get_submodule(names[norm]))
    assert len(stages(alone)) == len(unit.quantizers)
    with only(runner.model, unit.quantizers):
        ours = logits(runner)
    assert torch.equal(ours, logits(alone))
    assert top1(alone) == next(row.metric for row in found.rows if row.name == name)
    with only(runner.model, []):
        assert not torch.equal(ours, logits(runner))


def test_nothing_and_everything_quantized(runner, found, make):
    plain, whole = make('float', quantization=None, **TEST_ONLY), make('whole', **TEST_ONLY)
    for other in (plain, whole):
        take_weights(other, runner)
    assert top1(plain) == found.metric.unquantized and top1(whole) == found.metric.quantized
    assert torch.equal(logits(runner), logits(whole))
    with only(runner.model, []):
        assert torch.equal(logits(runner), logits(plain))


def test_nothing_of_the_model_changes(runner, found):
    before, state, random = stages(runner), copy.deepcopy(runner.model.state_dict()), torch.get_rng_state()
    analyze(runner, ['head.fc'], show_progress=False)
    with pytest.raises(RuntimeError), only(runner.model, []):
        assert set(stages(runner).values()) == {Stage.FLOAT}
        raise RuntimeError
    assert stages(runner) == before
    assert same(runner.model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in runner.model.modules() if isinstance(m, Quantizer))


def test_random_numbers_do_not_matter(runner, monkeypatch):
    """A model that draws some in evaluation, as some samplers do, gets the same each time."""
    model = bare_model(runner.model)
    forward = model.backbone.forward

    def noisy(x):
        (out,) = forward(x)
        return (out + torch.randn_like(out),)

    monkeypatch.setattr(model.backbone, 'forward', noisy)
    one, other = [], []
    for found in (one, other):
        torch.manual_seed(len(one))
        found.append(analyze(runner, ['head.fc'], show_progress=False))
    assert one == other


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(runner, monkeypatch):
    """Lets every unit cost what the test says: `scripted(costs, float_metric)`; units it leaves out cost nothing."""

    def scripted(costs, float_metric=90.0):
        units = units_of(runner.model, runner.report.plan)

        def evaluate(_):
            active = [p.name for p in units if all(q.stage != Stage.FLOAT for q in p.quantizers)]
            value = float_metric - sum(costs.get(name, 0) for name in active)
            return {TOP1: value, 'other': -value, 'classwise': [value]} if value > 0 else {}

        monkeypatch.setattr(analysis, 'evaluate', evaluate)

    return scripted


@pytest.mark.parametrize('reference', ['float', 'quantized'])
def test_costs_and_their_order(runner, scripted, reference):
    costs = {'head.fc': 2.0, f'{FORKED[0]} (input of 2)': 5.0, 'backbone.layer1.0.bn2 (output)': -1.0}
    scripted(costs)
    found = analyze(runner, reference=reference, show_progress=False)
    assert (found.metric.unquantized, found.metric.quantized) == (90, 84)
    assert {row.name: row.cost for row in found.rows if row.cost} == costs
    names = [row.name for row in found.rows]
    assert names[:2] == [f'{FORKED[0]} (input of 2)', 'head.fc'] and names[-1] == 'backbone.layer1.0.bn2 (output)'
    assert found.rows[0].metric == (85 if reference == 'float' else 89)
    assert (found.pictures, found.available) == (40, 40)


def test_other_metrics(runner, scripted):
    scripted({'head.fc': 2.0})
    found = analyze(runner, ['head.fc'], metric='other', show_progress=False)
    assert (found.metric.title, found.rows[0].cost) == ('other', -2)
    for key in ('mIoU', 'classwise'):  # not there, not a number
        with pytest.raises(UserError, match=f'--metric: the test computes no {key}, but accuracy/top1, other$'):
            analyze(runner, ['head.fc'], metric=key, show_progress=False)


def test_a_metric_that_is_missing_is_zero(runner, scripted):
    """CocoMetric leaves AP out if nothing was detected."""
    scripted({'head.fc': 100.0, 'backbone.conv1': -20.0})
    with pytest.raises(UserError, match='computes no accuracy/top1'):
        scripted({'head.fc': 200.0})
        analyze(runner, ['head.fc'], show_progress=False)
    scripted({'head.fc': 95.0, 'backbone.conv1': -20.0})
    found = analyze(runner, ['head.fc'], show_progress=False)
    assert (found.rows[0].metric, found.rows[0].cost, found.metric.quantized) == (0, 90, 15)


def test_weights_that_are_adapted_to_their_quantizers(runner, scripted, monkeypatch):
    told = []
    monkeypatch.setattr(runner.logger, 'warning', told.append)
    scripted({'head.fc': -20.0}, float_metric=60.0)
    analyze(runner, ['head.fc'], reference='quantized', show_progress=False)
    assert told == []
    analyze(runner, ['head.fc'], show_progress=False)
    assert len(told) == 1 and '60.00 with everything float and 80.00 quantized' in told[0]


def test_statistics_only(runner, found, monkeypatch):
    calls = []
    evaluate = analysis.evaluate
    monkeypatch.setattr(analysis, 'evaluate', lambda runner: calls.append(1) or evaluate(runner))
    bare = analyze(runner, reference=None, show_progress=False)
    assert len(calls) == 1 and bare.metric is None
    by_name = {row.name: row for row in found.rows}
    assert all((row.weight, row.input) == (by_name[row.name].weight, by_name[row.name].input) for row in bare.rows)
    assert [row.sqnr for row in bare.rows] == sorted(row.sqnr for row in bare.rows)
    assert all(row.cost is None and row.metric is None for row in bare.rows)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_gets_the_thresholds_of_calibrate(runner, make, config, float_checkpoint, tmp_path):
    calibrated = make('calibrate', load_from=float_checkpoint, val_cfg=None, val_dataloader=None, val_evaluator=None)
    calibrated.calibrate(str(tmp_path / 'calibrated.pth'))
    assert same(calibrated.model.state_dict(), runner.model.state_dict())
    cfg = config('quantized')
    assert not prepare(cfg, str(tmp_path / 'calibrated.pth')) and cfg.train_cfg is None
    quantized = QuantRunner.from_cfg(cfg)
    load(quantized, calibrate=False)
    assert same(quantized.model.state_dict(), runner.model.state_dict()) and stages(quantized) == stages(runner)
    other = config('other', quantization={**QUANTIZATION, 'weight': dict(bits=3)})
    with pytest.raises(UserError, match='another quantization config'):
        start(other, tmp_path / 'calibrated.pth')


def test_averaged_weights_are_those_that_a_test_uses(config, make):
    """EMA: no hook is called, and the checkpoint holds the average."""
    average = dict(custom_hooks=[dict(type='EMAHook', momentum=0.3)])
    trained = make('ema', epochs=1, **average)
    trained.train()
    path = checkpoint_of(trained)
    tested = make('ema test', load_from=path, **average, **TEST_ONLY)
    expected = tested.test()[TOP1]
    tested.call_hook('before_test_epoch')  # as the hook leaves the model for a test
    runner = start(config('ema analysis', **average), path)
    assert analyze(runner, ['head.fc'], show_progress=False).metric.quantized == expected
    assert torch.equal(logits(runner), logits(tested))


def test_pictures_are_evenly_spaced(make):
    runner = make('spaced', **TEST_ONLY)
    every = [sample.img_path for batch in runner.test_dataloader for sample in batch['data_samples']]
    take_samples(runner.test_loop, 12)
    chosen = [sample.img_path for batch in runner.test_dataloader for sample in batch['data_samples']]
    assert chosen == [every[i * 40 // 12] for i in range(12)]
    take_samples(runner.test_loop, 100)
    assert len(runner.test_dataloader.dataset) == 12


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', {'cls': {'train': 8, 'test': 8}, 'scenes': {'train': 4, 'test': 6}})
        return digits.build(tmp_path_factory.mktemp('scenes') / 'digits', show_progress=False)


@pytest.mark.parametrize(
    ('task', 'patterns', 'title'),
    [
        ('cls', ['head.fc', 'backbone.conv1'], 'top-1'),
        ('det', ['rpn_head.rpn_cls', 'backbone.conv1'], 'box AP'),
        ('seg', ['decode_head.conv_seg', 'backbone.stem.0'], 'mIoU'),
    ],
)
def test_all_tasks(scenes, tmp_path, task, patterns, title):
    cfg = task_config(task, scenes, tmp_path)
    cfg.experiment_name += '-analysis'
    plain = copy.deepcopy(cfg)
    plain.merge_from_dict(TEST_ONLY)
    plain.pop('quantization')
    plain.experiment_name += '-plain'
    torch.save(QuantRunner.from_cfg(plain).model.state_dict(), tmp_path / 'float.pth')
    runner = start(cfg, tmp_path / 'float.pth')
    found = analyze(runner, patterns, samples=3, show_progress=False)
    assert found.metric.title == title and (found.pictures, found.available) == (3, 8 if task == 'cls' else 6)
    names = {row.name for row in found.rows}
    assert set(patterns) <= names
    for row in found.rows:
        assert row.sqnr > 0 and 0 <= row.metric <= 100 and row.cost == found.metric.unquantized - row.metric
    readers = {reader for unit in units_of(bare_model(runner.model), runner.report.plan) for reader in unit.readers}
    assert not [reader for reader in readers if reader.startswith('auxiliary_head')]
    if task == 'det':
        assert 'rpn_head.rpn_cls (input of 2)' in names
        (coco,) = runner.test_loop.evaluator.metrics
        assert len(coco.img_ids) == 3  # else the others count as missed
    cost_picture(found), analysis_table(found)


# ---- what is written ------------------------------------------------------------------------------------------------

GOOD = Damage(4, 20.0, 0.01, 0.1, 0.5)
MADE = Analysis(
    [
        Row('a', 'layer', ('a',), GOOD, None, 80.0, 10.0),
        Row('b (input of 2)', 'shared input', ('b', 'c'), None, Damage(8, math.inf, 0, 0, 0.2), 91.0, -1.0),
        Row('d', 'layer', ('d',), GOOD, GOOD, 90.0, 0.0),
    ],
    Metric(TOP1, 'top-1', 1, 'float', 90.0, 75.0),
    pictures=10,
    available=40,
)


def picture(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


def test_the_order():
    rows = [
        Row('cheap', 'layer', (), GOOD, None, cost=0.0),
        Row('cheap and noisy', 'layer', (), GOOD, Damage(4, 3.0, 0, 0, 0), cost=0.0),
        Row('helps', 'layer', (), Damage(4, 1.0, 0, 0, 0), None, cost=-1.0),
        Row('dear', 'layer', (), Damage(4, 40.0, 0, 0, 0), None, cost=1.0),
    ]
    assert [row.name for row in worst_first(rows)] == ['dear', 'cheap and noisy', 'cheap', 'helps']
    assert [row.bits for row in MADE.rows] == ['W4', 'A8', 'W4A4']


def test_the_json():
    written = json.loads(json.dumps(analysis_dict(MADE, task='cls'), allow_nan=False))
    assert list(written)[:2] == ['analysis_version', 'task']
    assert written['rows'][0] == dict(
        name='a',
        kind='layer',
        readers=['a'],
        weight=dict(bits=4, sqnr=20.0, clip_ratio=0.01, quantized_loss=0.1, distance_to_uniform=0.5),
        input=None,
        metric=80.0,
        cost=10.0,
    )
    assert written['rows'][1]['input']['sqnr'] is None
    expected = dict(key=TOP1, title='top-1', factor=1, reference='float', unquantized=90.0, quantized=75.0)
    assert written['metric'] == expected


def test_the_table():
    table = analysis_table(MADE)
    header = [column.header for column in table.columns]
    cells = dict(zip(header, ([*column.cells] for column in table.columns)))
    assert cells['layer'] == ['a', 'b (input of 2)', 'd'] and cells['cost'] == ['10.00', '-1.00', '0.00']
    assert cells['SQNR A'] == ['', 'inf', '20.0'] and cells['clip % W'] == ['1.00', '', '1.00']
    assert cells['note'] == ['', 'read by b, c', '']
    assert 'drop 15.00' in table.title and '10 of 40 test pictures' in table.title and 'sum is 9.00' in table.title
    assert 'cost' not in [c.header for c in analysis_table(Analysis(MADE.rows, None, 10, 40)).columns]


def test_the_picture_of_costs():
    drawn = picture(cost_picture(MADE))
    assert drawn.shape[1] > 1000
    red, gray = ((drawn == color).all(-1).sum() for color in ((40, 39, 214), (127, 127, 127)))
    assert red > 5 * gray > 100  # bars of 10 and of -1
    more = Analysis(MADE.rows * 10, MADE.metric, 10, 40)
    assert picture(cost_picture(more)).shape[0] > 2 * drawn.shape[0]
    bare = picture(cost_picture(Analysis(MADE.rows, None, 10, 40)))
    assert bare.shape[1] < drawn.shape[1] and (bare != 255).any()


def test_the_weights(runner, found, float_checkpoint):
    state = torch.load(float_checkpoint, weights_only=False)['state_dict']
    chosen = [row for row in found.rows if row.kind != 'layer' or row.name.startswith(('backbone.layer2', 'head'))]
    layers = weights_of(runner.model, chosen, state)
    assert [each.name for each in layers] == [row.name for row in chosen if row.weight]
    for each in layers:
        np.testing.assert_array_equal(each.now, each.start)
        quant = quant_layers(runner.model)[each.name].weight_quant
        assert len(each.ends) == 2 * quant.groups and each.quantized.max() <= each.ends.max() * (1 + 1e-6)
        assert len(np.unique(each.quantized)) <= quant.groups * (2**quant.bits - 1)
    rows = {row.name: row for row in found.rows}
    drawn, without = (picture(weight_sheet(each, rows)) for each in (layers, weights_of(runner.model, chosen)))
    assert drawn.shape == without.shape and drawn.shape[0] > 400 and drawn.shape[1] > 1000
    assert (drawn != without).any()


# ---- tools/analyze.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def tool(config, tmp_path, monkeypatch):
    """Runs the tool in tmp_path with the config of a small model."""
    monkeypatch.chdir(tmp_path)
    config('tool').dump('tiny.py')

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['analyze.py', 'tiny.py', *map(str, arguments)])
        runpy.run_path(str(ROOT / 'tools/analyze.py'), run_name='__main__')

    return tool


def test_the_tool(tool, float_checkpoint, capsys, tmp_path):
    arguments = ('--samples', 20, '--layers', 'backbone.layer2.0.*', '--float-checkpoint', float_checkpoint)
    tool(float_checkpoint, *arguments)
    out = tmp_path / 'tool/analysis'
    assert sorted(p.name for p in out.iterdir()) == ['analysis.json', 'analysis.png', 'weights.png']
    written = json.loads((out / 'analysis.json').read_text())
    assert written['task'] == 'cls' and written['pictures'] == 20 and written['checkpoint']['calibrated_here']
    assert written['metric']['key'] == TOP1 and written['model']['bits'] == [4, 4]
    names = [row['name'] for row in written['rows']]
    assert f'{FORKED[0]} (input of 2)' in names and 'head.fc' not in names
    costs = [row['cost'] for row in written['rows']]
    assert costs == sorted(costs, reverse=True)
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and 'top-1 on 20 of 40 test pictures' in shown
    assert picture((out / 'analysis.png').read_bytes()).size and picture((out / 'weights.png').read_bytes()).size


NO_BITS = ('quantization.weight.bits=32', 'quantization.activation.bits=32')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.pth'], 'checkpoint none.pth does not exist'),
        (['text.pth'], 'checkpoint text.pth is truncated or damaged'),
        (['other.pth'], 'other.pth is of another model'),
        (['FLOAT', '--float-checkpoint', 'other.pth'], 'other.pth is of another model'),
        (['FLOAT', '--float-checkpoint', 'none.pth'], 'checkpoint none.pth does not exist'),
        (['FLOAT', '--layers', 'head.fx'], "the pattern 'head.fx' matches no quantized layer"),
        (['FLOAT', '--metric', 'mIoU', '--layers', 'head.fc'], 'the test computes no mIoU, but accuracy/top1'),
        (['FLOAT', '--samples', '0'], '--samples 0 is not at least 1'),
        (['FLOAT', '--out', 'text.pth'], 'text.pth cannot be written'),
        (['FLOAT', '--launcher', 'slurm'], '--launcher: the analysis runs in one process'),
        (['FLOAT', '--cfg-options', 'quantization.weight.bits=9'], 'quantization.weight.bits=9'),
        (['FLOAT', '--cfg-options', *NO_BITS], 'leaves every layer float'),
        (['FLOAT', '--cfg-options', 'runner_type=Runner'], "runner_type='Runner' does not quantize"),
    ],
)
def test_bad_input_ends_in_one_line(tool, float_checkpoint, tmp_path, arguments, message):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(SystemExit) as ended:
        tool(*(float_checkpoint if argument == 'FLOAT' else argument for argument in arguments))
    line = ended.value.code
    assert line.startswith('error: ') and message in line and '\n' not in line
    assert not list(tmp_path.rglob('analysis.*')) and not list(tmp_path.rglob('weights.png'))


def test_a_config_without_quantization(tool, config, float_checkpoint):
    config('tool', quantization=None).dump('tiny.py')
    with pytest.raises(SystemExit, match='the config has no quantization: there is nothing to analyze'):
        tool(float_checkpoint)
