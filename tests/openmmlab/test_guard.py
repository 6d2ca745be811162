"""NaN and infinity stop training with one message that says where they came from; checkpoints stay good."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.structures import InstanceData

from gdrq_mm.core import compat
from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.hooks.guard import FiniteLossHook
from gdrq_mm.openmmlab.origin import tensors_in
from tests.helpers import same
from tests.rank_hooks import Spoil, spoilt
from tests.runs import At, checkpoint_of, train

LAYER = r'backbone\.layer2\.0\.conv1'
LOSS = 'loss=(nan|inf) at iteration 6: '
NEXT = 'loss=nan at iteration 7: '
BATCH = r'the input batch has values that are not finite \(\S+\.png, \S+\.png, \S+\.png\)'
CLIPPED = {'optim_wrapper.clip_grad': dict(max_norm=1.0)}
CASES = {
    'input': (
        rf'{NEXT}the output of backbone\.conv1\.own_input_quant \(GDRQActivation\) is the first that is not finite',
        {},
    ),
    'number': (f'{LOSS}{BATCH}', {}),
    'weight': (f'{LOSS}{LAYER}.weight has values that are not finite', {}),
    'output': (rf'{LOSS}the output of {LAYER} \(QuantConv2d\) is the first that is not finite', {}),
    'gradient': (f'the gradient of {LAYER}.weight is not finite at iteration 6', {}),
    'gradient, clipped': ('the gradient of each parameter is not finite at iteration 6', CLIPPED),
    'gradient, accumulated': (
        f'the gradient of {LAYER}.weight is not finite at iteration 7',
        {'optim_wrapper.accumulative_counts': 2},
    ),
    'number, accumulated': (f'{LOSS}{BATCH}', {'optim_wrapper.accumulative_counts': 2}),
    'rate': (f'{NEXT}{LAYER}.weight has values that are not finite', {}),
}


@pytest.mark.parametrize('case', CASES)
def test_the_message_says_where_it_began(make, case):
    """Where the loss or the gradient is to blame, no step is taken with it."""
    what, (message, changes) = case.split(',')[0], CASES[case]
    states = []
    runner = make(**changes)
    runner.register_hook(
        At(lambda r: states.append(copy.deepcopy(dict(r.model.named_parameters()))), 'before_train_iter')
    )
    runner.register_hook(Spoil(what))
    first = checkpoint_of(runner)
    with pytest.raises(UserError, match=f'^{message}; training stops, the last good checkpoint is {first}$'):
        train(runner)
    assert [path.name for path in Path(runner.work_dir).glob('*.pth')] == ['epoch_1.pth']
    if what in ('number', 'gradient', 'output'):
        assert same(states[-1], dict(runner.model.named_parameters()))


@pytest.mark.parametrize('what', ['gradient', 'gradient, clipped'])
def test_an_accelerator_is_not_waited_for(make, what):
    """Gradients are looked at one step later, and the message names the step in which it began."""
    message, changes = CASES[what]
    runner = make(**changes)
    runner.register_hook(Spoil('gradient'))
    next(hook for hook in runner.hooks if isinstance(hook, FiniteLossHook)).late = True
    with pytest.raises(UserError, match=f'^{message}.*; training stops, the last good checkpoint is'):
        train(runner)
    assert runner.iter == 7 and [path.name for path in Path(runner.work_dir).glob('*.pth')] == ['epoch_1.pth']


@pytest.mark.parametrize('at', [7, 11])
def test_no_checkpoint_is_written_of_a_step_that_was_not_looked_at_yet(make, at):
    """Iterations 7 and 11 are the last of an epoch: a checkpoint follows."""
    runner = make()
    runner.register_hook(Spoil('gradient', at=at))
    next(hook for hook in runner.hooks if isinstance(hook, FiniteLossHook)).late = True
    with pytest.raises(UserError, match=f'not finite at iteration {at}; training stops'):
        train(runner)
    names = ['epoch_1.pth', 'epoch_2.pth'][: 1 if at == 7 else 2]
    assert sorted(path.name for path in Path(runner.work_dir).glob('*.pth')) == names


@pytest.mark.parametrize(('interval', 'when'), [(2, 'after iteration 7'), (10, 'at iteration 8')])
def test_what_no_loss_shows_is_found_later_and_before_a_checkpoint(make, interval, when):
    """Training normalizes by the batch, so it goes on with statistics that are not finite."""
    runner = make(custom_hooks=[dict(type='FiniteLossHook', interval=interval)])
    runner.register_hook(Spoil('statistics', name='backbone.layer2.0.bn1'))
    message = rf'^backbone\.layer2\.0\.bn1\.running_mean has values that are not finite {when}; training stops'
    with pytest.raises(UserError, match=message):
        train(runner)
    assert [path.name for path in Path(runner.work_dir).glob('*.pth')] == ['epoch_1.pth']


def test_a_logged_value_that_is_no_loss_may_be_nan(make):
    """Such as a mean over no boxes; mmengine adds up what has 'loss' in its name."""
    runner = make(epochs=1)
    loss = runner.model.head.loss
    runner.model.head.loss = lambda *args, **kwargs: {**loss(*args, **kwargs), 'overlap': torch.zeros(0).mean()}
    train(runner)
    assert runner.iter == 4


def test_it_goes_on_from_the_last_checkpoint(make):
    runner = make()
    runner.register_hook(Spoil('weight', at=0))
    with pytest.raises(UserError, match=r'training stops, no checkpoint had been written yet$'):
        train(runner)
    runner = make()
    runner.register_hook(Spoil('gradient'))
    with pytest.raises(UserError):
        train(runner)
    resumed = make(resume=True)
    train(resumed)
    assert resumed.iter == 12


@OPTIM_WRAPPERS.register_module()
class Scaled(OptimWrapper):
    """Scales the loss as mmengine's AmpOptimWrapper does, which needs a GPU; here on a CPU."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler('cpu')

    def backward(self, loss, **kwargs):
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()


@pytest.mark.skipif(compat.TORCH < (2, 4), reason='torch 2.4 has both GradScaler and fused SGD for a CPU')
@pytest.mark.parametrize('fused', [False, True])
def test_steps_that_gradscaler_leaves_out_are_normal(make, fused):
    optimizer = dict(type='SGD', lr=0.01, fused=fused, weight_decay=0.0, momentum=0.0, nesterov=False)
    runner = make(epochs=1, **{'optim_wrapper.type': 'Scaled', 'optim_wrapper.optimizer': optimizer})
    runner.register_hook(Spoil('gradient', at=1))
    states = []
    end = train(runner, lambda r: states.append(copy.deepcopy(dict(r.model.named_parameters()))))
    assert runner.optim_wrapper.scaler.get_scale() == 2.0**16 / 2**3
    assert same(states[0], {name: end[name] for name in states[0]})


def test_tensors_are_found_wherever_a_batch_has_them():
    boxes = InstanceData(bboxes=spoilt(torch.zeros(2, 4)), labels=torch.tensor([1, 2]))
    batch = dict(
        inputs=[torch.zeros(3, dtype=torch.uint8), torch.zeros(3)], data_samples=[boxes], name='x', size=(2, 3)
    )
    assert [tuple(tensor.shape) for tensor in tensors_in(batch)] == [(3,), (2, 4)]
