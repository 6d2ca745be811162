"""QuantRunner on a small real model: stages, exact resume, EMA, accumulation, mixed precision, statistics."""

import json
import os
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.runner import Runner

from gdrq_mm.core import functional as F
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import Stage, WeightQuantizer, loss_aware
from gdrq_mm.core.quantizers import gdrq as gdrq_module
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.hooks import StatisticsHook
from gdrq_mm.report.layers import layer_table
from tests import reference
from tests.helpers import same
from tests.runs import QUANTIZATION, TEST_ONLY, At, checkpoint_of, contents, quantizers_of, scores_of, train

STAGES = dict(reshape=0.3, freeze=0.6)
"""Of 16 iterations 5 reshape, 5 quantize, 6 freeze; the three checkpoints before the last have one stage each."""


def quantization(**changes):
    return {**QUANTIZATION, 'schedule': STAGES, **changes}


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other_and_do_what_they_say(make):
    stages, ratios, kept, weights = [], [], [], []
    config = quantization(weight=dict(bits=2, groups=2, gdrq=dict(k=2.0, clip='project')))

    def look(runner):
        (stage,) = {q.stage for q in quantizers_of(runner).values()}
        stages.append(stage)
        for layer in quant_layers(runner.model).values():
            quant = layer.weight_quant
            limit = F.per_channel(quant.threshold, quant.sizes, layer.weight.shape)
            assert stage == Stage.FREEZE or bool((layer.weight.abs() <= limit).all()), 'stored weights are within T'
        layer = quant_layers(runner.model)['backbone.layer2.0.conv1']
        ratios.append(float(layer.weight.abs().max() / layer.weight.abs().mean()))
        weights.append(layer.weight.detach().clone())
        state = runner.model.state_dict()
        kept.append({n: v.clone() for n, v in state.items() if n.endswith(('threshold', '_mean', '_var', '_tracked'))})

    runner = make(quantization=config, epochs=4)
    end = train(runner, look)
    assert stages == [Stage.RESHAPE] * 5 + [Stage.QUANTIZE] * 5 + [Stage.FREEZE] * 6
    assert ratios[4] < 2.8, 'projection reshapes the stored weights'
    assert not any(same(one, other) for one, other in pairwise(kept[:10]))
    assert all(same(kept[10], later) for later in kept[10:]), 'frozen'
    assert same(kept[10], {name: end[name] for name in kept[10]})
    sizes = quant_layers(runner.model)['backbone.layer2.0.conv1'].weight_quant.sizes
    expected = F.scale_clip_threshold(weights[9], 2.0, sizes)
    assert torch.equal(kept[10]['backbone.layer2.0.conv1.weight_quant.threshold'], expected), 'those of this moment'
    assert same(kept[9], kept[10]), 'those of the last rounded step'
    assert not any(torch.equal(one, other) for one, other in pairwise(weights)), 'weights learn to the end'


def test_evaluation_rounds_from_the_stage_quantize_on(make):
    """Different values in a group of weights, and in an activation, in the validations after 1, 2, 3 and 4 epochs."""
    runner = make(quantization=quantization(weight=dict(bits=2, groups=2), activation=dict(bits=3)), epochs=4)
    counts = defaultdict(dict)

    def count(quantizer, args, out):
        if not quantizer.training:
            parts = out.split(quantizer.sizes.tolist()) if isinstance(quantizer, WeightQuantizer) else [out]
            counts[runner.epoch][quantizer] = max(len(part.unique()) for part in parts)

    for quantizer in quantizers_of(runner).values():
        quantizer.register_forward_hook(count)
    train(runner)
    for epoch in (2, 3, 4):
        assert len(counts[epoch]) == len(quantizers_of(runner))
        for quantizer, levels in counts[epoch].items():
            assert levels <= 2**quantizer.bits - (isinstance(quantizer, WeightQuantizer) and quantizer.bits > 2)
    assert all(levels > 2**quantizer.bits for quantizer, levels in counts[1].items() if quantizer.bits < 8)


