"""The `quantization` dict of a config: schema, defaults and validation.

An example; the defaults stand in the classes below:

    quantization = dict(
        method='gdrq',
        weight=dict(bits=4, groups=4, gdrq=dict(k=None, clip='forward')),
        activation=dict(bits=4, range='auto', per_level=False, gdrq=dict(k=None, momentum=0.01)),
        first_last_bits=8,
        attention=dict(bits=8),
        deployable=True,
        schedule=dict(reshape=0.0, freeze=0.9, settle=0.02),
        distill=dict(temperature=2.0),
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
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from .distill import Distill
from .errors import UserError
from .products import Attention
from .quantizers import ACTIVATION_METHODS, METHODS, OF_BITS, WEIGHT_METHODS
from .typed import FLOAT_BITS, Bounds, check_fields, near

Fraction = Annotated[float, Bounds(0, 1, closed=True)]


@dataclass(frozen=True)
class Side:
    """What the settings of weights and of activations have in common."""

    method: str = 'gdrq'
    """Name of a method, see docs/methods.md."""
    bits: int = 4
    """2 to 8, or 32 for float; some methods have fewer choices, 'xnor' has 1."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The method's own options (written under the method's name)."""

    methods: ClassVar[Mapping[str, Any]]
    """The methods of this side."""
    of_method: ClassVar[Mapping[str, Any]] = {}
    """Settings that go with the method, and the value that leaves them to another one."""

    def with_bits(self: AnySide, bits: int) -> AnySide:
        """The same with other bits; options that suit the old bits only are left out.

        A method that is not made for these bits is replaced by 'minmax'.
        """
        method = self.methods[self.method]
        if bits not in method.allowed_bits:
            return dataclasses.replace(self, method='minmax', bits=bits, options={}, **self.of_method)
        left_out = {f.name for f in dataclasses.fields(method.Options) if f.metadata == OF_BITS and bits != self.bits}
        options = {name: value for name, value in self.options.items() if name not in left_out}
        return dataclasses.replace(self, bits=bits, options=options)

    def merged(self: AnySide, cfg: Any, path: str, layer: str = '') -> AnySide:
        """These settings with those of a dict over them; a wrong one is a UserError."""
        cfg = check_fields(type(self), cfg, path, layer, also=['method', 'bits', *self.methods], hidden=['options'])
        method, bits = cfg.get('method', self.method), cfg.get('bits', self.bits)
        check_method(method, self.methods, f'{path}.method', layer)
        check_bits(bits, f'{path}.bits', layer, method, self.methods[method].allowed_bits)
        options = dict(self.with_bits(bits).options) if method == self.method else {}
        for name, each in self.methods.items():  # those of the others are checked and ignored, see unused_options
            given = check_fields(each.Options, cfg.get(name, {}), f'{path}.{name}', layer)
            if name == method:
                options.update(given)
        self.methods[method].check_options(bits, options, f'{path}.{method}')
        return dataclasses.replace(self, **{k: v for k, v in cfg.items() if k not in self.methods}, options=options)


AnySide = TypeVar('AnySide', bound=Side)


@dataclass(frozen=True)
class Weight(Side):
    """How the weights of a layer are quantized."""

    methods = WEIGHT_METHODS
    of_method = dict(groups=None)

    groups: Annotated[int, Bounds(1, closed=True)] | Literal['channel'] | None = None
    """Groups of filters with a threshold each, at most as many as filters; None: those of the method's paper."""


@dataclass(frozen=True)
class Activation(Side):
    """How the input of a layer is quantized."""

    methods = ACTIVATION_METHODS

    range: Literal['auto', 'unsigned', 'signed', 'zero_point'] = 'auto'
    """'unsigned', 'signed', 'zero_point' (unsigned with a zero point), or 'auto': decided once, from calibration."""
    per_level: bool = False
    """A threshold for each pyramid level in the layers that a head calls once a level (Chen et al., AQD, CVPR 2021)."""


@dataclass(frozen=True)
class Schedule:
    """Stages as fractions of the training length (docs/method.md, section 5)."""

    reshape: Fraction = 0.0
    """Until here: Scale-Clip in float, no rounding. 0 leaves the stage out."""
    freeze: Fraction = 1.0
    """From here: thresholds and BN statistics stand still. 1 leaves the stage out."""
    settle: Fraction = 0.0
    """Length of an epilogue in which both are computed anew, with the weights fixed, on weakly augmented pictures."""


