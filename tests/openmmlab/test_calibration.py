"""Calibration draws what training draws: the sampler's samples, in the batches that training makes of them."""

import pytest
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATA_SAMPLERS

from gdrq_mm.core.modules import activation_quantizers
from gdrq_mm.openmmlab.hooks.calibration import CalibrationHook, own_loader
from tests.runs import At


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
