"""How records were obtained, beside model, data, method and bits: the recipe of the training, versions, hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .identity import extras_of, is_control

Record = Mapping[str, Any]

SHOWN = 160
"""Letters of a value that are shown at most."""
NOT_RECORDED = 'not recorded'


def flat(value: Any, place: str = '') -> dict[str, str]:
    """Nested data as places and values: {'a': [1]} becomes {'a[0]': '1'}."""
    if isinstance(value, Mapping) and value:
        inner = ((f'{place}.{key}' if place else str(key), each) for key, each in value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(each, (Mapping, list, tuple)) for each in value):
        inner = ((f'{place}[{number}]', each) for number, each in enumerate(value))
    else:
        return {place: value if isinstance(value, str) else json.dumps(value, default=str)}
    return {key: text for name, each in inner for key, text in flat(each, name).items()}


def recipe_key(record: Record) -> str:
    """Equal for two records if their checkpoints were trained alike, up to the seed, and as many of them were tested.

    An old record has no recipe: how long it was trained stands for it. So it does where nothing was trained.
    """
    training = record['training']
    recipe = {key: value for key, value in (training.get('recipe') or {}).items() if key != 'versions'}
    length = [] if recipe and training.get('iter') else list(reached(record))
    changed = training.get('changed') or []
    return json.dumps([recipe, length, tested(record), *([changed] if changed else [])], sort_keys=True, default=str)


def tested(record: Record) -> int:
    """The number of checkpoints of which the record has the mean (`gdrq test --last`)."""
    return len(record.get('checkpoints') or [0])


def reached(record: Record) -> tuple[Any, Any]:
    """Epochs and iterations after which the checkpoint was written."""
    return record['training'].get('epoch'), record['training'].get('iter')


def differences(records: Sequence[tuple[str, Record]]) -> list[str]:
    """What differs in how records were obtained, one line a difference.

    Args:
        records: each with a label that stands for it in the lines; several may have the same.
    """
    facts = [(label, _facts(record)) for label, record in records]
    labels = list(dict.fromkeys(label for label, _ in facts))
    lines = []
    told: dict[str, list[str]] = {label: [] for label in labels}
    for key in dict.fromkeys(key for _, found in facts for key in found):
        values: dict[str, dict[str, None]] = {label: {} for label in labels}
        for label, found in facts:
            # Records without a recipe differ in one line, not in one for each of its settings.
            if key in found or not (key in OF_SOME or (key.startswith('recipe.') and 'recipe' in found)):
                absent = NOT_SET if key.startswith('recipe.') else ABSENT.get(key, NOT_RECORDED)
                values[label][_short(found.get(key, absent))] = None
        lines += _line(key.removeprefix('recipe.'), values)
        for label in labels:
            told[label] += values[label]
    if len({tuple(texts) for texts in told.values()}) < len(labels):
        files: dict[str, dict[str, None]] = {label: {} for label in labels}
        for label, record in records:
            files[label][record['checkpoint']['file'] or NOT_RECORDED] = None
        lines += _line('checkpoint', files)
    return lines


def _line(name: str, values: Mapping[str, Mapping[str, None]]) -> list[str]:
    """One line with the values of a fact by label, or none if they are equal."""
    if len({text for texts in values.values() for text in texts}) < 2:
        return []
    shown = {label: ' or '.join(texts) for label, texts in values.items() if texts}
    return [f'{name}: ' + '; '.join(f'{label} {texts}' for label, texts in shown.items())]


ABSENT = {'recipe': 'recorded', 'changed when resumed': 'nothing'}
"""What stands for a fact that a record does not have, if it is not NOT_RECORDED."""
NOT_SET = 'not set'
"""Stands for a setting of the recipe that a record with a recipe does not have."""
OF_SOME = ('trained from', 'calibration batches', 'teacher')
"""Facts that only some kinds of record have: the others are left out of their line."""


def _facts(record: Record) -> dict[str, str]:
    training, versions, git, hardware = (record.get(k) or {} for k in ('training', 'versions', 'git', 'hardware'))
    epoch, iteration = reached(record)
    start, recipe = training.get('start'), training.get('recipe')
    found = {
        name: NOT_RECORDED if value is None else str(value)
        for name, value in (('epochs', epoch), ('iterations', iteration))
    }
    if start:
        found['trained from'] = f'{start["file"]} {(start["sha256"] or "")[:8]}'.strip()
    if recipe:
        rates = recipe.get('param_scheduler')
        recipe = {**recipe, 'param_scheduler': [rates]} if isinstance(rates, Mapping) else recipe
        found |= {f'recipe.{key}': text for key, text in flat(recipe).items()}
    else:
        found['recipe'] = NOT_RECORDED
    if training.get('changed'):
        found['changed when resumed'] = ', '.join(map(str, training['changed']))
    if record['quantization'] and not is_control(record):
        found |= {'teacher': 'none', **{key: str(value) for key, value in extras_of(record).items()}}
    found['checkpoints tested'] = str(tested(record))
    found |= {f'tested with {name}': text for name, text in flat(versions).items() if name}
    found['code revision'] = str(git['commit'])[:7] if git.get('commit') else NOT_RECORDED
    found['tested on'] = ', '.join(map(str, hardware.get('gpus') or [])) or str(hardware.get('cpu') or NOT_RECORDED)
    return found


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f'{text[: SHOWN - 1]}…'
