"""Calibration draws what training draws, the sampler's samples in the batches of training; and tools/calibrate.py."""

import json

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS

from gdrq_mm.core.modules import activation_quantizers
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.hooks.calibration import CalibrationHook, own_loader
from tests.helpers import ROOT
from tests.runs import TEST_ONLY, At, checkpoint_of, quantizers_of, tiny_config, train


@DATA_SAMPLERS.register_module(force=True)
class OneClass:
    """Gives the samples of one class only, as samplers that balance classes or mix data sets choose theirs."""

    def __init__(self, dataset, seed=None):
        labels = [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))]
        self.chosen = [i for i, label in enumerate(labels) if label == 3] * 8

    def __len__(self):
        return len(self.chosen)

    def __iter__(self):
        return iter(self.chosen)


@DATA_SAMPLERS.register_module(force=True)
class Pairs:
    """Batches of two, whatever the config says."""

    def __init__(self, sampler, batch_size, drop_last=False):
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last

    def __len__(self):
        return len(self.sampler) // 2

    def __iter__(self):
        indices = list(self.sampler)
        return iter([indices[i : i + 2] for i in range(0, len(indices), 2)])


def drawn(runner):
    return [[int(sample.gt_label) for sample in batch['data_samples']] for batch in own_loader(runner)]


def test_calibration_draws_by_the_sampler_of_the_training(make):
    runner = make(**{'train_dataloader.sampler': dict(_delete_=True, type='OneClass')})
    assert {label for batch in drawn(runner) for label in batch} == {3}
    before = list(runner.train_dataloader.batch_sampler)
    CalibrationHook(batches=2).before_train(runner)
    assert list(runner.train_dataloader.batch_sampler) == before


def test_calibration_makes_the_batches_of_the_training(make):
    runner = make(**{'train_dataloader.batch_sampler': dict(type='Pairs')})
    assert {len(batch) for batch in drawn(runner)} == {2}


@pytest.mark.parametrize('drop_last', [True, False])
def test_a_last_batch_that_training_drops_is_dropped(make, drop_last):
    changes = {'train_dataloader.dataset.indices': 49, 'train_dataloader.drop_last': drop_last}
    sizes = [len(batch) for batch in drawn(make(**changes))]
    assert sizes == [16, 16, 16] + ([] if drop_last else [1])


@pytest.mark.parametrize('sampler', [dict(type='DefaultSampler', shuffle=True), dict(type='InfiniteSampler')])
def test_samplers_that_treat_all_samples_alike_give_one_order(make, sampler):
    runner = make(**{'train_dataloader.sampler': {'_delete_': True, **sampler}})
    dataset = runner.train_dataloader.dataset
    expected = [dataset.get_data_info(i)['gt_label'] for i in DefaultSampler(dataset, shuffle=True, seed=runner.seed)]
    assert [label for batch in drawn(runner) for label in batch] == expected
    assert activation_quantizers(runner.model)


def test_running_statistics_that_do_not_fit_are_told(make, float_checkpoint, monkeypatch):
    """As those of a few iterations; ResNet-18 after four is within bounds, so they are spoilt here."""
    runner = make(load_from=float_checkpoint, epochs=1)
    told = []
    monkeypatch.setattr(runner.logger, 'warning', lambda message, *args: told.append(str(message)))

    def spoil(runner):
        for name, buffer in runner.model.named_buffers():
            if name.endswith('running_var'):
                buffer.mul_(1000)

    runner.register_hook(At(spoil, 'before_train', 'HIGHEST'))
    runner.train()
    (message,) = [message for message in told if 'do not fit the data' in message]
    assert 'backbone.bn1' in message and 'thresholds fit the statistics of the batches' in message


def test_what_a_quantized_checkpoint_has_not_is_calibrated(make, tmp_path):
    """Another head: it starts before the training, so that an average of the weights knows of it."""
    first = make('first', epochs=1)
    train(first)
    load, head = checkpoint_of(first), {'model.head.num_classes': 12}
    runner = make('other', epochs=1, load_from=load, custom_hooks=[dict(type='EMAHook', momentum=0.1)], **head)
    before = {}

    def look(runner):
        assert all(quantizer.calibrated for quantizer in quantizers_of(runner).values())
        before.update({name: q.threshold.clone() for name, q in quantizers_of(runner).items()})

    runner.register_hook(At(look, 'before_train_epoch', 'LOW'))
    train(runner)
    kept = read_checkpoint(load)['state_dict']
    names = [name for name in before if not name.startswith('head.fc')]
    assert names and all(torch.equal(before[name], kept[f'{name}.threshold']) for name in names)
    tester = make('test', load_from=checkpoint_of(runner), **head, **TEST_ONLY)
    tester.test()


# ---- tools/calibrate.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(digits_root, tmp_path, monkeypatch):
    """The working directory, with a float and a quantized config of the tiny model."""
    monkeypatch.chdir(tmp_path)
    for name, changes in (('quantized', {}), ('float', {'quantization': None})):
        tiny_config(digits_root, tmp_path / 'run', epochs=1, log_level='INFO', **changes).dump(f'{name}.py')
    return tmp_path


def test_calibration_writes_a_checkpoint_that_evaluates(folder, float_checkpoint, run):
    done = run(ROOT / 'tools/calibrate.py', 'quantized.py', float_checkpoint, '--out', 'new/ptq.pth', '--work-dir', 'w')
    assert done.returncode == 0, done.stderr
    assert 'python tools/test.py quantized.py new/ptq.pth' in done.stdout + done.stderr
    done = run(ROOT / 'tools/test.py', 'quantized.py', 'new/ptq.pth', '--work-dir', 'w')
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / 'w/record.json').read_text())
    assert record['model']['stage'] == 'quantize' and record['training']['iter'] == 0
    assert record['training']['start']['file'] == 'epoch_1.pth'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['quantized.py', 'none.pth'], 'checkpoint none.pth does not exist'),
        (['float.py', 'FLOAT'], 'the config has no quantization: there is nothing to calibrate'),
        (['quantized.py', 'FLOAT', '--out', '.'], '--out . is a folder'),
        (
            ['quantized.py', 'quantized.pth'],
            'checkpoint quantized.pth is of a quantized model; calibration starts from',
        ),
    ],
)
def test_what_cannot_be_calibrated_ends_in_one_line(folder, float_checkpoint, run, arguments, message):
    torch.save({'fc.weight_quant.threshold': torch.zeros(4)}, 'quantized.pth')
    arguments = [float_checkpoint if argument == 'FLOAT' else argument for argument in arguments]
    done = run(ROOT / 'tools/calibrate.py', *arguments, '--work-dir', 'w')
    assert done.returncode == 1 and 'Traceback' not in done.stderr and message in done.stderr.splitlines()[-1]
    assert not list((folder / 'w').rglob('*.pth'))
