"""From a checkpoint into a model: does it fit, is it of the same quantization, and by which plan was it quantized."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn as nn
from mmengine.runner.checkpoint import load_state_dict

from ..core.config import Quantization, first_difference
from ..core.errors import UserError
from ..core.quantizers import Quantizer, Stage, learned_parameters
from ..core.topology import Plan
from .accumulation import is_accumulated
from .checkpoints import iterations_of

_QUANTIZER_ENTRY = re.compile(r'(^|\.)(weight_quant|own_input_quant|output_quant|product_quant)\.')
"""Matches the names of what quantizers keep in a state dict."""
_RESUMED: dict[str, Callable[[Any], bool]] = {
    'seed': lambda value: value is None or (type(value) is int and 0 <= value < 1 << 32),
    'run': lambda value: isinstance(value, str),
    'validated': lambda value: isinstance(value, bool),
    'batches': lambda value: type(value) is int and value > 0,
    'recipe': lambda value: isinstance(value, dict),
    'changed': lambda value: isinstance(value, list) and all(type(each) is str for each in value),
    'patience': lambda value: isinstance(value, dict) and all(map(_is_patience, value.values())),
    'start': lambda value: value is None or isinstance(value, dict),
}
"""Entry of `meta` that a resumed training reads or hands on -> whether a value is one that a training writes."""


def _is_patience(value: Any) -> bool:
    return isinstance(value, list) and [type(each) for each in value] == [int, float] and value[0] >= 0


def meta_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself; empty for a plain state dict."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def dataset_meta_of(checkpoint: Mapping[str, Any], filename: str) -> dict[str, Any]:
    """What a checkpoint knows of its data set, such as `classes`.

    Old ones spell the keys in capitals; those before mmengine have them in `meta` itself.

    Raises:
        UserError: it is not a dict, or its classes are not a list.
    """
    whole = meta_of(checkpoint)
    meta = whole.get('dataset_meta')
    meta = {key: whole[key] for key in ('CLASSES', 'PALETTE') if key in whole} if meta is None else meta
    if not isinstance(meta, dict) or not all(isinstance(key, str) for key in meta):
        _refuse_entry(filename, 'dataset_meta', meta)
    found = {key.lower(): value for key, value in meta.items()}
    if not isinstance(found.get('classes'), (list, tuple, type(None))):
        _refuse_entry(filename, 'dataset_meta', meta)
    return found


def _refuse_entry(filename: str, key: str, value: Any) -> NoReturn:
    raise UserError(f"checkpoint {filename} is damaged: meta['{key}'] is {_short(value)}")


def _short(value: Any) -> str:
    return ' '.join(repr(value).split())[:60]


def state_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint, names without a 'module.' prefix."""
    return renamed(checkpoint.get('state_dict', checkpoint), [(r'^module\.', '')])


