"""The `quantization` dict of a config: schema, defaults and validation.

    quantization = dict(
        method='gdrq',
        weight=dict(bits=4, groups=4, gdrq=dict(k=None, clip='forward')),
        activation=dict(bits=4, range='auto', per_level=False, gdrq=dict(k=None, momentum=0.01)),
        first_last_bits=8,
        deployable=True,
        schedule=dict(reshape=0.0, freeze=0.9),
        calibration_batches=8,
        skip=['backbone.layer4.*'],
        overrides={'*.conv2': dict(weight=dict(bits=8))})

`method` sets the method of both sides as its paper combines them (docs/methods.md has the list); `weight.method` and
`activation.method` choose one side. A method's own options stand under the method's name; those of a method that
is not in use are ignored, so that a config which inherits this one and says `method='lsq'` need not remove them.
Patterns are fnmatch patterns on module names (`named_modules()`, without a 'module.' prefix).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS

FLOAT_BITS = 32
RANGES = ('auto', 'unsigned', 'signed', 'zero_point')


@dataclass(frozen=True)
class Weight:
    """How the weights of a layer are quantized."""

    method: str = 'gdrq'
    """Name of a method, see gdrq_mm/core/quantizers."""
    bits: int = 4
    """2 to 8, or 32 for float; some methods have fewer choices, 'xnor' has 1."""
    groups: int | str | None = None
    """Number of groups of filters with a threshold each; 'channel' is one a filter; None is what the method's paper
    has, 4 for GDRQ. At most the filters are used."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options (written under the method's name)."""

    def with_bits(self, bits: int) -> Weight:
        """The same with other bits; options that suit the old bits only are left out.

        A method that is not made for these bits is replaced by 'minmax'.
        """
        if bits not in WEIGHT_METHODS[self.method].allowed_bits:
            return Weight('minmax', bits)
        return dataclasses.replace(self, bits=bits, options=_fitting(self, WEIGHT_METHODS, bits))


@dataclass(frozen=True)
class Activation:
    """How the input of a layer is quantized."""

    method: str = 'gdrq'
    """Name of a method, see gdrq_mm/core/quantizers."""
    bits: int = 4
    """2 to 8, or 32 for float."""
    range: str = 'auto'
    """'unsigned', 'signed', 'zero_point' (unsigned with a zero point), or 'auto': decided once, from calibration."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options (written under the method's name)."""
    per_level: bool = False
    """A threshold for each pyramid level in the layers that a head calls once a level (Chen et al., AQD, CVPR 2021)."""

    def with_bits(self, bits: int) -> Activation:
        """The same with other bits, as for weights."""
        if bits not in ACTIVATION_METHODS[self.method].allowed_bits:
            return Activation('minmax', bits, self.range, per_level=self.per_level)
        return dataclasses.replace(self, bits=bits, options=_fitting(self, ACTIVATION_METHODS, bits))


@dataclass(frozen=True)
class Schedule:
    """Stages as fractions of the training length (docs/method.md, section 5)."""

    reshape: float = 0.0
    """Until here: Scale-Clip in float, no rounding. 0 leaves the stage out."""
    freeze: float = 1.0
    """From here: thresholds and BN statistics stand still. 1 leaves the stage out."""


