"""The commands: `gdrq NAME`, `python -m gdrq_mm NAME`, and for most of them a script in tools/.

A command is a module here whose docstring is its help and whose `main()` reads the arguments from sys.argv. A new one
needs its line in COMMANDS.
"""

from __future__ import annotations

import ast
import difflib
import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..core.errors import UserError, command, extras_named, of_machine

COMMANDS = {
    'train': True,
    'test': True,
    'infer': True,
    'export': True,
    'calibrate': True,
    'analyze': True,
    'allocate': True,
    'sweep': True,
    'compare': False,
    'benchmark': False,
    'data': False,
    'quickstart': True,
    'doctor': False,
}
"""Name -> whether it needs OpenMMLab."""


def main(name: str | None = None) -> NoReturn:
    """Run a command and end the process.

    Args:
        name: the command; by default the first argument names it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # where the locale is not UTF-8
    if name is None:
        first = sys.argv[1] if len(sys.argv) > 1 else '--help'
        if first in ('-h', '--help', 'help'):
            print(_overview())
            sys.exit()
        if first == '--version':
            print(f'gdrq_mm {__version__}')
            sys.exit()
        if first not in COMMANDS:
            near = difflib.get_close_matches(first, COMMANDS, n=1, cutoff=0.4)
            sys.exit(f'error: gdrq {first}: choose one of {", ".join(COMMANDS)}' + f'; nearest: {near[0]}' * bool(near))
        name = first
        sys.argv = [f'gdrq {name}', *sys.argv[2:]]
    try:
        with extras_named():
            function = import_module(f'{__name__}.{name}').main
    except UserError as error:
        sys.exit(f'error: {error}')
    except ModuleNotFoundError as error:
        sys.exit(f'error: {_needs(name, error)}')
    if COMMANDS[name]:
        from ..openmmlab.cli import main as run

        run(function)
    sys.exit(_ending(function))


def _ending(function: Callable[[], None]) -> str | int:
    """What sys.exit takes when a command without OpenMMLab has run, as gdrq_mm.openmmlab.cli.ending for the others."""
    try:
        with extras_named():
            function()
    except UserError as error:
        return f'error: {error}'
    except OSError as error:
        if not of_machine(error):
            raise
        return f'error: {of_machine(error)}'
    except KeyboardInterrupt:
        return 'interrupted'
    return os.EX_OK


def _needs(name: str, error: ModuleNotFoundError) -> str:
    """One line about a package that a command imports and that is not installed; a module of ours is a bug.

    Raises:
        ModuleNotFoundError: the error itself, if it is a bug.
    """
    package = (error.name or '').partition('.')[0]
    if package in ('', 'gdrq_mm'):
        raise error
    return f'{command(name)} needs {package}, which is not installed; {command("doctor")} tells how to install it'


def _overview() -> str:
    """What there is to run: a line for each command, the first of its docstring."""
    lines = ['usage: gdrq COMMAND ... (gdrq COMMAND --help tells its options)', '']
    for name in COMMANDS:
        text = (Path(__file__).with_name(f'{name}.py')).read_text(encoding='utf-8')
        lines.append(f'  {name:<11}{(ast.get_docstring(ast.parse(text)) or "").splitlines()[0]}')
    return '\n'.join(lines)