def test_the_range_of_a_residual_branch_that_starts_at_zero_is_signed(make):
    """OpenMMLab's ResNets start with such branches; calibration sees zeros only, later the values have both signs."""
    runner = make(epochs=1, **{'model.backbone.zero_init_residual': True})
    train(runner)
    branches = {n: q for n, q in activation_quantizers(runner.model).items() if n.endswith('bn2.output_quant')}
    assert len(branches) == 8
    assert [name for name, quantizer in branches.items() if quantizer.kind == 'unsigned'] == []


def test_thresholds_of_activations_move_in_training_and_not_in_evaluation(make):
    seen = []
    runner = make(epochs=1)
    train(runner, lambda r: seen.append(float(activation_quantizers(r.model)['head.fc.own_input_quant'].threshold)))
    assert len(set(seen)) == 4
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.val_loop.run()
    assert same(before, dict(runner.model.state_dict()))


@pytest.mark.parametrize('keys', ['accuracy/top1', ['accuracy/top1', 'accuracy/top5']])
def test_the_best_checkpoint_is_a_quantized_one(make, keys):
    """The score falls from epoch to epoch, so the float model of the reshape stage has the best one."""
    saving = {'default_hooks.checkpoint.save_best': keys, 'default_hooks.checkpoint.rule': 'greater'}
    config = quantization(schedule=dict(reshape=0.5))
    runner = make(quantization=config, val_evaluator=dict(type='Accuracy', topk=(1, 5)), epochs=2, **saving)
    falling = At(None, 'after_val_epoch', 'HIGHEST')
    falling.after_val_epoch = lambda runner, metrics: metrics.update(dict.fromkeys(metrics, 50.0 - runner.epoch))
    runner.register_hook(falling)
    train(runner)
    best = {key: value for key, value in runner.message_hub.runtime_info.items() if key.startswith('best_ckpt')}
    assert len(best) == (1 if isinstance(keys, str) else 2)
    assert all(path.endswith('epoch_2.pth') for path in best.values())


def test_a_best_score_of_no_metric_names_those_there_are(make):
    runner = make(epochs=1, **{'default_hooks.checkpoint': dict(save_best='acc', rule='greater')})
    with pytest.raises(UserError, match=r"save_best='acc': the metrics are accuracy/top1"):
        runner.train()


# ---- resume and seeds -----------------------------------------------------------------------------------------------


def weights_by(**options):
    return dict(quantization=quantization(weight=dict(bits=3, groups=4, gdrq=options)))


VARIANTS = {
    'clipped on the way in': dict(quantization=quantization()),
    'projected': weights_by(clip='project'),
    'searched': weights_by(threshold='search'),
    'learned': dict(quantization=quantization(weight=dict(method='lsq', bits=3, groups=4))),
    'EMA': dict(quantization=quantization(), custom_hooks=[dict(type='EMAHook', momentum=0.1)]),
    'EMA with buffers': dict(
        quantization=quantization(), custom_hooks=[dict(type='EMAHook', momentum=0.1, update_buffers=True)]
    ),
    'accumulation': {'quantization': quantization(), 'optim_wrapper.accumulative_counts': 2},
    'accumulation over the end of an epoch': {'quantization': quantization(), 'optim_wrapper.accumulative_counts': 3},
    'accumulation of what learns': {'quantization': quantization(method='lsq'), 'optim_wrapper.accumulative_counts': 3},
    'accumulation of what is noted': {
        'quantization': quantization(method='loss_aware'),
        'optim_wrapper.accumulative_counts': 3,
    },
    'bfloat16': {'quantization': quantization(), 'optim_wrapper.type': 'gdrq_mm.openmmlab.amp.CPUAmpOptimWrapper'},
    'float, random numbers in the main process': {
        'quantization': None,
        'model.train_cfg': dict(augments=dict(type='Mixup', alpha=0.8)),
        'train_dataloader.num_workers': 1,
    },
    'seed of its own': dict(quantization=None, randomness=dict(seed=None)),
}


LONGER = ('EMA', 'searched', 'learned', 'seed of its own', 'accumulation')  # others cover them in part
MARKED = [pytest.param(name, marks=[pytest.mark.full] if name in LONGER else []) for name in VARIANTS]