@dataclass(frozen=True)
class Quantization:
    """The whole `quantization` dict."""

    weight: Weight = Weight()
    activation: Activation = Activation()
    first_last_bits: int = 8
    """Bits of weights and inputs of the first and last layers (docs/method.md, section 5); a float side stays float."""
    deployable: bool = True
    """Simulate what the integer graph needs: one quantizer for all readers of a tensor, 8-bit operands of additions,
    8-bit outputs of convolutions in front of an activation function other than ReLU, and in evaluation biases that are
    whole multiples of one unit of the integer sums."""
    schedule: Schedule = Schedule()
    calibration_batches: int = 8
    """Training batches from which thresholds start (ours)."""
    skip: tuple[str, ...] = ()
    """Patterns of layers that stay float."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Pattern -> dict(weight=..., activation=...) merged over the settings above; later patterns win."""

    @staticmethod
    def from_dict(cfg: Mapping[str, Any]) -> Quantization:
        """Validate a `quantization` dict.

        Raises:
            UserError: an unknown key, or a value out of range; the message names the field, its value and the choices.
        """
        path = 'quantization'
        cfg = _mapping(cfg, path)
        _known_keys(cfg, ['method', *(f.name for f in dataclasses.fields(Quantization))], path)
        method = cfg.get('method', 'gdrq')
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(f'{path}.method={method!r} is unknown{near(method, METHODS)}')
        sides = METHODS[method]
        bits = cfg.get('first_last_bits', 8)
        _check_bits(bits, f'{path}.first_last_bits')
        _check(cfg.get('deployable', True), (True, False), f'{path}.deployable')
        batches = cfg.get('calibration_batches', 8)
        if not _is_int(batches) or batches < 1:
            raise UserError(f'{path}.calibration_batches={batches!r} is not an integer of at least 1')
        overrides = _mapping(cfg.get('overrides', {}), f'{path}.overrides')
        for pattern, override in overrides.items():
            place = f'{path}.overrides[{pattern!r}]'
            if not isinstance(pattern, str):
                raise UserError(f'{place}: the pattern is not a string')
            _known_keys(_mapping(override, place), ['weight', 'activation'], place)
        skip = cfg.get('skip', ())
        if not isinstance(skip, (list, tuple)) or not all(isinstance(pattern, str) for pattern in skip):
            raise UserError(f'{path}.skip={skip!r} is not a list of patterns')
        checked = Quantization(
            weight=_weight(cfg.get('weight', {}), f'{path}.weight', Weight(sides[0])),
            activation=_activation(cfg.get('activation', {}), f'{path}.activation', Activation(sides[1])),
            first_last_bits=bits,
            deployable=cfg.get('deployable', True),
            schedule=_schedule(cfg.get('schedule', {}), f'{path}.schedule'),
            calibration_batches=batches,
            skip=tuple(skip),
            overrides={pattern: dict(value) for pattern, value in overrides.items()},
        )
        for pattern in checked.overrides:
            checked._merged(pattern, [pattern], '')
        return checked

    def choices(self) -> dict[str, Any]:
        """The settings that are not the default, without methods and bits, such as 'weight.clip' -> 'project'."""
        plain, found = Quantization(), {}
        default_groups = WEIGHT_METHODS[self.weight.method].default_groups
        parts = {'weight.': self.weight, 'activation.': self.activation, 'schedule.': self.schedule, '': self}
        for prefix, part in parts.items():
            default = getattr(plain, prefix[:-1]) if prefix else plain
            for name in (f.name for f in dataclasses.fields(part)):  # type: ignore[arg-type]
                value = getattr(part, name)
                if f'{name}.' in parts or name in ('method', 'bits', 'options') or value == getattr(default, name):
                    continue
                if (name, value) != ('groups', default_groups):
                    found[prefix + name] = value
            found.update({prefix + name: value for name, value in getattr(part, 'options', {}).items()})
        return found

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise UserError if a pattern of `skip` or `overrides` matches none of the layers' names."""
        names = list(names)
        for where, patterns in (('skip', self.skip), ('overrides', self.overrides)):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                    raise UserError(
                        f'quantization.{where}: the pattern {pattern!r} matches no layer; nearest: {", ".join(near)}'
                    )

    def for_layer(self, name: str, first_or_last: bool = False) -> tuple[Weight, Activation]:
        """Settings of one layer: the common ones, 8 bits if it is first or last, then the overrides."""
        matching = [p for p in self.overrides if fnmatch.fnmatchcase(name, p)]
        weight, activation = self.weight, self.activation
        if first_or_last:
            bits = self.first_last_bits
            weight = weight if weight.bits == FLOAT_BITS else weight.with_bits(bits)
            activation = activation if activation.bits == FLOAT_BITS else activation.with_bits(bits)
        return self._merged(name, matching, f' (layer {name})', weight, activation)

    def skipped(self, name: str) -> bool:
        """Whether a pattern of `skip` matches this layer."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip)

    def _merged(
        self,
        name: str,
        patterns: list[str],
        layer: str,
        weight: Weight | None = None,
        activation: Activation | None = None,
    ) -> tuple[Weight, Activation]:
        weight, activation = weight or self.weight, activation or self.activation
        for pattern in patterns:
            place = f'quantization.overrides[{pattern!r}]'
            override = self.overrides[pattern]
            if 'weight' in override:
                weight = _weight(override['weight'], f'{place}.weight', weight, layer)
            if 'activation' in override:
                activation = _activation(override['activation'], f'{place}.activation', activation, layer)
        return weight, activation


def near(word: str, choices: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest of the choices, else the list of them."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(word), choices, n=1)
    return f"; did you mean '{close[0]}'?" if close else f'; choices: {", ".join(choices)}'


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f'{path}={value!r} is not a dict')
    return value


def _known_keys(cfg: Mapping[str, Any], names: Iterable[str], path: str) -> None:
    names = list(names)
    for key in cfg:
        if key not in names:
            raise UserError(f"{path} has no key '{key}'{near(key, names)}")


def _check(value: Any, choices: Iterable[Any], path: str, layer: str = '') -> None:
    choices = list(choices)
    if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
        listed = ', '.join(repr(c) for c in choices)
        raise UserError(f'{path}={value!r} is not one of {listed}{layer}')


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_bits(bits: Any, path: str, layer: str = '', method: str = '', allowed: range = range(2, 9)) -> None:
    if _is_int(bits) and (bits in allowed or bits == FLOAT_BITS):
        return
    choices = f'an integer from {allowed[0]} to {allowed[-1]}' if len(allowed) > 1 else str(allowed[0])
    only = f' with method {method!r}' if allowed != range(2, 9) else ''
    raise UserError(f'{path}={bits!r} is not {choices}, nor {FLOAT_BITS} for float{only}{layer}')


def _fitting(side: Weight | Activation, methods: Mapping[str, Any], bits: int) -> dict[str, Any]:
    left_out = methods[side.method].bits_options if bits != side.bits else ()
    return {name: value for name, value in side.options.items() if name not in left_out}


def unused_options(cfg: Mapping[str, Any]) -> list[str]:
    """Options of methods that a valid `quantization` dict has but does not use, such as 'quantization.weight.gdrq'."""
    quantization = Quantization.from_dict(cfg)
    sides = (('weight', WEIGHT_METHODS), ('activation', ACTIVATION_METHODS))
    return [
        f'quantization.{side}.{name}'
        for side, methods in sides
        for name in cfg.get(side) or {}
        if name in methods and name != getattr(quantization, side).method
    ]


def _options(
    cfg: Mapping[str, Any], methods: Mapping[str, Any], method: str, base: Mapping[str, Any], path: str, layer: str
) -> dict[str, Any]:
    """The options of the method in use; those of the others are checked and ignored, see unused_options."""
    for name in methods:
        allowed = methods[name].options()
        given = _mapping(cfg.get(name, {}), f'{path}.{name}')
        _known_keys(given, allowed, f'{path}.{name}')
        for key, value in given.items():
            message = allowed[key](value)
            if message:
                raise UserError(f'{path}.{name}.{key}={value!r} is not {message}{layer}')
    return {**base, **cfg.get(method, {})}


def _side(cfg: Any, path: str, base: Any, methods: Mapping[str, Any], extra: list[str], layer: str) -> dict[str, Any]:
    """What weight and activation have in common: method, bits and the method's options."""
    cfg = _mapping(cfg, path)
    _known_keys(cfg, ['method', 'bits', *extra, *methods], path)
    method, bits = cfg.get('method', base.method), cfg.get('bits', base.bits)
    if not isinstance(method, str) or method not in methods:
        raise UserError(f'{path}.method={method!r} is unknown{near(method, methods)}{layer}')
    _check_bits(bits, f'{path}.bits', layer, method, methods[method].allowed_bits)
    inherited = base.with_bits(bits).options if method == base.method else {}
    options = _options(cfg, methods, method, inherited, path, layer)
    return dict(method=method, bits=bits, options=options, **{key: cfg.get(key, getattr(base, key)) for key in extra})