def renamed(state: Mapping[str, Any], patterns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A state dict with regular expressions replaced in its names; the versions of its modules stay with it."""
    new = OrderedDict(state)
    for pattern, replacement in patterns:
        new = OrderedDict((re.sub(pattern, replacement, name), value) for name, value in new.items())
    new._metadata = getattr(state, '_metadata', OrderedDict())  # type: ignore[attr-defined]  # where torch keeps them
    return new


def plan_of(model: nn.Module, checkpoint: Mapping[str, Any], filename: str) -> Plan | None:
    """The plan by which the model of a checkpoint was quantized; None if the checkpoint has none, as old ones.

    Raises:
        UserError: it is not a plan, or it is that of another model.
    """
    content = meta_of(checkpoint).get('plan')
    if content is None:
        return None
    try:
        plan = Plan.from_dict(content)
    except ValueError as error:
        raise UserError(f'checkpoint {filename}: {error}') from None
    name = plan.unknown_to(model)
    if name is not None:
        raise UserError(f'checkpoint {filename} is of another model: its plan has {name}, this model has not')
    return plan


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    filename: str,
    quantization: Mapping[str, Any] | None,
    share: float = 1.0,
    use: str = 'test',
    strict: bool = False,
) -> str:
    """Load a checkpoint into a model after checking that it fits.

    Args:
        model: bare, and quantized if the config says so.
        checkpoint: what :func:`read_checkpoint` returned; messages call it `filename`.
        quantization: the `quantization` dict of the config; None if it has none.
        share: of the parameters that have to be in the checkpoint.
        use: 'test' for predictions, 'resume' to go on with its training, 'start' for a new training. A new training
            finds its thresholds anew if the checkpoint has those of another quantization.

    Returns:
        Why thresholds were left out; '' if they were not.

    Raises:
        UserError: the checkpoint is of another model, of another quantization, or has values that are not finite.
    """
    check_fits(model, checkpoint, filename, share)
    check_quantizers(checkpoint, filename)
    check_settings(checkpoint, filename)
    if use == 'resume':
        check_resumable(model, checkpoint, filename)
    mismatch = other_quantization(model, checkpoint, quantization, resume=use == 'resume')
    if mismatch and use != 'start':
        hint = '; a training that starts from it is one without resume' if use == 'resume' else ''
        raise UserError(f'checkpoint {filename} was trained with another quantization config: {mismatch}{hint}')
    state = state_of(without_quantizers(checkpoint) if mismatch else checkpoint)
    load_state_dict(model, _without_other_heads(model, state), strict)
    check_finite(model, filename)
    return mismatch


def converted(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state dict arrives at the parameters and buffers of a model; nothing is loaded.

    mmdet renames layers of old FCOS heads while it loads, mmpretrain resizes position embeddings, for example.
    """
    arriving: dict[str, Any] = OrderedDict()

    def note(module: nn.Module, given: dict[str, Any], prefix: str, *others: Any) -> None:
        for hook in module._load_state_dict_pre_hooks.values():
            hook(given, prefix, *others)
        for name in (*module._parameters, *module._buffers):
            if prefix + name in given:
                arriving[prefix + name] = given[prefix + name]

    tensors = renamed(state, [])
    for name in [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        del tensors[name]
    original = nn.Module._load_from_state_dict
    nn.Module._load_from_state_dict = note  # type: ignore[method-assign, assignment]  # what all overrides end with
    try:
        load_state_dict(model, tensors)
    finally:
        nn.Module._load_from_state_dict = original  # type: ignore[method-assign]
    return arriving


def check_fits(model: nn.Module, checkpoint: Mapping[str, Any], filename: str, share: float) -> None:
    """Raise UserError if less than `share` of the model's parameters are in the checkpoint, with their shape.

    Parameters of quantizers do not count: a float checkpoint has none. What counts is the state dict as the libraries
    convert it while they load.
    """
    state = converted(model, state_of(checkpoint))
    learned = learned_parameters(model)
    parameters = {n: p for n, p in model.named_parameters() if n not in learned}
    wrong = [n for n, p in parameters.items() if n not in state or state[n].shape != p.shape]
    if len(parameters) - len(wrong) < share * len(parameters):
        raise UserError(
            f'checkpoint {filename} is of another model: {len(parameters) - len(wrong)} of {len(parameters)} '
            f'parameters match by name and shape; the first that does not is {wrong[0]}'
        )


def check_quantizers(checkpoint: Mapping[str, Any], filename: str) -> None:
    """Raise UserError if what a checkpoint holds of its quantizers is not what quantizers write."""
    stages = {int(stage) for stage in Stage}
    for name, value in state_of(checkpoint).items():
        if not _QUANTIZER_ENTRY.search(name):
            continue
        good = isinstance(value, torch.Tensor)
        if good and name.endswith('.state'):
            good = value.dtype == torch.int32 and value.shape == (5,)
            if good:
                stage, calibrated, lo, hi, bits = value.tolist()
                good = stage in stages and calibrated in (0, 1) and 0 < bits <= 32
                good = good and -(2**bits) <= lo <= 0 <= hi <= 2**bits
        if not good:
            raise UserError(f'checkpoint {filename} is damaged: {name} is {_short(value)}')


def check_finite(model: nn.Module, filename: str) -> None:
    """Raise UserError if a parameter that was loaded is NaN or infinite: the training had diverged."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f'checkpoint {filename} has NaN or infinite values in {name}: its training diverged')


def check_settings(checkpoint: Mapping[str, Any], filename: str) -> None:
    """Raise UserError if the `quantization` dict in a checkpoint is not one."""
    settings = meta_of(checkpoint).get('quantization')
    try:
        if settings is not None:
            Quantization.from_dict(settings)
    except UserError as error:
        raise UserError(f'checkpoint {filename}: {error}') from None


def check_resumable(model: nn.Module, checkpoint: Mapping[str, Any], filename: str) -> None:
    """Raise UserError if a checkpoint does not hold the state of a training of this model."""
    if iterations_of(checkpoint) is None:
        raise UserError(f'checkpoint {filename} holds weights only and cannot be resumed; name it in load_from instead')
    meta = meta_of(checkpoint)
    for key, good in _RESUMED.items():
        if key in meta and not good(meta[key]):
            _refuse_entry(filename, key, meta[key])
    if 'accumulated' in meta and not is_accumulated(model, meta['accumulated']):
        _refuse_entry(filename, 'accumulated', meta['accumulated'])


def _teacher_of(quantization: Any) -> str:
    return ((quantization or {}).get('distill') or {}).get('teacher') or ''


def _with_moved_teacher(theirs: Any, ours: Any) -> Any:
    """The settings of a checkpoint with the teacher's path of the config, if its file has the same name."""
    before, now = _teacher_of(theirs), _teacher_of(ours)
    if not before or Path(before).name != Path(now).name:
        return theirs
    return {**theirs, 'distill': {**theirs['distill'], 'teacher': now}}


def other_quantization(
    model: nn.Module, checkpoint: Mapping[str, Any], quantization: Mapping[str, Any] | None, resume: bool = False
) -> str:
    """Why the thresholds of a checkpoint do not belong to this model; '' if they do or if it has none.

    The `quantization` dicts of both are compared, then the names, bits and shapes of what the quantizers keep. An old
    checkpoint has no such dict.

    Args:
        resume: the dicts have to be equal. Else they may differ in what only training reads.
    """
    state, meta = state_of(checkpoint), meta_of(checkpoint)
    theirs = {name for name in state if _QUANTIZER_ENTRY.search(name)}
    if 'quantization' in meta and (theirs or resume):
        before = _with_moved_teacher(meta['quantization'], quantization)
        difference = first_difference(before, quantization, training=resume)
        if difference:
            return difference
    if not theirs:
        return ''
    # With all names of a layer that a model has several times: a state dict has them all.
    prefixes = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Quantizer)]
    ours = {f'{name}.{key}': value for name, m in prefixes for key, value in m.state_dict().items()}
    if not ours:
        return 'this config quantizes nothing'
    for name in sorted(theirs ^ set(ours)):
        return f'{name} is in the {"checkpoint" if name in theirs else "config"} only'
    for name, m in prefixes:
        bits = int(state[f'{name}.state'][-1])
        if bits != m.bits:
            return f'{name} has {bits} bits in the checkpoint and {m.bits} in the config'
    for name, value in ours.items():
        if state[name].shape != value.shape:
            return f'{name} has shape {tuple(state[name].shape)} in the checkpoint, {tuple(value.shape)} in the config'
    return ''


def _without_other_heads(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without the quantizers of weights that have another shape here: theirs start from the new weight."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    other = [name for name in shapes if name in state and getattr(state[name], 'shape', None) != shapes[name]]
    prefixes = tuple(f'{name.removesuffix(".weight")}.weight_quant.' for name in other if name.endswith('.weight'))
    for name in [name for name in state if name.startswith(prefixes)]:
        del state[name]
    return state


def is_quantized(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has quantizers, so that training or calibration has been there."""
    return any(_QUANTIZER_ENTRY.search(name) for name in state_of(checkpoint))


def without_quantizers(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint as if it came from the float model."""
    state = state_of(checkpoint)
    for name in [name for name in state if _QUANTIZER_ENTRY.search(name)]:
        del state[name]
    return {**checkpoint, 'state_dict': state}
