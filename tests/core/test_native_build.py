"""Building the kernels: without a compiler, with one that fails, for another torch or CPU; and switched off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.kernels import native
from tests.helpers import ROOT

PROGRAM = """
import torch
from gdrq_mm.core import functional as F
from gdrq_mm.core.kernels import native
for _ in range(2):
    out = F.fake_quantize(torch.tensor([-0.9, 0.2, 0.26, 3.0]), torch.tensor(0.5), -1, 1)
print(native.description(), out.tolist())
"""
ANSWER = '[-0.5, 0.0, 0.5, 0.5]'


def program(cache, text=PROGRAM, **environment):
    """Run a program that quantizes, with an empty cache; its output and messages."""
    environment = {**os.environ, 'XDG_CACHE_HOME': str(cache), 'PYTHONPATH': str(ROOT), **environment}
    done = subprocess.run([sys.executable, '-c', text], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr


def script(path, text):
    """An executable file."""
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return str(path)


def writes(path):
    """A compiler that writes an empty library."""
    return script(path, 'while [ "$1" != -o ]; do shift || exit 0; done; : > "$2"')


def test_without_a_compiler_the_torch_code_runs_and_says_so_once(tmp_path):
    code, out, messages = program(tmp_path, CXX='no-such-compiler')
    assert (code, out) == (0, f'torch {ANSWER}')
    assert messages.count('the torch code runs in place of the faster kernels') == 1
    assert 'there is no C++ compiler no-such-compiler' in messages


def test_a_compiler_that_fails_is_asked_once(tmp_path):
    compiler = script(
        tmp_path / 'c++', f'[ "$1" = --version ] || {{ echo x >> {tmp_path}/calls; echo bad news; exit 1; }}'
    )
    for _ in range(2):
        code, out, messages = program(tmp_path, CXX=compiler)
        assert (code, out) == (0, f'torch {ANSWER}')
        assert messages.count('they do not compile; the messages of the compiler are in') == 1
    assert (tmp_path / 'calls').read_text() == 'x\n'
    (log,) = tmp_path.rglob('*.log')
    assert log.read_text() == 'bad news\n' and str(log) in messages


def test_a_library_that_does_not_load_is_no_end(tmp_path):
    code, out, messages = program(tmp_path, CXX=writes(tmp_path / 'c++'))
    assert (code, out) == (0, f'torch {ANSWER}') and 'faster kernels' in messages and '.so' in messages


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    code, out, messages = program(tmp_path / 'file', CXX=writes(tmp_path / 'c++'))
    assert (code, out) == (0, f'torch {ANSWER}') and 'faster kernels' in messages


def test_a_library_in_a_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', writes(tmp_path / 'c++'))
    found = native.library()
    lock = found.with_suffix('.lock')
    lock.unlink()
    lock.mkdir()  # root may write everywhere, but not into a folder
    assert native.library() == found


def test_a_compiler_may_be_a_command_with_options(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', f'{writes(tmp_path / "c++")} -m64 "-D X"')
    assert native.library().exists()


def test_another_torch_cpu_or_compiler_gets_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', writes(tmp_path / 'c++'))
    found = [native.library(), native.library()]
    assert found[0] == found[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, '__version__', '99.0')
        found.append(native.library())
    with monkeypatch.context() as patch:
        patch.setattr(native, '_cpu', lambda: 'another')
        found.append(native.library())
    monkeypatch.setenv('CXXFLAGS', '-O1')
    found.append(native.library())
    assert len(set(found)) == 4 and all(path.exists() for path in found)


def test_switched_off(tmp_path):
    code, out, messages = program(tmp_path, GDRQ_KERNELS='off')
    assert (code, out, messages) == (0, f'torch {ANSWER}', '') and not list(tmp_path.iterdir())


def test_a_switch_that_is_neither_on_nor_off(monkeypatch):
    monkeypatch.setenv('GDRQ_KERNELS', 'perhaps')
    with pytest.raises(UserError, match='GDRQ_KERNELS=perhaps: choose on or off'):
        native.switch()


def test_nobody_runs_a_library_that_is_half_written(tmp_path):
    """The compiler is killed while it writes: the next process compiles again."""
    compiler = script(
        tmp_path / 'c++', 'while [ "$1" != -o ]; do shift || exit 0; done; echo half > "$2"; kill -9 $PPID; sleep 5'
    )
    assert program(tmp_path, CXX=compiler)[0] == -9
    assert not list(tmp_path.rglob('*.so'))
    code, out, _ = program(tmp_path, CXX='no-such-compiler')
    assert (code, out) == (0, f'torch {ANSWER}')


@pytest.mark.full
def test_a_cpu_without_avx(tmp_path):
    """Built without AVX, AVX2 and AVX-512: nothing crashes, and all results are the same."""
    flags = dict(CXXFLAGS='-march=x86-64', XDG_CACHE_HOME=str(tmp_path))
    tests = str(Path(__file__).with_name('test_kernels.py'))
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', tests],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    (library,) = tmp_path.rglob('*.so')
    code = subprocess.run(['objdump', '-d', str(library)], capture_output=True, text=True).stdout
    assert '%xmm' in code and '%ymm' not in code and '%zmm' not in code