def _weight(cfg: Any, path: str, base: Weight = Weight(), layer: str = '') -> Weight:
    checked = Weight(**_side(cfg, path, base, WEIGHT_METHODS, ['groups'], layer))
    if checked.groups not in ('channel', None) and not (_is_int(checked.groups) and checked.groups >= 1):  # type: ignore[operator]
        raise UserError(f"{path}.groups={checked.groups!r} is not an integer of at least 1, nor 'channel'{layer}")
    return checked


def _activation(cfg: Any, path: str, base: Activation = Activation(), layer: str = '') -> Activation:
    checked = Activation(**_side(cfg, path, base, ACTIVATION_METHODS, ['range', 'per_level'], layer))
    _check(checked.range, RANGES, f'{path}.range', layer)
    _check(checked.per_level, (True, False), f'{path}.per_level', layer)
    return checked


def _schedule(cfg: Any, path: str) -> Schedule:
    cfg = _mapping(cfg, path)
    _known_keys(cfg, ['reshape', 'freeze'], path)
    values = {'reshape': 0.0, 'freeze': 1.0, **cfg}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f'{path}.{name}={value!r} is not a fraction of the training length from 0 to 1')
    if values['reshape'] > values['freeze']:
        raise UserError(f'{path}: reshape={values["reshape"]} ends after freeze={values["freeze"]} begins')
    return Schedule(**values)