@pytest.mark.parametrize('variant', MARKED)
def test_a_resumed_run_equals_an_undisturbed_one(make, variant, monkeypatch):
    """Interrupted after each epoch, so in every stage: weights, thresholds, losses and optimizer to the last bit."""
    for module in (gdrq_module, loss_aware):
        monkeypatch.setattr(module, 'INTERVAL', 3)  # else it does not fall into so short a run
    losses = []
    changes = dict(VARIANTS[variant], epochs=4)

    def note(runner):
        losses.append((runner.iter, float(runner.message_hub.get_scalar('train/loss').current())))

    whole = make('whole', **changes)
    train(whole, note)
    expected, losses[:] = list(losses), []
    assert len(expected) == 16
    for epoch in (1, 2, 3):
        checkpoint = checkpoint_of(whole, f'epoch_{epoch}.pth')
        resumed = make(f'resumed{epoch}', **changes, resume=True, load_from=checkpoint)
        train(resumed, note)
        assert losses == expected[4 * epoch :], f'after {epoch} epochs'
        assert same(contents(whole, 'epoch_4.pth'), contents(resumed, 'epoch_4.pth')), f'after {epoch} epochs'
        losses.clear()


@pytest.mark.parametrize('sampler', ['DefaultSampler', 'InfiniteSampler'])
def test_an_iteration_based_run_resumes_in_the_middle_of_an_epoch(make, sampler):
    """Promised: the next batch comes, none is repeated or left out, and nothing differs, whatever number of workers."""
    losses = []
    changes = {
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=7, val_interval=100),
        'param_scheduler': dict(type='CosineAnnealingLR', T_max=7, by_epoch=False),
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=5, by_epoch=False),
        'train_dataloader.sampler.type': sampler,
    }

    def note(runner):
        losses.append(float(runner.message_hub.get_scalar('train/loss').current()))

    whole = make('whole', **changes)
    train(whole, note)
    workers = {'train_dataloader.num_workers': 2 if sampler == 'InfiniteSampler' else 0}
    resumed = make('resumed', **changes, **workers, resume=True, load_from=checkpoint_of(whole, 'iter_5.pth'))
    train(resumed, note)
    assert len(losses) == 9 and losses[7:] == losses[5:7]
    assert same(contents(whole, 'iter_7.pth'), contents(resumed, 'iter_7.pth'))


def test_an_epoch_based_run_resumes_in_the_middle_of_an_epoch(make):
    """No batch twice, none left out."""
    changes = {'default_hooks.checkpoint': dict(type='CheckpointHook', interval=3, by_epoch=False)}
    whole = make('whole', **changes)
    end = train(whole)
    resumed = make('resumed', **changes, resume=True, load_from=checkpoint_of(whole, 'iter_6.pth'))
    state = train(resumed)
    assert (whole.iter, resumed.iter) == (12, 12)
    assert same(dict(end), dict(state))


def test_the_seed_decides(make):
    """Thresholds at the start, and all that follows."""
    starts, ends = [], []

    def look(runner):
        if runner.iter == 0:
            state = runner.model.state_dict()
            starts.append({name: value.clone() for name, value in state.items() if name.endswith('threshold')})

    for number, seed in enumerate((0, 0, 1)):
        runner = make(f'{number}', epochs=1, randomness=dict(seed=seed))
        runner.register_hook(At(look, 'before_train_iter'))
        ends.append(dict(train(runner)))
        assert contents(runner, 'epoch_1.pth')['progress']['seed'] == runner.seed == seed
    assert len(starts) == 3 and all(bool((value > 0).all()) for value in starts[0].values())
    assert same(starts[0], starts[1]) and not same(starts[0], starts[2])
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_a_run_without_a_seed_is_repeated_with_the_one_it_recorded(make):
    runner = make('first', epochs=1, randomness=dict(seed=None))
    end = train(runner)
    seed = contents(runner, 'epoch_1.pth')['progress']['seed']
    assert same(dict(end), dict(train(make('second', epochs=1, randomness=dict(seed=seed)))))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_quantized_checkpoint_holds_all_that_inference_needs(make):
    runner = make(quantization=quantization(), epochs=4)
    validated = scores_of(runner)
    train(runner)
    tester = make('test', quantization=quantization(), load_from=checkpoint_of(runner, 'epoch_4.pth'), **TEST_ONLY)
    tested = scores_of(tester)
    assert tester.test()['accuracy/top1'] == runner.message_hub.get_scalar('val/accuracy/top1').current()
    assert len(tested) == 1 and torch.equal(tested[0], validated[-1])
    assert same(dict(tester.model.state_dict()), dict(runner.model.state_dict()))