@dataclass(frozen=True)
class Quantization:
    """The whole `quantization` dict."""

    weight: Weight = Weight()
    activation: Activation = Activation()
    first_last_bits: int = 8
    """Bits of weights and inputs of the first and last layers (docs/method.md, section 5); a float side stays float."""
    deployable: bool = True
    """Simulate what the integer graph needs: one quantizer for all readers of a tensor, 8-bit operands of additions and
    inputs of activation functions such as SiLU, and in evaluation biases in whole units of the integer sums."""
    schedule: Schedule = Schedule()
    attention: Attention = field(default_factory=Attention)
    """Bits of the factors of products of two activations, query x key and weights x value."""
    distill: Distill | None = None
    control: bool = False
    """Every quantizer off: the float model, trained on by this very recipe, for comparison."""
    calibration_batches: Annotated[int, Bounds(1, closed=True)] = 8
    """Training batches from which thresholds start (ours)."""
    skip: Annotated[tuple[str, ...], 'a list of patterns'] = ()
    """Patterns of layers that stay float."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Pattern -> dict(weight=..., activation=...) merged over the settings above; later patterns win."""

    @staticmethod
    def from_dict(cfg: Mapping[str, Any]) -> Quantization:
        """Validate a `quantization` dict; a wrong key or value is a UserError with field, value and choices."""
        path = 'quantization'
        cfg = dict(check_fields(Quantization, cfg, path, also=['method', 'first_last_bits']))
        method = cfg.pop('method', 'gdrq')
        check_method(method, METHODS, f'{path}.method')
        check_bits(cfg.get('first_last_bits', 8), f'{path}.first_last_bits')
        for pattern, override in cfg.get('overrides', {}).items():
            if not isinstance(pattern, str):
                raise UserError(f'{path}.overrides[{pattern!r}]: the pattern is not a string')
            check_fields(_Override, override, f'{path}.overrides[{pattern!r}]')
        sides = Weight(METHODS[method][0]), Activation(METHODS[method][1])
        cfg['weight'] = sides[0].merged(cfg.get('weight', {}), f'{path}.weight')
        cfg['activation'] = sides[1].merged(cfg.get('activation', {}), f'{path}.activation')
        cfg['schedule'] = _schedule(cfg.get('schedule', {}), f'{path}.schedule')
        for key, kind in (('attention', Attention), ('distill', Distill)):
            if cfg.get(key) is not None:
                cfg[key] = kind(**check_fields(kind, cfg[key], f'{path}.{key}'))
        cfg['skip'] = tuple(cfg.get('skip', ()))
        cfg['overrides'] = {pattern: dict(value) for pattern, value in cfg.get('overrides', {}).items()}
        checked = Quantization(**cfg)
        for pattern in checked.overrides:
            checked._overridden([pattern], '', checked.weight, checked.activation)
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
        if found.pop('attention', None) is not None:
            found['attention.bits'] = self.attention.bits
        if self.distill is not None:
            found['distill'] = f'T {self.distill.temperature:g}, weight {self.distill.weight:g}'
        return found

    def check_patterns(self, layers: Collection[str], attentions: Collection[str] = ()) -> None:
        """Raise UserError if a pattern of `skip` or `overrides` matches nothing; an attention can only be skipped."""
        for where, names in (('skip', [*layers, *attentions]), ('overrides', [*layers])):
            for pattern in getattr(self, where):
                if not fnmatch.filter(names, pattern):
                    near = ', '.join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
                    raise UserError(f'quantization.{where}: the pattern {pattern!r} matches no layer; nearest: {near}')

    def for_layer(self, name: str, first_or_last: bool = False) -> tuple[Weight, Activation]:
        """Settings of one layer: the common ones, 8 bits if it is first or last, then the overrides."""
        matching = [p for p in self.overrides if fnmatch.fnmatchcase(name, p)]
        weight, activation = self.weight, self.activation
        if first_or_last:
            bits = self.first_last_bits
            weight = weight if weight.bits == FLOAT_BITS else weight.with_bits(bits)
            activation = activation if activation.bits == FLOAT_BITS else activation.with_bits(bits)
        return self._overridden(matching, f' (layer {name})', weight, activation)

    def skipped(self, name: str) -> bool:
        """Whether a pattern of `skip` matches this layer."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.skip)

    def _overridden(
        self, patterns: Iterable[str], layer: str, weight: Weight, activation: Activation
    ) -> tuple[Weight, Activation]:
        """These settings with the overrides of some patterns over them, in their order."""
        for pattern in patterns:
            path, override = f'quantization.overrides[{pattern!r}]', self.overrides[pattern]
            weight = weight.merged(override.get('weight', {}), f'{path}.weight', layer)
            activation = activation.merged(override.get('activation', {}), f'{path}.activation', layer)
        return weight, activation


@dataclass(frozen=True)
class _Override:
    weight: Weight
    activation: Activation


def unused_options(cfg: Mapping[str, Any]) -> list[str]:
    """Options of methods that a valid `quantization` dict has but does not use, such as 'quantization.weight.gdrq'."""
    quantization = Quantization.from_dict(cfg)
    return [
        f'quantization.{name}.{key}'
        for name, side in (('weight', quantization.weight), ('activation', quantization.activation))
        for key in cfg.get(name) or {}
        if key in side.methods and key != side.method
    ]


def settings_of(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization` dict; a name such as 'lsq_w2a4' is that of a base config.

    Raises:
        UserError: it is another name.
    """
    if isinstance(config, Mapping):
        return dict(config)
    match = re.fullmatch(r'(?:(\w+)_)?w(\d+)a(\d+)', str(config).lower())
    if match is None:
        raise UserError(f"quantize: config={config!r} is not of the form 'w4a4' or 'lsq_w2a4', nor a dict")
    method, weight, activation = match[1] or 'gdrq', int(match[2]), int(match[3])
    return dict(method=method, weight=dict(bits=weight), activation=dict(bits=activation))


