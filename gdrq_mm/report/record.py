"""The run record: one JSON file that says what was tested, with what, and what came out."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError, command
from ..core.files import write_whole

VERSION = 2
"""Version of the record's layout."""

RUNTIMES = ('onnxruntime', 'openvino')
"""Packages that run exported graphs; any other record is of a model that torch ran."""

MAIN_METRICS = {
    'cls': {
        'accuracy/top1': ('top-1', 1),
        'multi-label/mAP': ('mAP', 1),
        'retrieval/Recall@1': ('recall@1', 1),
        'retrieval/mAP@1': ('mAP@1', 1),
    },
    'det': {
        'coco/bbox_mAP': ('box AP', 100),
        'coco/segm_mAP': ('mask AP', 100),
        'pascal_voc/mAP': ('VOC mAP', 100),
        'lvis/bbox_AP': ('LVIS box AP', 100),
        'lvis/segm_AP': ('LVIS mask AP', 100),
        'coco_panoptic/PQ': ('PQ', 1),
        'cityscapes/mAP': ('Cityscapes mask AP', 100),
        'openimages/mAP': ('OpenImages mAP', 100),
        'crowd_human/mAP': ('CrowdHuman AP', 100),
    },
    'seg': {'mIoU': ('mIoU', 1)},
}
"""Task -> metrics that have a row each in tables: key -> title, and the factor that makes it a percentage. More is
better for all of them."""
OTHER_METRICS = {
    'cls': {
        'accuracy/top5': ('top-5', 1),
        'single-label/f1-score': ('F1', 1),
        'multi-label/f1-score': ('F1', 1),
        'retrieval/Recall@5': ('recall@5', 1),
    },
    'det': {
        'coco/AR@100': ('AR@100', 100),
        'coco/bbox_mAP_50': ('box AP50', 100),
        'coco/segm_mAP_50': ('mask AP50', 100),
    },
    'seg': {'mDice': ('mDice', 1), 'mFscore': ('mFscore', 1), 'aAcc': ('pixel accuracy', 1)},
}
"""Where a record has none of MAIN_METRICS, tables show the first of these that it has."""

