"""What a record is of: its model, data, method and bits, checkpoint and float model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.quantizers import TITLES

Record = Mapping[str, Any]


def is_control(record: Record) -> bool:
    """Whether it is of the float model, trained on by the recipe of a quantized one with every quantizer off."""
    return bool((record['quantization'] or {}).get('control'))


def backend_of(record: Record) -> str:
    """What ran the network: 'torch', or the runtime of an exported graph."""
    return record['model'].get('backend', 'torch')


def method_of(record: Record) -> str:
    """The method of a quantized record and its settings that are not the default, such as 'GDRQ (clip=project)'."""
    model = record['model']
    names = '/'.join(dict.fromkeys(TITLES.get(m, m) for m in model['methods']))
    names = 'PACT' if model['methods'] == ['dorefa', 'pact'] else names  # the paper combines them so
    options = {key: value for key, value in model['options'].items() if key != 'calibration_batches'}
    if not model['deployable']:
        options['deployable'] = False
    shown = ', '.join(f'{key.removeprefix("weight.")}={_short(value)}' for key, value in options.items())
    return f'{names} ({shown})' if shown else names


def _short(value: Any) -> str:
    """A setting as text; of overrides of many layers, as in mixed precision, their number and a part of their hash."""
    if not isinstance(value, Mapping) or len(value) < 4:
        return str(value)
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return f'{len(value)} layers, {digest[:4]}'


def bits_of(bits: Sequence[int]) -> str:
    """Such as 'W4A4'."""
    return 'W{}A{}'.format(*bits)


def title_of(record: Record) -> str:
    """Model and data set, for messages and titles."""
    return f'{record["model"]["name"]} on {record["data"]["name"]}'


def identity_of(record: Record) -> tuple[str, ...]:
    """What records must have in common to be compared: task, architecture, data and evaluation settings.

    The data by name: two sets of one layout, such as ImageNet and ImageNet-V2, have the same settings.
    """
    return record['task'], record['model']['config_sha256'], record['data']['name'], record['data']['evaluation_sha256']


def start_of(record: Record) -> str | None:
    """The checkpoint that the training started from: its digest, else its file; None if it is not recorded."""
    start = record['training'].get('start')
    return (start['sha256'] or start['file']) if start else None


def starts_of(record: Record) -> list[str]:
    """The checkpoint that the training started from, that from which that one was trained, and so on."""
    found, start = [], record['training'].get('start')
    while isinstance(start, Mapping):
        found.append(str(start.get('sha256') or start.get('file')))
        start = start.get('start')
    return found


def extras_of(record: Record) -> dict[str, Any]:
    """Settings of a quantized record that decide its result and are in no column: of calibration and distillation."""
    quantization = record['quantization'] or {}
    found = {'calibration batches': quantization.get('calibration_batches', 8)}
    teacher = (quantization.get('distill') or {}).get('teacher')
    return found | ({'teacher': teacher} if teacher else {})


def checkpoint_of(record: Record) -> str:
    """The checkpoint that was tested: its digest, else its file."""
    return record['checkpoint']['sha256'] or record['checkpoint']['file']


def file_of(record: Record) -> str:
    """What a message calls a record: its file, else that of its checkpoint."""
    return record.get('path') or record['checkpoint']['file']
