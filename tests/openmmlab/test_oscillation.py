"""OscillationHook in a real training."""

import pytest

from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from tests.helpers import same
from tests.runs import QUANTIZATION, checkpoint_of, contents, train

HOOK = dict(type='OscillationHook', limits=(0.3, 0.05), momentum=0.2)


def test_a_resumed_training_ends_as_the_whole_one(make):
    whole = make('whole', custom_hooks=[dict(HOOK)])
    train(whole)
    saved = read_checkpoint(checkpoint_of(whole, 'epoch_3.pth'))['oscillations']
    assert sum(int(state['frozen'].sum()) for state in saved.values()) > 0, 'something is frozen'
    path = checkpoint_of(whole, 'epoch_2.pth')
    resumed = make('resumed', custom_hooks=[dict(HOOK)], load_from=path, resume=True)
    train(resumed)
    assert same(contents(whole, 'epoch_3.pth'), contents(resumed, 'epoch_3.pth'))
    again = read_checkpoint(checkpoint_of(resumed, 'epoch_3.pth'))['oscillations']
    assert all(same(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize('changes', [dict(control=True), dict(weight=dict(bits=32))], ids=['control', 'W32A4'])
def test_it_does_nothing_where_no_weight_is_quantized(make, changes):
    """So that a recipe has its control, and its parts."""
    runner = make(quantization={**QUANTIZATION, **changes}, custom_hooks=[dict(HOOK)], epochs=1)
    train(runner)
    assert 'oscillations' not in read_checkpoint(checkpoint_of(runner, 'epoch_1.pth'))


def test_another_training_from_the_checkpoint_starts_anew(make):
    first = make('first', custom_hooks=[dict(HOOK)])
    train(first)
    second = make('second', custom_hooks=[dict(HOOK)], load_from=checkpoint_of(first, 'epoch_3.pth'))
    train(second)
    (hook,) = (h for h in second.hooks if type(h).__name__ == 'OscillationHook')
    assert hook.oscillations.states and not hook._saved