NONE = type(None)
NUMBER = (int, float)
FILE = {'file': (str, NONE), 'sha256': (str, NONE)}
REQUIRED = {
    'task': tuple(MAIN_METRICS),
    'model': {
        'name': str,
        'config_sha256': str,
        'methods': [str, str],
        'options': {},
        'bits': [int, int],
        'deployable': (bool, NONE),
        **dict.fromkeys(('float_bytes', 'bytes', 'bit_operations'), NUMBER),
    },
    'data': {'name': str, 'evaluation_sha256': str},
    'metrics': {},
    'quantization': (dict, NONE),
    'checkpoint': FILE,
    'training': {'seed': (int, NONE)},
}
"""What a comparison needs of a record, key by key: a type or several, a tuple of the allowed strings, a list with the
type of each entry, or a dict of further keys."""
OPTIONAL = {
    'model.backend': ('torch', *RUNTIMES),
    'model.parts': bool,
    'training.start': FILE,
    'training.epoch': NUMBER,
    'training.iter': NUMBER,
    'training.recipe': {},
    'training.changed': list,
    'quantization.schedule': {},
    'quantization.distill': {},
    'cell': str,
    'checkpoints': list,
    'config.file': str,
    'git': {},
    'hardware': {},
    'hardware.gpus': list,
    'versions': {},
}
"""What a record may leave out or set to None, and what it has to be otherwise."""


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record whole or not at all."""
    write_whole(path, (json.dumps(plain(record), indent=1, allow_nan=False) + '\n').encode())


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: it is not JSON, not a record of this version, or lacks what a comparison needs.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'record {path} cannot be read: {error}') from None
    found = record.get('record_version') if isinstance(record, dict) else None
    if found != VERSION:
        raise UserError(f'{path} is not a run record of version {VERSION} (record_version={found!r})')
    try:
        record = _checked(_printable(record), REQUIRED)
        for place, expected in OPTIONAL.items():
            _check_optional(record, place.split('.'), expected, place)
    except ValueError as error:
        raise UserError(f'record {path} cannot be used: {error}') from None
    return record


def _check_optional(record: dict[str, Any], keys: list[str], expected: Any, place: str) -> None:
    for key in keys[:-1]:
        inner = record.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(f'{key} is a {type(inner).__name__}, not a dict')
        record = inner or {}
    if record.get(keys[-1]) is not None:
        record[keys[-1]] = _checked(record[keys[-1]], expected, place)


def _checked(value: Any, expected: Any, place: str = '') -> Any:
    """A value that is as expected, see REQUIRED; a number that is written as a string becomes a number.

    Raises:
        ValueError: says the first place where it is not, and how.
    """
    if isinstance(expected, dict):
        if not isinstance(value, dict):
            raise ValueError(f'{place} is a {type(value).__name__}, not a dict')
        for key, inner in expected.items():
            where = f'{place}.{key}' if place else key
            if key not in value:
                raise ValueError(f'{where} is missing')
            value[key] = _checked(value[key], inner, where)
        return value
    if isinstance(expected, list):
        if not isinstance(value, list) or len(value) != len(expected):
            raise ValueError(f'{place} is not a list of {len(expected)}')
        return [_checked(v, e, place) for v, e in zip(value, expected)]
    types = expected if isinstance(expected, tuple) else (expected,)
    if not all(isinstance(t, type) for t in types):
        if value not in types:
            raise ValueError(f'{place}={value!r} is not one of {", ".join(types)}')
        return value
    number = as_number(value) if isinstance(value, str) and int in types and str not in types else None
    if number is not None and isinstance(number, types):
        return number
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError(f'{place} is a {type(value).__name__}')
    return value


def as_number(value: Any) -> int | float | None:
    """A number, also one that is written as a string; None for anything else."""
    if isinstance(value, (int, float)):
        return value
    for kind in (int, float):
        with suppress(ValueError, TypeError):
            return kind(value)
    return None


def plain(value: Any) -> Any:
    """A value as what JSON can hold: numbers, strings, None, lists and dicts; anything else as its text.

    JSON has no nan and no inf, such as the IoU of a class without pixels: 'nan' and 'inf' are read back as numbers.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, (np.ndarray, np.generic)) or _is_tensor(value):
        return plain(value.tolist())
    if callable(value):
        return f'{getattr(value, "__module__", "")}.{getattr(value, "__qualname__", type(value).__name__)}'
    return str(value)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get('torch')  # a program that has not imported it has no tensors
    return torch is not None and isinstance(value, torch.Tensor)


def _printable(value: Any) -> Any:
    """A value read from JSON in which every string can be written as UTF-8: a lone surrogate becomes its escape."""
    if isinstance(value, str):
        return value.encode('utf-8', 'backslashreplace').decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list) else value


def find_records(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records in files and in folders at any depth, each with its `path`.

    Raises:
        UserError: a path does not exist, a folder has no record, or a file is not a record.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'{path} does not exist')
        files = [path] if path.is_file() else sorted(filter(_looks_like_one, _json_files(path)))
        if not files:
            raise UserError(f'{path} has no run record; {command("test")} writes one')
        records += [{**read_record(file), 'path': str(file)} for file in files]
    return records


def _json_files(folder: Path) -> Iterator[Path]:
    """The JSON files in a folder at any depth, each folder once; links to folders on another disk are followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        yield from (Path(place, name) for name in names if name.endswith('.json'))


def _looks_like_one(file: Path) -> bool:
    """Whether a file may be a record: a work directory has other JSON files, such as mmengine's scalars."""
    if not file.is_file() or file.name == 'record.json':
        return file.is_file()
    try:
        with open(file, 'rb') as opened:
            return b'"record_version"' in opened.read(200)
    except OSError:
        return False