def test_a_float_checkpoint_starts_quantized_training(make, float_checkpoint):
    runner = make(epochs=1, load_from=float_checkpoint)
    loaded, calibrated = [], []

    def look(runner):
        loaded.append({name: value.clone() for name, value in runner.model.named_parameters()})
        calibrated.append([quantizer.calibrated for quantizer in quantizers_of(runner).values()])

    runner.register_hook(At(look, 'before_train_iter'))
    train(runner)
    state = read_checkpoint(float_checkpoint)['state_dict']
    assert same(loaded[0], {name: state[name] for name in loaded[0]})
    assert all(calibrated[0])


def test_a_plain_state_dict_starts_training_with_EMA(make, float_checkpoint, tmp_path):
    torch.save(read_checkpoint(float_checkpoint)['state_dict'], tmp_path / 'plain.pth')
    runner = make(epochs=1, load_from=str(tmp_path / 'plain.pth'), custom_hooks=[dict(type='EMAHook')])
    train(runner)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pretrained_weights_that_are_missing_are_one_line(make):
    init = dict(type='Pretrained', checkpoint='nothing.pth', prefix='backbone.')
    with pytest.raises(UserError, match=r'init_cfg: .*nothing\.pth'):
        make(epochs=1, **{'model.backbone.init_cfg': init}).train()


def test_a_pretrained_backbone_runs_no_code(make, float_checkpoint, tmp_path):
    """mmengine reads `init_cfg` by itself, and falls back to a loader that executes what it finds."""
    state = read_checkpoint(float_checkpoint)['state_dict']
    torch.save(dict(state_dict=state, more=Payload(tmp_path / 'executed')), tmp_path / 'pretrained.pth')
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'pretrained.pth'), prefix='backbone.')
    runner = make(epochs=1, **{'model.backbone.init_cfg': init})
    with pytest.raises(UserError, match=r'pretrained\.pth'):
        train(runner)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    ('weight', 'message'),
    [
        (dict(bits=2, groups=4), r'quantization\.weight\.bits is 4 in the checkpoint and 2 in the config'),
        (dict(bits=4, groups=2), r'quantization\.weight\.groups is 4 in the checkpoint and 2 in the config'),
        (dict(bits=4, groups=4, gdrq=dict(k=2.5)), r'weight\.gdrq\.k is None in the checkpoint and 2\.5 in the config'),
        (
            dict(bits=4, groups=4, gdrq=dict(threshold='search')),
            r"weight\.gdrq\.threshold is 'scale_clip' in the checkpoint and 'search' in the config",
        ),
        (
            dict(bits=4, groups=4, method='minmax'),
            r"weight\.method is 'gdrq' in the checkpoint and 'minmax' in the config",
        ),
    ],
)
def test_thresholds_of_another_quantization_start_anew_in_training_and_are_refused_elsewhere(make, weight, message):
    first = make('first', epochs=1)
    train(first)
    checkpoint = checkpoint_of(first)
    other = {**QUANTIZATION, 'weight': weight}
    runner = make('second', quantization=other, epochs=1, load_from=checkpoint)
    start = []
    runner.register_hook(
        At(lambda r: start.append(quant_layers(r.model)['backbone.conv1'].weight.clone()), 'before_train')
    )
    train(runner)
    assert torch.equal(start[0], read_checkpoint(checkpoint)['state_dict']['backbone.conv1.weight'])
    assert all(quantizer.calibrated for quantizer in quantizers_of(runner).values())
    for use in (TEST_ONLY, dict(resume=True)):
        runner = make('third', quantization=other, load_from=checkpoint, **use)
        with pytest.raises(UserError, match=message):
            runner.test() if use is TEST_ONLY else runner.train()


