"""gdrq_mm/core/config.py: defaults, merging, and that every bad value ends in one clear message."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrq_mm.core.config import Activation, Quantization, Schedule, Weight, unused_options
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.layers import QuantConv2d
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS
from gdrq_mm.core.quantizers.gdrq import GDRQWeight

NAMES = ['backbone.conv1', 'backbone.layer1.0.conv1', 'backbone.layer1.0.conv2', 'head.fc']


def message_of(cfg):
    with pytest.raises(UserError) as error:
        Quantization.from_dict(cfg)
    return str(error.value)


class OtherWeight(GDRQWeight):
    """A second method, with options of its own."""

    @dataclass(frozen=True)
    class Options:
        shape: Literal['round', 'square'] = 'round'


@pytest.fixture
def other_method(monkeypatch):
    monkeypatch.setitem(WEIGHT_METHODS, 'other', OtherWeight)


# ---- defaults -------------------------------------------------------------------------------------------------------


def test_an_empty_dict_gives_the_documented_defaults():
    cfg = Quantization.from_dict({})
    assert cfg == Quantization()
    assert cfg.weight == Weight('gdrq', 4, {}, None)
    assert cfg.activation == Activation('gdrq', 4, {}, 'auto')
    assert (cfg.first_last_bits, cfg.deployable, cfg.calibration_batches) == (8, True, 8)
    assert cfg.schedule == Schedule(0.0, 1.0)
    assert cfg.skip == () and cfg.overrides == {}


def test_every_value_arrives():
    cfg = Quantization.from_dict(
        dict(
            weight=dict(method='gdrq', bits=2, groups='channel', gdrq=dict(k=2.5, clip='project')),
            activation=dict(
                method='gdrq', bits=3, range='signed', per_level=True, gdrq=dict(momentum=0.5, mean='nonzero')
            ),
            first_last_bits=32,
            deployable=False,
            schedule=dict(reshape=0.25, freeze=0.75),
            calibration_batches=3,
            skip=['*.fc'],
            overrides={'*.conv2': dict(weight=dict(bits=8))},
        )
    )
    assert cfg.weight == Weight('gdrq', 2, dict(k=2.5, clip='project'), 'channel')
    assert cfg.activation == Activation('gdrq', 3, dict(momentum=0.5, mean='nonzero'), 'signed', True)
    assert (cfg.first_last_bits, cfg.deployable, cfg.calibration_batches) == (32, False, 3)
    assert cfg.schedule == Schedule(0.25, 0.75)
    assert cfg.skip == ('*.fc',) and cfg.overrides == {'*.conv2': dict(weight=dict(bits=8))}


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 7, 8, 32])
def test_two_to_eight_bits_and_float_are_accepted(bits):
    cfg = Quantization.from_dict(dict(weight=dict(bits=bits), activation=dict(bits=bits), first_last_bits=bits))
    assert (cfg.weight.bits, cfg.activation.bits, cfg.first_last_bits) == (bits, bits, bits)


def test_any_mapping_is_accepted():
    """Such as a ConfigDict of mmengine."""
    cfg = MappingProxyType(
        dict(weight=MappingProxyType(dict(gdrq=dict(k=2.0))), overrides={'*.fc': dict(activation=dict(bits=8))})
    )
    checked = Quantization.from_dict(cfg)
    assert checked.weight.options['k'] == 2.0 and checked.for_layer('head.fc')[1].bits == 8


def test_reshape_may_end_where_freeze_begins():
    assert Quantization.from_dict(dict(schedule=dict(reshape=0.5, freeze=0.5))).schedule == Schedule(0.5, 0.5)


# ---- bad values: field, value, choices ------------------------------------------------------------------------------

BITS = '2 to 8'
OVERRIDE = "quantization.overrides['*.fc']"
BAD = [
    # a value that is not a dict
    (None, ['quantization=None', 'dict']),
    ('w4a4', ["quantization='w4a4'", 'dict']),
    (dict(weight=4), ['quantization.weight=4', 'dict']),
    (dict(activation=None), ['quantization.activation=None', 'dict']),
    (dict(weight=dict(gdrq=3.5)), ['quantization.weight.gdrq=3.5', 'dict']),
    (dict(activation=dict(per_level=1)), ['quantization.activation.per_level=1', 'True, False']),
    (dict(schedule=0.3), ['quantization.schedule=0.3', 'dict']),
    (dict(overrides=['*.fc']), ["quantization.overrides=['*.fc']", 'dict']),
    (dict(overrides={'*.fc': 8}), [f'{OVERRIDE}=8', 'dict']),
    (dict(overrides={'*.fc': dict(weight=8)}), [f'{OVERRIDE}.weight=8', 'dict']),
    # keys
    (dict(zzz=1), ["quantization has no key 'zzz'", 'choices: ', 'activation', 'weight', 'overrides']),
    ({3: 1}, ["quantization has no key '3'", 'choices: ']),
    (dict(wieght={}), ["no key 'wieght'", "did you mean 'weight'"]),
    (dict(weight=dict(bit=4)), ["quantization.weight has no key 'bit'", "did you mean 'bits'"]),
    (dict(weight=dict(range='auto')), ["quantization.weight has no key 'range'", 'groups']),
    (dict(activation=dict(rang='auto')), ["quantization.activation has no key 'rang'", "did you mean 'range'"]),
    (dict(activation=dict(groups=4)), ["quantization.activation has no key 'groups'", 'range']),
    (dict(weight=dict(gdrq=dict(clipp='x'))), ["quantization.weight.gdrq has no key 'clipp'", "did you mean 'clip'"]),
    (dict(activation=dict(gdrq=dict(clip='x'))), ["quantization.activation.gdrq has no key 'clip'", 'momentum']),
    (dict(schedule=dict(reshap=0.1)), ["quantization.schedule has no key 'reshap'", "did you mean 'reshape'"]),
    (dict(overrides={'*.fc': dict(bits=8)}), [f"{OVERRIDE} has no key 'bits'", 'activation, weight']),
    (dict(overrides={'*.fc': dict(weight=dict(bitz=8))}), [f'{OVERRIDE}.weight', 'bitz', "did you mean 'bits'"]),
    # bits
    *[(dict(weight=dict(bits=b)), [f'quantization.weight.bits={b!r}', BITS]) for b in (5.5, 1, 9, 0, True, '4', None)],
    *[(dict(activation=dict(bits=b)), [f'quantization.activation.bits={b!r}', BITS]) for b in (5.5, 1, 9, True, '4')],
    *[(dict(first_last_bits=b), [f'quantization.first_last_bits={b!r}', BITS]) for b in (5.5, 1, 9, True, '4', None)],
    (dict(overrides={'*.fc': dict(weight=dict(bits=1))}), [f'{OVERRIDE}.weight.bits=1', BITS]),
    # methods
    (dict(method='gdqr'), ["quantization.method='gdqr'", "did you mean 'gdrq'"]),
    (dict(method=['lsq']), ["quantization.method=['lsq'] is unknown", "'lsq'"]),
    (dict(weight=dict(method='pact')), ["quantization.weight.method='pact'", 'choices: ', 'dorefa']),
    (dict(activation=dict(method='lsq+')), ["quantization.activation.method='lsq+'", "did you mean 'lsq'"]),
    (dict(method='twn'), ['quantization.weight.bits=4', "is not 2, nor 32 for float with method 'twn'"]),
    (
        dict(method='xnor', weight=dict(bits=2)),
        ['quantization.weight.bits=2', 'is not 1, nor 32 for float with method'],
    ),
    (dict(method='dorefa', activation=dict(bits=8)), ['quantization.activation.bits=8', 'from 2 to 7', "'dorefa'"]),
    # the other fields
    *[(dict(weight=dict(groups=g)), [f'quantization.weight.groups={g!r}', "'channel'"]) for g in (0, -1, 'chan', 2.5)],
    *[(dict(weight=dict(groups=g)), [f'quantization.weight.groups={g!r}', "'channel'"]) for g in (True, [1])],
    *[
        (dict(activation=dict(range=r)), [f'quantization.activation.range={r!r}', "'auto'", "'zero_point'"])
        for r in ('both', 1, None, ['auto'])
    ],
    *[
        (dict(deployable=d), [f'quantization.deployable={d!r}', 'True, False'])
        for d in (1, 0, 'yes', None, [])  # 1 == True, but it is not what the field says
    ],
    *[
        (dict(calibration_batches=n), [f'quantization.calibration_batches={n!r}', 'at least 1'])
        for n in (0, -2, 1.0, True, '8', None)
    ],
    (dict(schedule=dict(reshape=1.5)), ['quantization.schedule.reshape=1.5', 'from 0 to 1']),
    (dict(schedule=dict(freeze=-0.1)), ['quantization.schedule.freeze=-0.1', 'from 0 to 1']),
    (dict(schedule=dict(freeze=float('nan'))), ['quantization.schedule.freeze=nan', 'from 0 to 1']),
    (dict(schedule=dict(freeze=True)), ['quantization.schedule.freeze=True', 'from 0 to 1']),
    (dict(schedule=dict(reshape='0.3')), ["quantization.schedule.reshape='0.3'", 'from 0 to 1']),
    (dict(schedule=dict(reshape=0.9, freeze=0.5)), ['quantization.schedule', 'reshape=0.9', 'freeze=0.5']),
    *[(dict(skip=s), [f'quantization.skip={s!r}', 'list of patterns']) for s in ('*.fc', [1], None, 5)],
    (dict(overrides={3: dict(weight=dict(bits=8))}), ['quantization.overrides', '3']),
    # methods and their options
    (dict(weight=dict(method='gdqr')), ["quantization.weight.method='gdqr'", "did you mean 'gdrq'"]),
    (dict(activation=dict(method='zzz')), ["quantization.activation.method='zzz'", 'choices: ', 'gdrq']),
    (dict(weight=dict(method=None)), ['quantization.weight.method=None', 'choices: ', 'gdrq']),
    (dict(weight=dict(method=['gdrq'])), ["quantization.weight.method=['gdrq']", 'gdrq']),
    (dict(weight=dict(gdrq=dict(k=0))), ['quantization.weight.gdrq.k=0', 'above 0']),
    (dict(weight=dict(gdrq=dict(k='2'))), ["quantization.weight.gdrq.k='2'", 'a number above 0']),
    (dict(weight=dict(gdrq=dict(k=True))), ['quantization.weight.gdrq.k=True', 'a number above 0']),
    (dict(weight=dict(gdrq=dict(k=float('nan')))), ['quantization.weight.gdrq.k=nan', 'a number above 0']),
    (dict(weight=dict(gdrq=dict(clip='off'))), ["quantization.weight.gdrq.clip='off'", "'forward', 'project'"]),
    (dict(weight=dict(gdrq=dict(gradient='x'))), ["gdrq.gradient='x'", "'masked', 'straight_through'"]),
    (dict(weight=dict(gdrq=dict(threshold='x'))), ["gdrq.threshold='x'", "'scale_clip', 'search'"]),
    (dict(weight=dict(gdrq=dict(levels='half'))), ["gdrq.levels='half'", "'narrow', 'full', 'without_zero'"]),
    (
        dict(weight=dict(bits=4, gdrq=dict(levels='without_zero'))),
        ["gdrq.levels='without_zero'", '2 and 3 bits, not for 4'],
    ),
    (
        dict(overrides={'*.fc': dict(weight=dict(bits=5, gdrq=dict(levels='without_zero')))}),
        ["overrides['*.fc'].weight.gdrq.levels", 'not for 5'],
    ),
    (dict(distill=dict(temperature=0)), ['distill.temperature=0', 'above 0']),
    (dict(distill=dict(temprature=1)), ["distill has no key 'temprature'", "'temperature'"]),
    (dict(distill=2), ['distill=2']),
    (dict(schedule=dict(settle=1.5)), ['schedule.settle=1.5', 'from 0 to 1']),
    (dict(control=1), ['control=1', 'True, False']),
    (dict(weight=dict(method='lsq', lsq=dict(narrow_range='x'))), ["lsq.narrow_range='x'", 'True, False']),
    (dict(weight=dict(method='lsq', lsq=dict(narrow_range=1))), ['lsq.narrow_range=1', 'True, False']),
    (dict(activation=dict(gdrq=dict(momentum=0))), ['quantization.activation.gdrq.momentum=0', 'above 0', 'most 1']),
    (dict(activation=dict(gdrq=dict(momentum=1.1))), ['quantization.activation.gdrq.momentum=1.1', 'most 1']),
    (dict(activation=dict(gdrq=dict(momentum=None))), ['quantization.activation.gdrq.momentum=None', 'most 1']),
    (dict(activation=dict(gdrq=dict(mean='positive'))), ["gdrq.mean='positive'", "'all', 'nonzero'"]),
    (dict(overrides={'*.fc': dict(weight=dict(gdrq=dict(k=-1)))}), [f'{OVERRIDE}.weight.gdrq.k=-1', 'above 0']),
    (dict(overrides={'*.fc': dict(activation=dict(range='x'))}), [f"{OVERRIDE}.activation.range='x'", "'auto'"]),
]


@pytest.mark.parametrize('cfg, fragments', BAD, ids=[str(cfg) for cfg, _ in BAD])
def test_a_bad_value_is_named_with_its_field_and_the_choices(cfg, fragments):
    message = message_of(cfg)
    assert [f for f in fragments if f not in message] == [], message
    assert '\n' not in message


KEYS = st.sampled_from(
    'weight activation first_last_bits deployable schedule calibration_batches skip overrides method bits groups range '
    'gdrq k clip gradient threshold levels momentum mean reshape freeze * backbone.conv1'.split()
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from('gdrq channel auto signed zero_point forward project search learned all nonzero *.fc'.split()),
    st.sampled_from([2, 4, 8, 32, 0.5, 1.0]),
)
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3) | st.integers(0, 3), v, max_size=4),
    max_leaves=12,
)
SIDES = st.dictionaries(st.sampled_from('method bits groups range gdrq lsq twn'.split()), VALUES, max_size=3)
WHOLE = st.fixed_dictionaries(
    {},
    optional=dict(
        method=st.sampled_from(sorted(METHODS)) | VALUES,
        weight=SIDES | VALUES,
        activation=SIDES | VALUES,
        first_last_bits=VALUES,
        deployable=VALUES,
        schedule=st.dictionaries(st.sampled_from(['reshape', 'freeze']), LEAVES) | VALUES,
        calibration_batches=VALUES,
        skip=st.lists(st.text(max_size=3)) | VALUES,
        overrides=st.dictionaries(
            st.just('*') | LEAVES,
            st.dictionaries(st.sampled_from(['weight', 'activation']), SIDES) | VALUES,
            max_size=2,
        ),
    ),
)


@settings(deadline=None, max_examples=400)
@given(WHOLE | VALUES)
def test_a_dict_builds_a_layer_or_ends_in_a_user_error(cfg):
    try:
        accepted = Quantization.from_dict(cfg)
        accepted.check_patterns(NAMES)
        accepted.for_layer('backbone.conv1', first_or_last=True)
        QuantConv2d(2, 3, 1, quantization=cfg)
    except UserError as error:
        assert str(error)


# ---- methods --------------------------------------------------------------------------------------------------------


def test_a_method_sets_both_sides_as_its_paper_combines_them():
    cfg = Quantization.from_dict(dict(method='pact', weight=dict(bits=3), activation=dict(bits=2)))
    assert (cfg.weight, cfg.activation) == (Weight('dorefa', 3), Activation('pact', 2))
    assert all(w in WEIGHT_METHODS and a in ACTIVATION_METHODS for w, a in METHODS.values())
    assert {w for w, _ in METHODS.values()} == set(WEIGHT_METHODS)
    assert {a for _, a in METHODS.values()} == set(ACTIVATION_METHODS)


def test_a_side_may_choose_another_method():
    cfg = Quantization.from_dict(dict(method='gdrq', activation=dict(method='pact', pact=dict(decay_mult=0.5))))
    assert (cfg.weight.method, cfg.activation) == ('gdrq', Activation('pact', options=dict(decay_mult=0.5)))


def test_a_layer_whose_bits_the_method_does_not_have_takes_minmax():
    cfg = Quantization.from_dict(dict(method='twn', weight=dict(bits=2), overrides={'head.fc': dict(weight={})}))
    weight, activation = cfg.for_layer('head.fc', first_or_last=True)
    assert (weight, activation) == (Weight('minmax', 8), Activation('minmax', 8))
    assert cfg.for_layer('backbone.conv1')[0].method == 'twn'


# ---- patterns -------------------------------------------------------------------------------------------------------


def test_a_skip_pattern_that_matches_nothing_names_the_nearest_layers():
    with pytest.raises(UserError, match=r"skip.*'backbone\.conv2'.*nearest: .*backbone\.conv1"):
        Quantization.from_dict(dict(skip=['head.fc', 'backbone.conv2'])).check_patterns(NAMES)


def test_an_override_that_matches_nothing_names_the_nearest_layers():
    cfg = Quantization.from_dict(dict(overrides={'head.fcs': dict(weight=dict(bits=8))}))
    with pytest.raises(UserError, match=r"overrides.*'head\.fcs'.*nearest: .*head\.fc"):
        cfg.check_patterns(NAMES)


def test_patterns_that_match_a_layer_pass():
    cfg = Quantization.from_dict(dict(skip=['backbone.*', 'head.f?'], overrides={'*.conv[12]': {}}))
    cfg.check_patterns(NAMES)


def test_skipped_tells_whether_a_pattern_matches():
    cfg = Quantization.from_dict(dict(skip=['*.layer1.*']))
    assert [cfg.skipped(name) for name in NAMES] == [False, True, True, False]


# ---- settings of a layer --------------------------------------------------------------------------------------------


def test_a_layer_has_the_common_settings():
    cfg = Quantization.from_dict(dict(weight=dict(bits=2, groups=4), activation=dict(bits=3)))
    assert cfg.for_layer('backbone.conv1') == (cfg.weight, cfg.activation)


def test_first_and_last_layers_have_their_own_bits():
    cfg = Quantization.from_dict(dict(weight=dict(bits=2, groups=4), activation=dict(bits=3), first_last_bits=6))
    weight, activation = cfg.for_layer('backbone.conv1', first_or_last=True)
    assert (weight.bits, weight.groups, activation.bits) == (6, 4, 6)


@pytest.mark.parametrize('side', [0, 1])
def test_a_float_side_stays_float_in_first_and_last_layers(side):
    cfg = Quantization.from_dict({('weight', 'activation')[side]: dict(bits=32)})
    assert cfg.for_layer('backbone.conv1', first_or_last=True)[side].bits == 32
    assert cfg.for_layer('backbone.conv1', first_or_last=True)[1 - side].bits == 8


def test_an_override_changes_only_what_it_names():
    cfg = Quantization.from_dict(
        dict(
            weight=dict(bits=2, groups=4, gdrq=dict(k=2.0, clip='project')),
            overrides={'*.conv2': dict(weight=dict(gdrq=dict(k=3.0)))},
        )
    )
    weight, activation = cfg.for_layer('backbone.layer1.0.conv2')
    assert weight == Weight('gdrq', 2, dict(k=3.0, clip='project'), 4) and activation == cfg.activation
    assert cfg.for_layer('backbone.conv1')[0].options == dict(k=2.0, clip='project')


def test_the_last_of_several_matching_overrides_wins():
    wide, narrow = dict(weight=dict(bits=8, groups=2)), dict(weight=dict(bits=5))
    first = Quantization.from_dict(dict(overrides={'backbone.*': wide, '*.conv2': narrow}))
    second = Quantization.from_dict(dict(overrides={'*.conv2': narrow, 'backbone.*': wide}))
    name = 'backbone.layer1.0.conv2'
    assert [c.for_layer(name)[0].bits for c in (first, second)] == [5, 8]
    assert first.for_layer(name)[0].groups == 2


def test_an_override_wins_over_the_bits_of_first_and_last_layers():
    cfg = Quantization.from_dict(dict(overrides={'head.fc': dict(weight=dict(bits=4))}))
    weight, activation = cfg.for_layer('head.fc', first_or_last=True)
    assert (weight.bits, activation.bits) == (4, 8)


def test_an_override_can_make_a_side_float():
    cfg = Quantization.from_dict(dict(overrides={'head.fc': dict(activation=dict(bits=32))}))
    assert [s.bits for s in cfg.for_layer('head.fc', first_or_last=True)] == [8, 32]


# ---- options of methods ---------------------------------------------------------------------------------------------


def test_options_of_a_method_that_is_not_in_use_are_left_out(other_method):
    cfg = Quantization.from_dict(dict(weight=dict(method='other', gdrq=dict(k=2.0), other=dict(shape='round'))))
    assert cfg.weight.options == dict(shape='round')


def test_misspelt_options_of_a_method_that_is_not_in_use_are_an_error(other_method):
    message = message_of(dict(weight=dict(method='gdrq', other=dict(shap='round'))))
    assert "quantization.weight.other has no key 'shap'" in message and "did you mean 'shape'" in message


def test_an_override_with_another_method_drops_the_options_of_the_common_one(other_method):
    cfg = Quantization.from_dict(
        dict(weight=dict(gdrq=dict(k=2.0)), overrides={'head.fc': dict(weight=dict(method='other'))})
    )
    assert cfg.for_layer('head.fc')[0].options == {}


def test_options_of_other_methods_are_named():
    cfg = dict(weight=dict(gdrq=dict(k=3), groups=2), activation=dict(bits=3, gdrq=dict(k=9), pact=dict(lr_mult=2)))
    assert unused_options(cfg) == ['quantization.activation.pact']
    assert unused_options({**cfg, 'method': 'lsq'}) == [
        'quantization.weight.gdrq',
        'quantization.activation.gdrq',
        'quantization.activation.pact',
    ]
    assert unused_options({}) == []