def check_method(name: Any, methods: Iterable[str], path: str, layer: str = '') -> None:
    """Raise UserError if there is no method of this name."""
    if not isinstance(name, str) or name not in methods:
        raise UserError(f'{path}={name!r} is unknown{near(name, methods)}{layer}')


def check_bits(bits: Any, path: str, layer: str = '', method: str = '', allowed: range = range(2, 9)) -> None:
    """Raise UserError if these are neither allowed bits nor 32."""
    if type(bits) is int and (bits in allowed or bits == FLOAT_BITS):
        return
    choices = f'an integer from {allowed[0]} to {allowed[-1]}' if len(allowed) > 1 else str(allowed[0])
    only = f' with method {method!r}' if allowed != range(2, 9) else ''
    raise UserError(f'{path}={bits!r} is not {choices}, nor {FLOAT_BITS} for float{only}{layer}')


def _schedule(cfg: Any, path: str) -> Schedule:
    schedule = Schedule(**check_fields(Schedule, cfg, path))
    if schedule.reshape > schedule.freeze:
        raise UserError(f'{path}: reshape={schedule.reshape} ends after freeze={schedule.freeze} begins')
    return schedule


_GENERAL = {'schedule', 'distill', 'calibration_batches'}
_OF_METHODS = {'momentum', 'mean', 'gradient', 'clip', 'lr_mult', 'decay_mult', 'portions', 'weights_from'}
TRAINING_ONLY = frozenset(_GENERAL | _OF_METHODS)
"""Settings that only training reads: a trained model computes the same whatever they are."""


def first_difference(theirs: Any, ours: Any, training: bool) -> str:
    """The first difference of the `quantization` dict of a checkpoint and that of a config; '' if there is none.

    A default that is spelled out is no difference.

    Args:
        theirs, ours: each a dict, or None for a float model.
        training: compare TRAINING_ONLY too.
    """
    if theirs is None or ours is None:
        return '' if theirs is ours else f'the model of the {"checkpoint" if theirs is None else "config"} is float'
    one, other = (_settings(Quantization.from_dict(cfg)) for cfg in (theirs, ours))
    for path in {**one, **other}:
        pair = one.get(path), other.get(path)
        left, right = pair if training else map(_needed, pair)
        if left != right and (training or TRAINING_ONLY.isdisjoint(path.split('.'))):
            return f'{path} is {left!r} in the checkpoint and {right!r} in the config'
    return ''


def _needed(value: Any) -> Any:
    """A value, such as that of `overrides`, without what only training reads."""
    return {k: _needed(v) for k, v in value.items() if k not in TRAINING_ONLY} if isinstance(value, Mapping) else value


def _settings(quantization: Quantization) -> dict[str, Any]:
    """Path of a setting -> its value, with the defaults of the methods; overrides as they are written."""
    found: dict[str, Any] = {}
    for side, methods in (('weight', WEIGHT_METHODS), ('activation', ACTIVATION_METHODS)):
        part = getattr(quantization, side)
        path, method = f'quantization.{side}', methods[part.method]
        found[f'{path}.method'] = part.method
        found |= {f'{path}.{name}': getattr(part, name) for name in _names(part) if name not in ('method', 'options')}
        for option in dataclasses.fields(method.Options):
            found[f'{path}.{part.method}.{option.name}'] = part.options.get(option.name, option.default)
    if quantization.weight.groups is None:
        found['quantization.weight.groups'] = WEIGHT_METHODS[quantization.weight.method].default_groups
    names = [name for name in _names(quantization) if name not in ('weight', 'activation')]
    return found | {f'quantization.{name}': getattr(quantization, name) for name in names}


def _names(part: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(part)]
