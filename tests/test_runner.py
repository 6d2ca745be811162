"""QuantRunner on a small real model: stages, exact resume, EMA, accumulation, mixed precision, statistics."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from gdrq_mm.convert import activation_quantizers, quant_layers
from gdrq_mm.errors import UserError
from gdrq_mm.quantizers import Quantizer, Stage
from gdrq_mm.runner import QuantRunner
from gdrq_mm.summary import layer_table

ROOT = Path(__file__).resolve().parents[1]
QUANTIZATION = dict(weight=dict(bits=4, groups=4), activation=dict(bits=4), calibration_batches=2)


@pytest.fixture
def make(digits_root, tmp_path):
    """Builds a runner: 64 training pictures, 4 iterations an epoch, width 4."""

    def make(name='run', quantization=QUANTIZATION, epochs=3, **changes):
        cfg = Config.fromfile(ROOT / 'configs/cls/resnet18_w16_digits.py')
        cfg.merge_from_dict(
            {
                'model.backbone.stem_channels': 4,
                'model.backbone.base_channels': 4,
                'model.head.in_channels': 32,
                'train_dataloader.batch_size': 16,
                'train_dataloader.dataset.indices': 64,
                'val_dataloader.dataset.indices': 32,
                'test_dataloader.dataset.indices': 32,
                'train_cfg.max_epochs': epochs,
                'train_cfg.val_interval': 1,
                'param_scheduler.T_max': 3,
                'default_hooks.logger.interval': 1,
                'default_hooks.checkpoint.max_keep_ckpts': -1,
                'optim_wrapper.optimizer.lr': 0.02,
                'log_level': 'ERROR',
            }
        )
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(digits_root / 'cls')
        cfg.work_dir = str(tmp_path / name)
        if quantization is not None:
            cfg.quantization = copy.deepcopy(quantization)
        for key in [key for key in ('train_cfg', 'param_scheduler') if key in changes]:
            cfg[key] = changes.pop(key)
        cfg.merge_from_dict(changes)
        return QuantRunner.from_cfg(cfg)

    return make


class At(Hook):
    """Calls a function after each training iteration, when our hooks are done."""

    priority = 'LOWEST'

    def __init__(self, function):
        self.function = function

    def after_train_iter(self, runner, *args, **kwargs):
        self.function(runner)


def train(runner, function=None):
    if function is not None:
        runner.register_hook(At(function))
    runner.train()
    return runner.model.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other_and_do_what_they_say(make):
    """12 iterations: 4 reshape, 4 quantize, 4 freeze."""
    stages, ratios, frozen = [], [], []
    quantization = dict(
        weight=dict(bits=2, groups=2, gdrq=dict(k=2.0, clip='project')),
        activation=dict(bits=4),
        schedule=dict(reshape=0.33, freeze=0.66),
        calibration_batches=1,
    )

    def look(runner):
        layer = quant_layers(runner.model)['backbone.layer2.0.conv1']
        stages.append(layer.weight_quant.stage)
        assert {m.stage for m in runner.model.modules() if isinstance(m, Quantizer)} == {stages[-1]}
        ratios.append(float(layer.weight.abs().max() / layer.weight.abs().mean()))
        quantized = layer.weight_quant(layer.weight.detach())
        levels = [len(torch.unique(part)) for part in quantized.chunk(2)]
        assert max(levels) <= 3 or stages[-1] == Stage.RESHAPE
        assert min(levels) > 3 or stages[-1] != Stage.RESHAPE
        if stages[-1] == Stage.FREEZE:
            kept = {n: v for n, v in runner.model.state_dict().items() if 'threshold' in n or 'running_' in n}
            frozen.append({name: value.clone() for name, value in kept.items()})

    train(make(quantization=quantization), look)
    assert stages == [Stage.RESHAPE] * 4 + [Stage.QUANTIZE] * 4 + [Stage.FREEZE] * 4
    assert ratios[3] < 2.8, 'projection reshapes the stored weights'
    assert all(equal(frozen[0], later) for later in frozen)


def test_thresholds_of_activations_move_in_training_and_not_in_evaluation(make):
    seen = []
    runner = make(epochs=1)
    train(runner, lambda r: seen.append(float(activation_quantizers(r.model)['head.fc.own_input_quant'].threshold)))
    assert len(set(seen)) == 4
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.val_loop.run()
    assert equal(before, runner.model.state_dict())


# ---- resume ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    'three stages': dict(quantization={**QUANTIZATION, 'schedule': dict(reshape=0.3, freeze=0.7)}),
    'projected': dict(quantization={**QUANTIZATION, 'weight': dict(bits=2, gdrq=dict(clip='project'))}),
    'searched': dict(quantization={**QUANTIZATION, 'weight': dict(bits=3, gdrq=dict(threshold='search'))}),
    'learned': dict(quantization={**QUANTIZATION, 'weight': dict(bits=3, gdrq=dict(threshold='learned'))}),
    'EMA': dict(custom_hooks=[dict(type='EMAHook', momentum=0.1)]),
    'accumulation': {'optim_wrapper.accumulative_counts': 2},
    'bfloat16': {'optim_wrapper.type': 'gdrq_mm.amp.CPUAmpOptimWrapper'},
    'float': dict(quantization=None),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_resumed_run_equals_an_undisturbed_one(make, variant):
    """Interrupted after each epoch, so in every stage: weights, thresholds, losses and optimizer to the last bit."""
    losses = []
    changes = VARIANTS[variant]

    def note(runner):
        losses.append((runner.iter, float(runner.message_hub.get_scalar('train/loss').current())))

    whole = make('whole', **changes)
    end = train(whole, note)
    optimizer = whole.optim_wrapper.state_dict()
    expected, losses[:] = list(losses), []
    for epoch in (1, 2):
        checkpoint = str(Path(whole.work_dir) / f'epoch_{epoch}.pth')
        resumed = make(f'resumed{epoch}', **changes, resume=True, load_from=checkpoint)
        assert equal(end, train(resumed, note)), epoch
        assert losses == expected[4 * epoch :]
        theirs = resumed.optim_wrapper.state_dict()['state']
        for index, state in optimizer['state'].items():
            assert torch.equal(state['momentum_buffer'], theirs[index]['momentum_buffer'])
        losses.clear()


def test_an_iteration_based_run_resumes_in_the_middle_of_an_epoch(make):
    changes = {
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=10, val_interval=100),
        'param_scheduler': dict(type='CosineAnnealingLR', T_max=10, by_epoch=False),
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=3, by_epoch=False),
    }
    whole = make('whole', **changes)
    end = train(whole)
    checkpoint = str(Path(whole.work_dir) / 'iter_6.pth')
    assert equal(end, train(make('resumed', **changes, resume=True, load_from=checkpoint)))


def test_the_seed_decides(make):
    one, two = train(make('one', epochs=1)), train(make('two', epochs=1))
    three = train(make('three', epochs=1, randomness=dict(seed=1)))
    assert equal(one, two) and not equal(one, three)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def without_training(runner_of, checkpoint, **changes):
    parts = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg')
    return runner_of('test', load_from=checkpoint, **dict.fromkeys((*parts, 'val_evaluator')), **changes)


def test_a_quantized_checkpoint_holds_all_that_inference_needs(make):
    runner = make(epochs=1)
    train(runner)
    validated = runner.message_hub.get_scalar('val/accuracy/top1').current()
    tested = without_training(make, str(Path(runner.work_dir) / 'epoch_1.pth'))
    assert tested.test()['accuracy/top1'] == validated
    assert equal(tested.model.state_dict(), runner.model.state_dict())


def test_a_float_checkpoint_starts_quantized_training(make):
    start = make('float', quantization=None, epochs=1)
    train(start)
    runner = make('quantized', epochs=1, load_from=str(Path(start.work_dir) / 'epoch_1.pth'))
    weights = start.model.backbone.conv1.weight.clone()
    seen = []
    runner.load_or_resume()
    assert torch.equal(runner.model.backbone.conv1.weight, weights)
    train(runner, lambda r: seen.append(all(q.calibrated for q in activation_quantizers(r.model).values())))
    assert all(seen)


def test_thresholds_of_another_quantization_start_anew_in_training(make):
    first = make('first', epochs=1)
    train(first)
    checkpoint = str(Path(first.work_dir) / 'epoch_1.pth')
    two_bits = {**QUANTIZATION, 'weight': dict(bits=2)}
    runner = make('second', quantization=two_bits, epochs=1, load_from=checkpoint)
    train(runner)
    assert quant_layers(runner.model)['backbone.layer1.0.conv1'].weight_quant.calibrated
    with pytest.raises(UserError, match='4 bits in the checkpoint and 2 in the config'):
        without_training(make, checkpoint, quantization=two_bits).test()


# ---- mmengine's features --------------------------------------------------------------------------------------------


def test_the_average_of_EMA_is_tested_with_its_own_thresholds(make):
    runner = make(epochs=2, custom_hooks=[dict(type='EMAHook', momentum=0.3)])
    own = train(runner)
    averaged = without_training(make, str(Path(runner.work_dir) / 'epoch_2.pth'))
    averaged.test()
    name = 'backbone.layer1.0.conv1.weight'
    assert not torch.equal(averaged.model.state_dict()[name], own[name])
    layer = quant_layers(averaged.model)['backbone.layer1.0.conv1']
    torch.testing.assert_close(
        layer.weight_quant.current_threshold(layer.weight)[0], 3.5 * layer.weight[:1].abs().mean()
    )
    names = [type(hook).__name__ for hook in runner.hooks]
    assert names.index('ThresholdHook') < names.index('EMAHook')


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


def test_channels_last_gives_the_same_model(make):
    start = make('start', quantization=None, epochs=1)  # random weights are drawn in the order of the memory
    train(start)
    start = dict(epochs=1, load_from=str(Path(start.work_dir) / 'epoch_1.pth'))
    one = train(make('one', **start))
    other = train(make('other', **start, memory_format='channels_last'))
    assert other['backbone.conv1.weight'].is_contiguous(memory_format=torch.channels_last)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0.02, atol=0.02)


def test_a_layer_that_calibration_does_not_reach_stays_float(make):
    runner = make(epochs=1)
    unused = quant_layers(runner.model)['backbone.layer4.1.conv2']
    runner.model.backbone.layer4[1].forward = lambda x: x  # its convolutions are never called
    train(runner)
    assert unused.bits == (32, 32) and unused.weight_quant.stage == Stage.FLOAT
    row = next(line for line in layer_table(runner.model, runner.report).splitlines() if 'layer4.1.conv2' in line)
    assert 'not reached' in row


def test_statistics_are_written(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runner = make(
        epochs=1,
        **{'visualizer.vis_backends': [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]},
        custom_hooks=[dict(type='StatisticsHook', interval=3)],
    )
    train(runner)
    (folder,) = Path(runner.work_dir).glob('*/vis_data')
    lines = [json.loads(line) for line in (folder / 'scalars.json').read_text().splitlines()]
    (found,) = [line for line in lines if any(key.startswith('quant/') for key in line)]
    for name in ('backbone.layer1.0.conv1.weight', 'backbone.layer1.0.conv1', 'backbone.layer1.0.bn2.output_quant'):
        for what in ('threshold', 'clip_ratio', 'quantized_loss', 'distance_to_uniform'):
            assert 0 <= found[f'quant/{name}/{what}'] < 100
    assert len(list((folder / 'vis_image').glob('distributions_*.png'))) == 1
    events = EventAccumulator(str(folder), size_guidance={'histograms': 0})
    events.Reload()
    assert 'quant/backbone.layer1.0.conv1.weight' in events.Tags()['histograms']
    assert 'quant/backbone.layer1.0.conv1' in events.Tags()['histograms']


def test_a_handwritten_layer_trains_under_the_stock_runner(make):
    cfg = make(epochs=1, quantization=None).cfg
    cfg.model.backbone.conv_cfg = dict(type='gdrq_mm.layers.QuantConv2d', quantization=dict(weight=dict(bits=3)))
    cfg.custom_hooks = [dict(type='gdrq_mm.hooks.ThresholdHook')]
    cfg.experiment_name = 'stock'
    runner = Runner.from_cfg(cfg)
    layer = quant_layers(runner.model)['backbone.layer1.0.conv1']
    seen = []
    train(runner, lambda r: seen.append(float(layer.input_quant.threshold)))
    assert layer.weight_quant.bits == 3 and layer.weight_quant.calibrated and len(set(seen)) == 4
