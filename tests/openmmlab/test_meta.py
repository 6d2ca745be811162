"""What a checkpoint says of itself is looked at before it is used: a crafted or damaged entry ends in one line."""

import itertools

import numpy as np
import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.checkpoints import find_resumable, read_checkpoint
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.runs import TEST_ONLY, checkpoint_of, tiny_config, train

THREE = {'optim_wrapper.accumulative_counts': 3, 'val_dataloader': None, 'val_cfg': None, 'val_evaluator': None}


@pytest.fixture(scope='module')
def saved(digits_root, tmp_path_factory):
    """A training checkpoint between two optimizer steps, which has all entries."""
    runner = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path_factory.mktemp('saved'), epochs=2, **THREE))
    train(runner)
    return read_checkpoint(checkpoint_of(runner))


@pytest.fixture
def refused(saved, config, tmp_path):
    """The message with which a use refuses a checkpoint with another entry; None: it is used."""

    def refused(use, key, value):
        path = tmp_path / 'given.pth'
        torch.save({**saved, 'meta': {**saved['meta'], key: value}}, path)
        changes = {'resume': dict(resume=True), 'start': {}, 'test': TEST_ONLY, 'api': {}}[use]
        cfg = config('run', epochs=2, **{**THREE, **changes, 'load_from': str(path)})
        try:
            if use == 'api':
                init_model(cfg, path, 'cpu')
            else:
                QuantRunner.from_cfg(cfg).load_or_resume()
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)
            return str(error)
        return None

    return refused


def altered(part, name, value):
    """What was accumulated, with another gradient or sum."""
    return lambda right: [{**right[0], part: {**right[0][part], name: value}}]


CONV = 'backbone.conv1'
NO_DICT = (True, 3, 'x', [1], np.zeros(2), torch.zeros(2))
WRONG = {
    'plan': (*NO_DICT, {}, {'calls': 1}),
    'quantization': (*NO_DICT, {'a': 1}, {1: 2}, {'weight': 3}),
    'recipe': (None, *NO_DICT),
    'start': NO_DICT,
    'run': (None, 3, b'x', ['x'], {}, np.zeros(2)),
    'patience': (None, *NO_DICT, {'x': 3}, {'x': []}, {'x': [-1, 0.5]}, {'x': [1, 'x']}, {'x': [1, 2.0, 3]}),
    'validated': (None, 3, 'x', [], np.zeros(2), torch.zeros(2)),
    'seed': (-1, 1 << 32, 0.5, True, 'x', [1], np.zeros(2), torch.zeros(2)),
    'iter': (None, -1, True, 0.5, 'x', torch.tensor(3)),
    'epoch': (None, -1, True, 0.5, 'x', torch.tensor(3)),
    'accumulated': (
        *(None, *NO_DICT, {}, {0: 1}, [{}], [{'gradients': 1, 'sums': 2}], [{'gradients': {}, 'sums': []}]),
        altered('gradients', 'none', torch.zeros(2)),
        altered('gradients', f'{CONV}.weight', torch.zeros(2)),
        altered('gradients', f'{CONV}.weight', 'x'),
        altered('sums', 'none', (1.0, 2.0)),
        altered('sums', CONV, 'x'),
        altered('sums', 'backbone.layer1.0.conv1.own_input_quant', ('x', 1.0)),
    ),
}
"""Entry -> values that no training writes, or functions that make one of the right value."""


@pytest.mark.parametrize(('key', 'number'), [(key, i) for key, values in WRONG.items() for i in range(len(values))])
def test_a_resumed_training_refuses_an_entry_that_no_training_writes(saved, refused, key, number):
    value = WRONG[key][number]
    value = value(saved['meta'][key]) if callable(value) else value
    message = refused('resume', key, value)
    assert message is not None and (key in message or (key in ('iter', 'epoch') and 'weights only' in message))


def test_the_entries_of_a_real_training_are_taken(saved, refused):
    assert set(WRONG) <= set(saved['meta']) and saved['meta']['accumulated'][0]['gradients']
    for use in ('resume', 'start', 'test', 'api'):
        assert refused(use, 'seed', saved['meta']['seed']) is None


@pytest.mark.parametrize('use', ['start', 'test', 'api'])
def test_other_uses_refuse_settings_that_are_none_and_ignore_what_they_do_not_read(refused, use):
    for value in WRONG['quantization']:
        assert 'quantization' in refused(use, 'quantization', value)
    for key in set(WRONG) - {'plan', 'quantization', 'iter', 'epoch'}:
        assert refused(use, key, np.zeros(2)) is None


@pytest.mark.parametrize('value', [*NO_DICT, {1: 2}, {'classes': 3}, {'CLASSES': 'ab'}], ids=itertools.count())
def test_a_model_refuses_what_is_not_said_of_a_data_set(refused, value):
    assert "meta['dataset_meta'] is" in refused('api', 'dataset_meta', value)


def test_a_checkpoint_of_no_training_is_not_the_one_to_resume(saved, tmp_path):
    """`run` is compared with the name of a training; two arrays have no truth value."""
    for name, value in (('other', np.zeros(2)), ('right', 'abc')):
        torch.save({**saved, 'meta': {**saved['meta'], 'run': value}}, tmp_path / f'{name}.pth')
    (tmp_path / '.training').write_text('abc')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'other.pth'))
    assert find_resumable(tmp_path)[0] == str(tmp_path / 'right.pth')
