"""SettleHook in a real training: when, on which pictures, with averages of weights, and for a float model."""

import copy

import pytest
import torch
from mmengine.hooks import EMAHook

from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.hooks import SettleHook
from gdrq_mm.openmmlab.hooks.calibration import own_loader
from gdrq_mm.openmmlab.hooks.settle import weakly_augmented
from tests.helpers import same
from tests.runs import QUANTIZATION, At, checkpoint_of, contents, train

SETTLED = {**QUANTIZATION, 'schedule': dict(settle=0.25)}


def statistics(state):
    return {name: value for name, value in state.items() if name.endswith(('running_mean', 'running_var', 'threshold'))}


def test_weights_stay_and_statistics_do_not(make):
    runners, ends = [], []
    for name, quantization in (('plain', QUANTIZATION), ('settled', SETTLED)):
        runners.append(make(name, quantization=quantization))
        ends.append(train(runners[-1]))
    parameters = [dict(runner.model.named_parameters()) for runner in runners]
    assert same(*parameters)
    one, other = map(statistics, ends)
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    assert {name.rpartition('.')[2] for name in moved} == {'running_mean', 'running_var', 'threshold'}
    saved = read_checkpoint(checkpoint_of(runners[1], 'epoch_3.pth'))['state_dict']
    assert all(torch.equal(saved[name], other[name]) for name in other), 'the last checkpoint is settled'


def test_it_settles_once_after_the_last_step(make):
    runner, seen = make(quantization=SETTLED), []
    norm = runner.model.backbone.bn1
    norm.register_forward_pre_hook(lambda m, args: seen.append((runner.iter, m.momentum)) if m.training else None)
    train(runner)
    assert [iteration for iteration, momentum in seen if momentum is None] == [11] * 3  # a quarter of 12 iterations


def test_an_average_is_rounded_where_the_model_is(make):
    """What of INQ's weights is rounded stands in integers, which an average of weights skips."""
    ema, quantization = dict(type='EMAHook', momentum=0.5, update_buffers=True), {**SETTLED, 'method': 'inq'}
    runner = make(quantization=quantization, custom_hooks=[ema])
    train(runner)
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    ours, theirs = (dict(m.named_buffers()) for m in (runner.model, hook.ema_model.module))
    held = [name for name in ours if name.endswith('.held')]
    assert held and all(torch.equal(ours[name], theirs[name]) for name in held)


def test_an_average_of_weights_is_made_after_the_step_whatever_its_priority(make):
    """mmpretrain's ConvNeXt has ABOVE_NORMAL."""
    for priority in ('VERY_HIGH', 'ABOVE_NORMAL', 'LOW'):
        ema = dict(type='EMAHook', momentum=0.1, priority=priority)
        oscillation = dict(type='OscillationHook')
        names = [type(hook).__name__ for hook in make(priority, custom_hooks=[ema, oscillation]).hooks]
        for name in ('ThresholdHook', 'NormHook', 'OscillationHook'):
            assert names.index(name) < names.index('EMAHook')
        assert names.count('EMAHook') == 1


def test_an_average_of_weights_has_statistics_of_its_own(make):
    ema = [dict(type='EMAHook', momentum=0.5), dict(type='StatisticsHook', interval=0)]
    states = []
    for name, quantization in (('plain', QUANTIZATION), ('settled', SETTLED)):
        runner = make(name, quantization=quantization, custom_hooks=copy.deepcopy(ema))
        train(runner)
        states.append(read_checkpoint(checkpoint_of(runner, 'epoch_3.pth')))
    plain, settled = (statistics(state['state_dict']) for state in states)
    assert any(not torch.equal(plain[name], settled[name]) for name in plain), 'what is tested is settled'
    assert same(*(statistics(state['ema_state_dict']) for state in states)), 'the weights of the last step are not'


def test_the_average_that_settled_is_validated_as_it_is_saved(make):
    """mmengine exchanges the weights alone for a validation, and everything in a checkpoint."""
    runner = make(quantization=SETTLED, custom_hooks=[dict(type='EMAHook', momentum=0.5)], epochs=2)
    states = []
    for point in ('before_val_epoch', 'after_val_epoch'):
        note = At(None, point, 'VERY_LOW')
        setattr(note, point, lambda r, *args, **kwargs: states.append(copy.deepcopy(r.model.state_dict())))
        runner.register_hook(note)
    train(runner)
    validated = states[-2]
    assert same(validated, read_checkpoint(checkpoint_of(runner, 'epoch_2.pth'))['state_dict'])
    assert not same(validated, states[-1]), 'afterwards it is the model of the last step'
    changes = dict(quantization=SETTLED, custom_hooks=[dict(type='EMAHook', momentum=0.5)], epochs=2)
    resumed = make('resumed', **changes, load_from=checkpoint_of(runner, 'epoch_2.pth'), resume=True)
    note = At(None, 'before_val_epoch', 'VERY_LOW')
    note.before_val_epoch = lambda r, *args, **kwargs: states.append(copy.deepcopy(r.model.state_dict()))
    resumed.register_hook(note)
    train(resumed)
    assert same(states[-1], validated), 'killed while it validated, it does so when it is resumed'


