"""openmmlab/analysis.py: statistics by NumPy's formulas, a unit alone is what a config quantizes alone, costs."""

import copy

import cv2
import numpy as np
import pytest
import torch

from gdrq_mm.core import functional as F
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import only, quant_layers
from gdrq_mm.core.quantizers import Quantizer, Stage
from gdrq_mm.data import digits
from gdrq_mm.openmmlab import analysis
from gdrq_mm.openmmlab.analysis import analyze, load, prepare, take_samples, weights_of
from gdrq_mm.openmmlab.models import bare_model
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.report.analysis import analysis_table, cost_picture, weight_sheet
from gdrq_mm.report.units import choose, units_of
from tests.helpers import same
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


def test_a_metric_under_another_prefix_is_found():
    assert analysis.metric_of({'a/top1': 1.0, 'b': 2.0}, None, 'cls') == ('a/top1', 'top-1', 1)
    assert analysis.metric_of({'a/top1': 1.0, 'accuracy/top1': 2.0}, None, 'cls')[0] == 'accuracy/top1'
    assert analysis.metric_of({'v2/bbox_mAP': 0.5}, None, 'det') == ('v2/bbox_mAP', 'box AP', 100)
    found = analysis.metric_of({'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_75': 0.4}, 'coco/bbox_mAP_75', 'det')
    assert found == ('coco/bbox_mAP_75', 'coco/bbox_mAP_75', 100), 'a share, as the others'
    with pytest.raises(UserError, match='but a/top1'):
        analysis.metric_of({'a/top1': 1.0}, 'accuracy/top1', 'cls')


def test_a_metric_that_is_missing_is_zero(runner, scripted):
    """CocoMetric leaves AP out if nothing was detected, as with 2 bits everywhere."""
    scripted({'head.fc': 200.0})
    found = analyze(runner, ['head.fc'], show_progress=False)
    assert (found.metric.unquantized, found.metric.quantized, found.rows[0].cost) == (90, 0, 90)
    scripted({}, float_metric=0.0)
    with pytest.raises(UserError, match='computes no accuracy/top1'):
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


# ---- pictures -------------------------------------------------------------------------------------------------------


def picture(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


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
