"""Build and load the C++ operators of native.cpp.

They are compiled once for this torch, compiler and CPU, in about 20 seconds, into the user's cache folder. Where that
is impossible the torch code of reference.py computes the same, and a warning says so once. GDRQ_KERNELS=off leaves them
out.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ..compat import compiler_flags
from ..errors import UserError

SOURCE = Path(__file__).with_name('native.cpp')
FLAGS = '-std=c++20 -O3 -g0 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math -march=native'
"""Loops are vectorized for this CPU, and results stay those of the source, to the last bit: no fused multiply-add.
CXXFLAGS are added, as by other builds."""


@functools.cache
def operators() -> Any:
    """The namespace of the operators, or None where they are switched off or cannot be built."""
    if switch() == 'off':
        return None
    try:
        torch.ops.load_library(str(library()))
    except (OSError, RuntimeError) as error:
        warnings.warn(f'the torch code runs in place of the faster kernels: {error}', stacklevel=2)
        return None
    return torch.ops.gdrq_mm


def switch() -> str:
    """GDRQ_KERNELS: 'on' or 'off'."""
    value = os.environ.get('GDRQ_KERNELS', 'on')
    if value not in ('on', 'off'):
        raise UserError(f'GDRQ_KERNELS={value}: choose on or off')
    return value


def description() -> str:
    """What computes fake quantization on the CPU, for logs."""
    return 'C++' if operators() is not None else 'torch'


def library() -> Path:
    """The compiled library; compiles it if it is not in the cache.

    Raises:
        RuntimeError: it cannot be compiled.
        OSError: the cache folder cannot be written.
    """
    if sys.platform != 'linux':
        raise RuntimeError('only Linux is tested')
    command = shlex.split(os.environ.get('CXX', 'g++')) or ['g++']  # "ccache g++" is a command too
    if shutil.which(command[0]) is None:
        raise RuntimeError(f'there is no C++ compiler {command[0]}')
    compiler = subprocess.run([*command, '--version'], capture_output=True, text=True).stdout.partition('\n')[0]
    flags = [*FLAGS.split(), *compiler_flags(), *os.environ.get('CXXFLAGS', '').split()]
    parts = SOURCE.read_text(), flags, torch.__version__, compiler, _cpu(), str(Path(torch.__file__).parent)
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'gdrq_mm' / 'kernels'
    path = folder / f'{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so'
    if path.exists():  # the folder may be one that this user cannot write
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a training wait for the first
        if not path.exists():
            _compile(command, flags, path)
    return path


def _compile(command: list[str], flags: list[str], path: Path) -> None:
    """Compile to `path`; what failed before is not tried again."""
    log, root = path.with_suffix('.log'), Path(torch.__file__).parent
    if not log.exists():
        print('Compiling kernels for this CPU, once: about 20 seconds.', file=sys.stderr, flush=True)
        places = [f'-I{root / "include"}', f'-I{root / "include/torch/csrc/api/include"}']
        libraries = [f'-L{root / "lib"}', f'-Wl,-rpath,{root / "lib"}', '-lc10', '-ltorch_cpu']
        code, temporary = path.with_suffix('.o'), path.with_suffix('.tmp')
        steps = (
            [*command, *flags, *places, '-c', str(SOURCE), '-o', str(code)],
            # Without -fopenmp: the threads are those of torch, which brings its own library for them.
            [*command, '-shared', str(code), *libraries, '-o', str(temporary)],
        )
        for arguments in steps:
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                break
        code.unlink(missing_ok=True)
        if done.returncode == 0:
            temporary.replace(path)
            return
        log.write_text(done.stdout + done.stderr)
    raise RuntimeError(f'they do not compile; the messages of the compiler are in {log}, delete it to try again')


def _cpu() -> str:
    """The instructions of this CPU: a library for another one may crash."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(('flags', 'Features'))), '')
