"""What several test files share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gdrq_mm.datasets import digits
from gdrq_mm.runner import QuantRunner
from tests.helpers import COUNTS, ENV, checkpoint_of, tiny_config


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """The embedded data set with a few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', COUNTS)
        return digits.build(tmp_path_factory.mktemp('data') / 'digits', show_progress=False)


@pytest.fixture
def config(digits_root, tmp_path):
    """Makes the config of a small run below tmp_path: `config(name, **changes)`."""
    return lambda name='run', **changes: tiny_config(digits_root, tmp_path / name, **changes)


@pytest.fixture
def make(config):
    """Builds a QuantRunner for it."""
    return lambda name='run', **changes: QuantRunner.from_cfg(config(name, **changes))


@pytest.fixture(scope='session')
def float_checkpoint(digits_root, tmp_path_factory):
    """Path of a training checkpoint of the float model after one epoch."""
    folder = tmp_path_factory.mktemp('float')
    runner = QuantRunner.from_cfg(tiny_config(digits_root, folder, quantization=None, epochs=1))
    runner.train()
    return checkpoint_of(runner)


# Importing the libraries takes 4 s, so one process does it once and forks for each command. What the command does, its
# exit code and its output are those of `python TOOL ARGS`.
SERVER = """
import gc, json, os, runpy, sys
import mmpretrain.datasets, mmpretrain.engine, mmpretrain.evaluation, mmpretrain.models
import gdrq_mm.datasets.cifar10, gdrq_mm.datasets.digits, gdrq_mm.results.record, gdrq_mm.runner
gc.freeze()
print('ready', flush=True)
for line in sys.stdin:
    sys.argv, folder, outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, name in enumerate(outputs, 1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        runpy.run_path(sys.argv[0], run_name='__main__')
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope='session')
def server():
    command = [sys.executable, '-c', SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV) as process:
        while (line := process.stdout.readline()) != 'ready\n':  # the libraries print while they are imported
            assert line, 'the server ended'
        yield process
        process.stdin.close()


@pytest.fixture
def run(server, tmp_path, tmp_path_factory):
    """Runs a tool in tmp_path."""
    outputs = [str(path) for path in (tmp_path_factory.mktemp('output') / name for name in ('stdout', 'stderr'))]

    def run(tool, *args):
        command = [str(part) for part in (tool, *args)]
        server.stdin.write(json.dumps([command, str(tmp_path), outputs]) + '\n')
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(Path(path).read_text() for path in outputs))

    return run