def test_a_resumed_training_ends_as_the_whole_one(make):
    whole = make('whole', quantization=SETTLED)
    train(whole)
    resumed = make('resumed', quantization=SETTLED, load_from=checkpoint_of(whole, 'epoch_2.pth'), resume=True)
    train(resumed)
    assert same(contents(whole, 'epoch_3.pth'), contents(resumed, 'epoch_3.pth'))


def test_a_float_model_settles_too(make):
    hooks = [dict(type='SettleHook', length=0.25), dict(type='StatisticsHook', interval=0)]
    one = train(make('plain', quantization=None))
    other = train(make('settled', quantization=None, custom_hooks=hooks))
    assert not torch.equal(one['backbone.bn1.running_mean'], other['backbone.bn1.running_mean'])
    assert torch.equal(one['backbone.conv1.weight'], other['backbone.conv1.weight'])


def test_strong_augmentation_is_left_out_at_any_depth():
    load, flip = dict(type='LoadImageFromFile'), dict(type='mmdet.RandomFlip', prob=0.5)
    inner = dict(type='CocoDataset', pipeline=[load])
    cfg = dict(
        type='MultiImageMixDataset',
        dataset=dict(type='RepeatDataset', dataset=inner),
        pipeline=[dict(type='Mosaic'), dict(type='mmdet.YOLOXHSVRandomAug'), flip, dict(type='PackDetInputs')],
    )
    weak = weakly_augmented(cfg)
    assert [each['type'] for each in weak['pipeline']] == ['mmdet.RandomFlip', 'PackDetInputs']
    assert weak['dataset'] == cfg['dataset'] and len(cfg['pipeline']) == 4


def test_it_is_left_out_of_transforms_that_hold_others():
    """A choice keeps its places, as it may have a probability for each."""
    flip, strong = dict(type='RandomFlip'), dict(type='ColorJitter')
    cfg = dict(
        pipeline=[
            dict(type='RandomApply', transforms=[strong, flip], prob=0.3),
            dict(type='RandomChoice', transforms=[strong, [flip, strong], flip], prob=[0.5, 0.3, 0.2]),
        ]
    )
    one, other = weakly_augmented(cfg)['pipeline']
    assert one == dict(type='RandomApply', transforms=[flip], prob=0.3)
    assert other == dict(type='RandomChoice', transforms=[[], [flip], [flip]], prob=[0.5, 0.3, 0.2])


def test_endless_data_have_no_incomplete_batch(make):
    """BN cannot train on a single picture of a PSPNet, and the training never sees one."""
    for sampler, sizes in (('InfiniteSampler', [9] * 7), ('DefaultSampler', [9] * 7 + [1])):
        changes = {'train_dataloader.sampler.type': sampler, 'train_dataloader.batch_size': 9}
        runner = make(sampler, **changes, train_cfg=dict(type='IterBasedTrainLoop', max_iters=2))
        runner.train_loop  # noqa: B018 - builds it
        assert [len(batch['inputs']) for batch in own_loader(runner)] == sizes


def test_tuples_stay_tuples():
    """As sizes of crops, and ranges of mmcv's RandomResize, have to be."""
    cfg = dict(pipeline=[dict(type='RandomResize', scale=(64, 48), ratio_range=(0.5, 2.0)), dict(sizes=[(1, 2)])])
    assert weakly_augmented(cfg) == cfg


def test_a_training_that_stops_early_says_that_it_did_not_settle(make, monkeypatch):
    stop = dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=1, min_delta=100.0)
    runner = make(quantization=SETTLED, custom_hooks=[stop], epochs=4)
    told = []
    monkeypatch.setattr(runner.logger, 'warning', told.append)
    train(runner)
    assert runner.iter < 16
    assert [text for text in told if 'ended early: BN statistics and thresholds are not settled' in text]


def test_the_pictures_of_the_run_go_on_as_they_would(make):
    """The random state and the sampler of the training are not moved: validation and a longer run see the same."""
    states = []
    for name, quantization in (('plain', QUANTIZATION), ('settled', SETTLED)):
        runner = make(name, quantization=quantization)
        runner.register_hook(At(lambda runner: states.append(torch.get_rng_state()), 'after_train'))
        train(runner)
    assert torch.equal(*states)


@pytest.mark.parametrize('length', [0.02, 1.0])
def test_there_is_at_least_one_batch(make, length):
    runner = make(quantization={**QUANTIZATION, 'schedule': dict(settle=length)}, epochs=1)
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, SettleHook)]
    assert hook.length == length
    train(runner)
