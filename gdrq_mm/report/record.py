"""The run record: one JSON file that says what was tested, with what, and what came out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.files import write_whole

VERSION = 2
"""Version of the record's layout."""

RUNTIMES = ('onnxruntime', 'openvino')
"""What runs exported graphs, by the names of the packages; the others are run by torch."""

PACKAGES = (
    'gdrq-mm',
    'torch',
    'torchvision',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmdetection',
    'onedl-mmsegmentation',
    'onedl-mmpretrain',
    'numpy',
)

MAIN_METRICS = {
    'cls': {'accuracy/top1': ('top-1', 1)},
    'det': {'coco/bbox_mAP': ('box AP', 100), 'pascal_voc/mAP': ('VOC mAP', 100)},
    'seg': {'mIoU': ('mIoU', 1)},
}
"""Task -> keys of the metrics that tables show, with a title and the factor that makes it a percentage."""

NUMBER = (int, float)
FILE = {'file': (str, type(None)), 'sha256': (str, type(None))}
SHAPE = {
    'task': tuple(MAIN_METRICS),
    'model': {
        'name': str,
        'config_sha256': str,
        'methods': [str, str],
        'options': {},
        'bits': [int, int],
        'deployable': (bool, type(None)),
        **dict.fromkeys(('float_bytes', 'bytes', 'bit_operations'), NUMBER),
    },
    'data': {'name': str, 'evaluation_sha256': str},
    'metrics': {},
    'quantization': (dict, type(None)),
    'checkpoint': FILE,
    'training': {'seed': (int, type(None))},
}
"""What a comparison needs of a record: types, the choices of a value, or the keys of a dict, which may have more."""
OPTIONAL = {
    'model.backend': ('torch', *RUNTIMES),
    'training.start': FILE,
    'config.file': str,
    'git': {},
    'hardware': {},
    'hardware.gpus': list,
    'versions': {},
}
"""What is looked at if it is there and not None."""


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record whole or not at all."""
    write_whole(path, (json.dumps(record, indent=1) + '\n').encode())


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        UserError: not JSON, not a record, a record of another version, or without what a comparison needs.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'record {path} cannot be read: {error}') from None
    found = record.get('record_version') if isinstance(record, dict) else None
    if found != VERSION:
        raise UserError(f'{path} is not a run record of version {VERSION} (record_version={found!r})')
    wrong = _misfit(record, SHAPE)
    for key, value in {} if wrong else record['metrics'].items():
        wrong = wrong or _misfit(value, NUMBER, f'metrics[{key!r}]')
    for place, shape in OPTIONAL.items():
        value = record
        for key in place.split('.'):
            value = value.get(key) if isinstance(value, dict) else value
        wrong = wrong or ('' if value is None else _misfit(value, shape, place))
    if wrong:
        raise UserError(f'record {path} cannot be used: {wrong}')
    return record


def _misfit(value: Any, shape: Any, place: str = '') -> str:
    """Where plain data do not have a shape (see SHAPE); '' if they have it."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f'{place} is a {type(value).__name__}, not a dict'
        for key, inner in shape.items():
            where = f'{place}.{key}' if place else key
            wrong = _misfit(value[key], inner, where) if key in value else f'{where} is missing'
            if wrong:
                return wrong
        return ''
    if isinstance(shape, list):
        if not isinstance(value, list) or len(value) != len(shape):
            return f'{place} is not a list of {len(shape)}'
        return next(filter(None, (_misfit(v, s, place) for v, s in zip(value, shape))), '')
    types = shape if isinstance(shape, tuple) else (shape,)
    if isinstance(shape, type) or all(isinstance(t, type) for t in types):
        return '' if isinstance(value, types) else f'{place} is a {type(value).__name__}'
    return '' if value in list(shape) else f'{place}={value!r} is not one of {", ".join(shape)}'


def find_records(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records of files and of folders, at any depth, each with its `path`.

    Raises:
        UserError: a path does not exist, a folder has no record, a file is none.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'{path} does not exist')
        files = [path] if path.is_file() else [f for f in sorted(path.rglob('*.json')) if _looks_like_one(f)]
        if not files:
            raise UserError(f'{path} has no run record; tools/test.py writes one')
        records += [{**read_record(file), 'path': str(file)} for file in files]
    return records


def _looks_like_one(file: Path) -> bool:
    """Other JSON files lie in work directories: mmengine's scalars, predictions."""
    return file.name == 'record.json' or b'"record_version"' in file.read_bytes()[:200]


def git_revision() -> dict[str, Any]:
    """Commit of the package's checkout and whether it has uncommitted changes; None outside a checkout."""

    def git(*args: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return dict(commit=git('rev-parse', 'HEAD'), dirty=bool(git('status', '--porcelain', '--untracked-files=no')))
    except (OSError, subprocess.CalledProcessError):
        return dict(commit=None, dirty=None)


def provenance() -> dict[str, Any]:
    """When, with what and on what something was measured."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    return dict(date=now, versions=versions(), hardware=hardware(), git=git_revision())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result."""
    found: dict[str, str | None] = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of torch, and accelerator."""
    name = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next((line.split(':', 1)[1].strip() for line in file if line.startswith('model name')), name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return dict(cpu=name or platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(), gpus=gpus)