def test_what_only_training_reads_may_differ_in_a_test_and_not_in_a_resume(make):
    first = make('first', epochs=1)
    train(first)
    other = {**QUANTIZATION, 'schedule': dict(freeze=0.5), 'calibration_batches': 3}
    make('test', quantization=other, load_from=checkpoint_of(first), **TEST_ONLY).test()
    resumed = make('resumed', quantization=other, load_from=checkpoint_of(first), resume=True, epochs=2)
    with pytest.raises(UserError, match=r'quantization\.schedule is .* in the checkpoint and .*freeze=0\.5'):
        resumed.train()


# ---- mmengine's features --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('buffers', [False, True])
def test_the_average_of_EMA_is_tested_as_it_was_validated(make, buffers):
    """YOLOX and RTMDet average buffers too."""
    hooks = [dict(type='EMAHook', momentum=0.3, update_buffers=buffers)]
    runner = make(quantization=quantization(), epochs=4, custom_hooks=hooks)
    validated = scores_of(runner)
    own = train(runner)
    tester = make('test', quantization=quantization(), load_from=checkpoint_of(runner, 'epoch_4.pth'), **TEST_ONLY)
    tested = scores_of(tester)
    tester.test()
    averaged = tester.model.state_dict()
    assert not torch.equal(averaged['head.fc.weight'], own['head.fc.weight'])
    assert tester.describe()['stage'] == 'freeze'
    assert torch.equal(tested[0], validated[-1])


def test_averaged_weights_have_thresholds_of_their_own(make):
    hooks = [dict(type='EMAHook', momentum=0.3)]
    runner = make(epochs=2, custom_hooks=hooks, **{'quantization.weight.gdrq.k': 3.5})
    used = []

    def note(quantizer, args, out):
        if not quantizer.training:
            used.append([value.detach().clone() for value in (*args, out)])

    name = 'backbone.layer1.0.conv1.weight'
    quant_layers(runner.model)['backbone.layer1.0.conv1'].weight_quant.register_forward_hook(note)
    own = train(runner)[name]
    averaged = read_checkpoint(checkpoint_of(runner, 'epoch_2.pth'))['state_dict'][name]
    weight, quantized = used[-1]
    assert torch.equal(weight, averaged) and not torch.equal(weight, own)
    weight = weight.double().numpy()
    expected = reference.quantize_groups(weight, reference.scale_clip_threshold(weight, 3.5, 4), 4)
    np.testing.assert_allclose(quantized, expected, rtol=1e-5, atol=1e-6)


def test_accumulation_moves_a_threshold_once_by_all_inner_forwards(make):
    """Two batches of 16 and one of 32 with the same pictures move it by the same amount."""
    moved = {}

    def note(runner):
        quantizer = activation_quantizers(runner.model)['backbone.conv1.own_input_quant']
        moved.setdefault(runner.cfg.work_dir, []).append(float(quantizer.threshold))

    plain = {'train_dataloader.sampler.shuffle': False, 'train_dataloader.dataset.pipeline.1.padding': 0}
    inner = {**plain, 'quantization.calibration_batches': 4, 'optim_wrapper.accumulative_counts': 2}
    train(make('inner', epochs=1, **inner), note)
    train(make('whole', epochs=1, **plain, **{'train_dataloader.batch_size': 32}), note)
    inner, whole = moved.values()
    assert len(inner) == 4 and inner[0] != inner[1] and inner[1] == inner[2]
    assert inner[1::2] == pytest.approx(whole, rel=1e-5)


def test_synchronized_batch_norm_runs_on_one_cpu(make):
    runner = make(epochs=1, **{'model.backbone.norm_cfg': dict(type='SyncBN')})
    train(runner)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in runner.model.modules())


