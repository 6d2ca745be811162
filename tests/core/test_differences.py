"""Which difference of two `quantization` dicts makes a checkpoint one of another quantization."""

import pytest

from gdrq_mm.core.config import first_difference
from gdrq_mm.core.errors import UserError

W4A4 = dict(weight=dict(bits=4), activation=dict(bits=4))


def differ(theirs, ours):
    """In a test, and in a resume."""
    return first_difference(theirs, ours, training=False), first_difference(theirs, ours, training=True)


@pytest.mark.parametrize(
    'ours',
    [
        W4A4,
        {},
        dict(method='gdrq'),
        dict(weight=dict(method='gdrq', groups=4, gdrq=dict(k=None, clip='forward'), lsq=dict(lr_mult=2.0))),
        dict(activation=dict(range='auto', gdrq=dict(momentum=0.01)), schedule=dict(), overrides={}, skip=[]),
    ],
)
def test_a_default_that_is_spelled_out_is_no_difference(ours):
    assert differ(W4A4, ours) == ('', '')
    assert differ(ours, W4A4) == ('', '')


@pytest.mark.parametrize(
    ('ours', 'message'),
    [
        (dict(weight=dict(bits=3)), 'quantization.weight.bits is 4 in the checkpoint and 3 in the config'),
        (dict(method='lsq'), "quantization.weight.method is 'gdrq' in the checkpoint and 'lsq' in the config"),
        (dict(weight=dict(groups='channel')), "quantization.weight.groups is 4 in the checkpoint and 'channel'"),
        (dict(weight=dict(gdrq=dict(k=3.0))), 'quantization.weight.gdrq.k is None in the checkpoint and 3.0'),
        (dict(activation=dict(per_level=True)), 'quantization.activation.per_level is False in the checkpoint and'),
        (dict(first_last_bits=4), 'quantization.first_last_bits is 8 in the checkpoint and 4 in the config'),
        (dict(deployable=False), 'quantization.deployable is True in the checkpoint and False in the config'),
        (dict(skip=['a']), "quantization.skip is () in the checkpoint and ('a',) in the config"),
        (dict(overrides={'a': dict(weight=dict(bits=8))}), "quantization.overrides is {} in the checkpoint and {'a': "),
    ],
)
def test_what_a_model_computes_by_has_to_be_equal(ours, message):
    assert [found.startswith(message) for found in differ(W4A4, ours)] == [True, True]


@pytest.mark.parametrize(
    'ours',
    [
        dict(schedule=dict(freeze=0.5)),
        dict(calibration_batches=3),
        dict(weight=dict(gdrq=dict(clip='project', gradient='straight_through'))),
        dict(activation=dict(gdrq=dict(momentum=0.5))),
    ],
)
def test_what_only_training_reads_may_differ_in_a_test(ours):
    tested, resumed = differ(W4A4, ours)
    assert tested == '' and ' in the checkpoint and ' in resumed


def test_learning_rates_in_overrides():
    theirs, ours = (
        dict(method='lsq', overrides={'a': dict(weight=dict(bits=8, lsq=dict(lr_mult=lr)))}) for lr in (1.0, 2.0)
    )
    tested, resumed = differ(theirs, ours)
    assert tested == '' and resumed.startswith('quantization.overrides is ')


def test_one_side_may_be_float():
    assert differ(None, None) == ('', '')
    assert differ(None, W4A4) == ('the model of the checkpoint is float',) * 2
    assert differ(W4A4, None) == ('the model of the config is float',) * 2


def test_what_is_no_quantization_dict_is_refused():
    with pytest.raises(UserError, match='quantization=3 is not a dict'):
        first_difference(3, W4A4, training=False)


@pytest.mark.parametrize(
    ('method', 'bits', 'option'), [('inq', 4, dict(portions=2)), ('tsq', 2, dict(weights_from=0.8))]
)
def test_when_weights_become_levels_is_of_no_consequence_afterwards(method, bits, option):
    theirs, ours = (dict(method=method, weight={'bits': bits, method: each}) for each in ({}, option))
    tested, resumed = differ(theirs, ours)
    assert tested == '' and f'quantization.weight.{method}.{next(iter(option))} is ' in resumed
