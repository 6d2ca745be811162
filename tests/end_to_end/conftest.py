"""What the tests of tools/ share: data, a trained model, and a tool that has to fail."""

import subprocess
import sys

import pytest

from tests.helpers import ENV
from tests.tools import PREPARE, TINY, TRAIN, W4A4


@pytest.fixture
def error_of(run, tmp_path):
    """Runs a tool that has to fail; returns its one line. Besides logs it may write nothing."""

    def error_of(tool, *args):
        before = set(tmp_path.rglob('*'))
        done = run(tool, *args)
        assert done.returncode != 0
        assert 'Traceback' not in done.stdout + done.stderr, done.stderr
        assert done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1, done.stderr
        new = [p for p in tmp_path.rglob('*') if p.is_file() and p not in before]
        assert [p for p in new if p.suffix not in ('.log', '.json', '.py') or p.name == 'record.json'] == []
        return done.stderr

    return error_of


@pytest.fixture(scope='session')
def data(tmp_path_factory, run_in):
    """The folder that holds data/digits."""
    folder = tmp_path_factory.mktemp('digits')
    (done,) = run_in(folder, [{}], PREPARE, 'digits')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def home(tmp_path, data):
    """tmp_path with the digits."""
    (tmp_path / 'data').symlink_to(data / 'data')
    return tmp_path


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data):
    """Work directory of a quantized model, trained by tools/train.py for an epoch."""
    folder = tmp_path_factory.mktemp('trained')
    command = [sys.executable, TRAIN, W4A4, '--work-dir', folder, '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=data, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return folder


@pytest.fixture
def leaf(tmp_path):
    """Writes a config that inherits the W4A4 one."""

    def leaf(text):
        path = tmp_path / 'leaf.py'
        path.write_text(f'_base_ = {str(W4A4)!r}\n{text}\n')
        return path

    return leaf
