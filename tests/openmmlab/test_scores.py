"""Scores of the reshape stage belong to a model that is not quantized: hooks and schedules forget them."""

import pytest
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from tests.runs import At, checkpoint_of, train


@METRICS.register_module(force=True)
class Falling(BaseMetric):
    """Gives the scores of a list, one a validation, whatever the model does."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(score=self.scores.pop(0))


def arguments(scores, reshape, hooks=()):
    return dict(
        quantization=dict(weight=dict(bits=2), activation=dict(bits=2), calibration_batches=1, schedule=reshape),
        epochs=len(scores),
        val_evaluator=dict(_delete_=True, type='Falling', scores=scores),
        custom_hooks=list(hooks),
    )


def runner_of(make, scores, reshape, hooks=(), name='run', **changes):
    return make(name, **arguments(scores, reshape, hooks), **changes)


def epochs_of(runner):
    epochs = []
    runner.register_hook(At(lambda r: epochs.append(r.epoch), 'after_train_epoch'))
    train(runner)
    return len(epochs)


STOPPING = dict(type='EarlyStoppingHook', monitor='score', rule='greater', patience=2, min_delta=0.0)


def test_early_stopping_forgets_the_score_of_the_reshape_stage(make):
    """Quantized, the score is lower for good, and rises there."""
    scores = [0.9, 0.95, 0.3, 0.31, 0.32, 0.33]
    assert epochs_of(runner_of(make, scores, dict(reshape=1 / 3), [STOPPING])) == 6
    falling = [0.9, 0.95, 0.33, 0.32, 0.31, 0.3]
    assert epochs_of(runner_of(make, falling, dict(reshape=1 / 3), [STOPPING], 'falling')) == 5, 'it still stops'


@pytest.mark.parametrize('options', [{}, dict(stopping_threshold=0.8)], ids=['patience', 'threshold'])
def test_no_score_ends_training_before_the_model_is_quantized(make, options):
    scores = [0.9, 0.89, 0.88, 0.87, 0.3, 0.4]
    assert epochs_of(runner_of(make, scores, dict(reshape=2 / 3), [{**STOPPING, **options}])) == 6


def test_nor_does_the_score_of_a_validation_that_a_resumed_run_begins_with(make):
    """The run before was killed between the checkpoint and its validation."""
    given = arguments([0.9] * 3, dict(reshape=2 / 3), [{**STOPPING, 'stopping_threshold': 0.8}])
    whole = make(**given)
    assert epochs_of(whole) == 3
    given['val_evaluator'] = dict(_delete_=True, type='Falling', scores=[0.9] * 3)
    resumed = make('resumed', **given, resume=True, load_from=checkpoint_of(whole, 'epoch_1.pth'))
    resumed.resumed_unvalidated = True
    assert epochs_of(resumed) == 2 and resumed.epoch == 3


@pytest.mark.parametrize('quantization', [dict(weight=dict(bits=2)), None], ids=['quantized', 'float'])
def test_a_resumed_run_has_waited_as_long_as_the_one_that_it_continues(make, quantization):
    """The best score is that of the first epoch; the third checkpoint is saved after one score without improvement."""
    hooks = [{**STOPPING, 'patience': 3}]
    given = {**arguments([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], {}, hooks), 'quantization': quantization}
    whole = make(**given)
    assert epochs_of(whole) == 4
    given['val_evaluator'] = dict(_delete_=True, type='Falling', scores=[0.4] * 6)
    resumed = make(**given, resume=True, load_from=checkpoint_of(whole, 'epoch_3.pth'))
    assert epochs_of(resumed) == 1 and resumed.epoch == 4


def test_a_schedule_that_waits_for_a_plateau_forgets_them(make):
    plateau = dict(type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=1, factor=0.1)
    scores = [0.9, 0.95, 0.3, 0.31, 0.32, 0.33]
    runner = runner_of(make, scores, dict(reshape=1 / 3), param_scheduler=plateau)
    rates = []
    runner.register_hook(At(lambda r: rates.append(r.optim_wrapper.get_lr()['lr'][0])))
    train(runner)
    assert set(rates) == {0.02}
    assert 0.3 < runner.param_schedulers[0].best < 0.4
