"""A mistake in a config is told from a bug by where the exception was raised."""

import pytest
import torch.nn as nn
from mmengine.registry import Registry

from gdrq_mm.openmmlab.mistakes import config_mistake
from gdrq_mm.openmmlab.runner import QuantRunner

THINGS = Registry('thing', scope='ours')


@THINGS.register_module()
class Plain:
    def __init__(self, width, height=1):
        self.size = width / height
        if width > 100:
            helper(width, depth=3)


@THINGS.register_module()
class HandsOn(Plain):
    def __init__(self, colour='red', **kwargs):
        if colour == 'lost':
            kwargs['colour'] = colour
        super().__init__(**kwargs)


@THINGS.register_module()
class Nest:
    def __init__(self, inner):
        self.inner = THINGS.build(inner)


@THINGS.register_module()
class Attends(nn.Module):
    def __init__(self, heads):
        super().__init__()
        assert heads != 7
        self.attention = nn.MultiheadAttention(32, heads)


def helper(width):
    return width


MISTAKES = {
    "'Plane' is not in the registry ours::thing; did you mean 'Plain'?": dict(type='Plane'),
    "'Xyz' is not in the registry ours::thing (": dict(type='Xyz'),
    "Plain: Plain.__init__() got an unexpected keyword argument 'widht'": dict(type='Plain', widht=3),
    "Plain: Plain.__init__() missing 1 required positional argument: 'width'": dict(type='Plain'),
    "Plain.__init__() got an unexpected keyword argument 'heigth'": dict(type='HandsOn', width=1, heigth=2),
    'must contain the key "type"': dict(width=3),
    'type must be a str': dict(type=3),
    'nn.MultiheadAttention: 5 heads do not divide the width 32': dict(type='Attends', heads=5),
    "'Plan' is not in the registry": dict(type='Nest', inner=dict(type='Plan')),
}
BUGS = {
    'a value that the class refuses': dict(type='Plain', width=1, height=0),
    'a type that the class cannot use': dict(type='Plain', width='x'),
    'a call within the class': dict(type='Plain', width=101),
    'what a class asserts': dict(type='Attends', heads=7),
    'an argument that the class takes and hands on': dict(type='HandsOn', width=1, colour='lost'),
}


def raised(config):
    with pytest.raises(Exception) as caught:
        THINGS.build(config)
    return caught.value


@pytest.mark.parametrize('message', MISTAKES)
def test_a_mistake_is_told(message):
    assert message in config_mistake(raised(MISTAKES[message]))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'train_dataloader.batch_size': 0}, 'BatchSampler: batch_size should be a positive integer value'),
        ({'train_dataloader.num_workers': -1}, 'DataLoader: num_workers option should be non-negative'),
        ({'train_dataloader.persistent_workers': True}, 'DataLoader: persistent_workers option needs num_workers > 0'),
        ({'optim_wrapper.optimizer.lr': -1.0}, 'SGD: Invalid learning rate: -1.0'),
        ({'param_scheduler': dict(type='LinearLR', start_factor=2.0)}, 'LinearLR: Starting multiplicative factor'),
    ],
)
def test_a_value_that_training_refuses_is_told(config, changes, message):
    runner = QuantRunner.from_cfg(config(**changes))
    with pytest.raises(ValueError) as caught:
        runner.train()
    assert config_mistake(caught.value).startswith(message)


@pytest.mark.parametrize('bug', BUGS)
def test_a_bug_is_not(bug):
    assert config_mistake(raised(BUGS[bug])) == ''


def test_an_exception_that_was_never_raised_is_no_mistake():
    assert config_mistake(KeyError('x')) == ''
