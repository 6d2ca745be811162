"""The exceptions that users see as a message, without a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
"""The scripts of the commands, in a checkout."""
SCRIPTS = {'compare': 'compare_results', 'data': 'prepare_data'}
"""Command -> its script, where that has another name."""


EXTRAS = {
    'deploy': {
        'onnx': 'onnx',
        'onnx-ir': 'onnx_ir',
        'onnxscript': 'onnxscript',
        'safetensors': 'safetensors',
        'onnxruntime': 'onnxruntime',
        'openvino': 'openvino',
    },
    'report': {'matplotlib': 'matplotlib', 'jinja2': 'jinja2', 'pillow': 'PIL'},
}
"""Extra of the package -> package -> module; pyproject.toml has the same."""
ONNX_SINCE = (2, 8)
"""The first torch that exports what our graphs are made of: Dim.DYNAMIC is of 2.6, torch.onnx.ops of 2.8."""


class UserError(ValueError):
    """Something in a config, checkpoint, data folder or command line that its author can mend.

    The message is one line: what is wrong, with its value, and what is allowed. A command prints it and exits with 1.
    """


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
"""What the machine says where a disk is full or something may not be read or written; no bug ends so."""


def of_machine(error: OSError) -> str:
    """What the machine refused, as one line; '' if the exception may as well be a bug."""
    place = f'{error.filename}: ' if error.filename else ''
    return f'{place}{error.strerror}' if error.errno in MACHINE else ''


def command(name: str) -> str:
    """A command as the user calls it, for messages: `python tools/train.py` in such a script, else `gdrq train`.

    Args:
        name: as in `gdrq NAME`.
    """
    running = Path(sys.argv[0])
    script = f'{SCRIPTS.get(name, name)}.py'
    if '.mim' in running.parts or running.resolve().parent != TOOLS or not (TOOLS / script).exists():
        return f'gdrq {name}'
    return f'python tools/{script}'


@contextmanager
def extras_named() -> Iterator[None]:
    """Inside, a package of EXTRAS that is not installed is a UserError with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in EXTRAS.items():
            if (error.name or '').partition('.')[0] in packages.values():
                raise UserError(f"{error.name} is not installed: uv pip install 'gdrq-mm[{extra}]'") from error
        raise


def check_least(options: Any, **least: int) -> None:
    """Refuse options of a command line, numbers or lists of them, below the least value of each."""
    for name, value in least.items():
        given = getattr(options, name)
        for each in given if isinstance(given, list) else [given]:
            if each is not None and each < value:
                raise UserError(f'--{name} {each} is less than {value}')


class Stopped(Exception):
    """Training was asked to end, has saved a checkpoint and can be resumed. A command prints it and exits with 75."""