def test_calibration_changes_nothing_but_the_quantizers(make, float_checkpoint):
    """A BN whose output is an operand of an addition has a quantizer for a child, and stands still all the same."""
    runner = make(load_from=float_checkpoint)
    assert any(hasattr(m, 'output_quant') for m in runner.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    runner.load_calibrated()
    expected = read_checkpoint(float_checkpoint)['state_dict']
    state = runner.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(quantizer.calibrated for quantizer in quantizers_of(runner).values())


def test_calibration_leaves_averages_alone(make, float_checkpoint, tmp_path):
    runner = make(load_from=float_checkpoint, custom_hooks=[dict(type='EMAHook')])
    runner.calibrate(str(tmp_path / 'calibrated.pth'))
    state = read_checkpoint(str(tmp_path / 'calibrated.pth'))['state_dict']
    assert all(torch.equal(state[name], value) for name, value in runner.model.state_dict().items())


def test_a_layer_that_calibration_does_not_reach_stays_float(make):
    runner = make(epochs=1)
    unused = quant_layers(runner.model)['backbone.layer4.1.conv2']
    runner.model.backbone.layer4[1].forward = lambda x: x  # its convolutions are never called
    train(runner)
    assert unused.bits == (32, 32) and unused.weight_quant.stage == Stage.FLOAT
    row = next(line for line in layer_table(runner.model, runner.report).splitlines() if 'layer4.1.conv2' in line)
    assert 'not reached' in row


def test_statistics_are_written(make):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = make(
        epochs=1,
        **{'visualizer.vis_backends': [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]},
        custom_hooks=[dict(type='StatisticsHook', interval=3)],
    )
    train(runner)
    (folder,) = Path(runner.work_dir).glob('*/vis_data')
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    found, *others = [line for line in lines if any(key.startswith('quant/') for key in line)]
    assert [line['step'] for line in (found, *others)] == [0, 2, 3]  # the first, by the interval, the last
    names = {f'quant/{name}.weight' for name in quant_layers(runner.model)}
    names |= {f'quant/{name.removesuffix(".own_input_quant")}' for name in activation_quantizers(runner.model)}
    limits = dict(threshold=100, clip_ratio=1, quantized_loss=1, distance_to_uniform=1)
    assert {key for key in found if key.startswith('quant/')} == {f'{n}/{what}' for n in names for what in limits}
    for name in names:
        for what, limit in limits.items():
            assert 0 <= found[f'{name}/{what}'] <= limit
    assert len(list((folder / 'vis_image').glob('distributions_*.png'))) == 3
    events = EventAccumulator(str(folder), size_guidance={'histograms': 0})
    events.Reload()
    assert set(events.Tags()['histograms']) == names
    layer = quant_layers(runner.model)['backbone.layer1.0.conv1']
    *_, histogram = events.Histograms('quant/backbone.layer1.0.conv1.weight')
    assert histogram.histogram_value.num == layer.weight.numel()


def test_a_handwritten_layer_trains_under_the_stock_runner(config):
    cfg = config(epochs=1, quantization=None)
    cfg.model.backbone.conv_cfg = dict(type='GDRQConv2d', quantization=dict(weight=dict(bits=3)))
    cfg.custom_hooks = [dict(type='EMAHook'), dict(type='gdrq_mm.openmmlab.hooks.ThresholdHook')]
    runner = Runner.from_cfg(cfg)
    names = [type(hook).__name__ for hook in runner.hooks]
    assert names.index('ThresholdHook') < names.index('EMAHook')
    layer = quant_layers(runner.model)['backbone.layer1.0.conv1']
    seen = []
    with pytest.raises(UserError, match='has no threshold yet'):
        runner.val()
    train(runner, lambda r: seen.append(float(layer.input_quant.threshold)))
    assert layer.weight_quant.bits == 3 and layer.weight_quant.calibrated and len(set(seen)) == 4


def test_the_picture_of_the_statistics_is_no_time_of_loading_data(make, monkeypatch):
    """By a clock that goes on by an hour while it is drawn."""
    clock, passed, draw = time.time, [], StatisticsHook._write
    monkeypatch.setattr(time, 'time', lambda: clock() + sum(passed))
    monkeypatch.setattr(StatisticsHook, '_write', lambda self, *args: (passed.append(3600), draw(self, *args)))
    runner = make(epochs=1, custom_hooks=[dict(type='StatisticsHook', interval=1)])
    runner.train()
    spent = [runner.message_hub.log_scalars[f'train/{name}'].data[0] for name in ('data_time', 'time')]
    assert len(passed) == 4 and max(map(max, spent)) < 3600
