"""Fixtures of the floors that need OpenMMLab: small data, small runs, tools in processes of their own."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.dataset import base_dataset
from mmengine.runner import runner as mmengine_runner
from yapf.yapflib import yapf_api

from gdrq_mm.data import digits
from gdrq_mm.openmmlab.cli import ending
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.exports import LONGER, export_whole
from tests.helpers import ENV
from tests.runs import COUNTS, SCENES, checkpoint_of, tiny_config, tool_function

TOLD = 'ONNX export needs torch 2.8 or newer'
# What mmengine does for every run and no test looks at: a third of the time of a small one. It formats the config, asks
# compilers and drivers for their versions, and collects garbage for every data set.
yapf_api.FormatCode = lambda text, style_config: (text, True)
mmengine_runner.collect_env = functools.cache(mmengine_runner.collect_env)
base_dataset.gc = SimpleNamespace(collect=lambda: None)


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """The embedded data set with a few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', COUNTS)
        return digits.build(tmp_path_factory.mktemp('data') / 'digits', show_progress=False)


@pytest.fixture(scope='session')
def scenes_root(tmp_path_factory):
    """The embedded data set with a few pictures for each task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', SCENES)
        return digits.build(tmp_path_factory.mktemp('scenes') / 'digits', show_progress=False)


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """Runs a tool in tmp_path; returns the line that it ends with, of a process with exit code 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')

    def error_of(*args):
        monkeypatch.setattr(sys, 'argv', [str(arg) for arg in args])
        message = ending(tool_function(Path(sys.argv[0]).name))
        assert isinstance(message, str) and message.startswith('error: ') and '\n' not in message
        return message

    return error_of


@pytest.fixture(
    scope='session', params=['cls', 'yolox', *(pytest.param(each, marks=pytest.mark.full) for each in LONGER)]
)
def whole(request, tmp_path_factory):
    """An exported model, see export_whole()."""
    return export_whole(request.param, tmp_path_factory.mktemp(request.param))


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


# Importing the libraries and asking for versions takes 5 s: one process does it once and forks for each command. What
# the command does, its exit code and its output are those of `python TOOL ARGS`. A command can have several processes,
# each with variables and output of its own. One that hangs ends after five minutes and says where.
SERVER = """
import faulthandler, functools, gc, json, os, runpy, sys
import mmengine.runner.runner as runner
from yapf.yapflib import yapf_api
import mmpretrain.datasets, mmpretrain.engine, mmpretrain.evaluation, mmpretrain.models
import gdrq_mm.data.cifar10, gdrq_mm.data.digits, gdrq_mm.report.record, gdrq_mm.openmmlab.runner
runner.collect_env = functools.cache(runner.collect_env)
runner.collect_env()
yapf_api.FormatCode = lambda text, style_config: (text, True)
gc.freeze()
print('ready', flush=True)
for line in sys.stdin:
    sys.argv, folder, processes = json.loads(line)
    children = []
    for outputs, variables in processes:
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            os.environ.update(variables)
            sys.path[0] = os.path.dirname(sys.argv[0])
            for number, name in enumerate(outputs, 1):
                os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            faulthandler.dump_traceback_later(300, exit=True)
            runpy.run_path(sys.argv[0], run_name='__main__')
            sys.exit()
        children.append(child)
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


@pytest.fixture(scope='session')
def run_in(tmp_path_factory):
    """Runs a tool in a folder as one process for each dict of environment variables."""
    output = tmp_path_factory.mktemp('output')

    def run_in(folder, variables, tool, *args):
        command = [str(part) for part in (tool, *args)]
        outputs = [[str(output / f'{name}{i}') for name in ('stdout', 'stderr')] for i in range(len(variables))]
        server.stdin.write(json.dumps([command, str(folder), list(zip(outputs, variables))]) + '\n')
        server.stdin.flush()
        codes = map(int, server.stdout.readline().split())
        texts = [[Path(path).read_text() for path in paths] for paths in outputs]
        if any(TOLD in text for each in texts for text in each):  # as in this process, see conftest.py
            pytest.skip(TOLD)
        return [subprocess.CompletedProcess(command, code, *text) for code, text in zip(codes, texts)]

    command = [sys.executable, '-c', SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV) as server:
        while (line := server.stdout.readline()) != 'ready\n':  # the libraries print while they are imported
            assert line, 'the server ended'
        yield run_in
        # Not by closing its input, which forked processes may hold open: mmdet's VOCMetric makes a pool for each
        # evaluation and closes it only; if the pool is deleted by its own thread, its processes stay (CPython 3.11).
        server.kill()


@pytest.fixture
def run_all(run_in, tmp_path):
    """Does so in tmp_path."""
    return functools.partial(run_in, tmp_path)


@pytest.fixture
def run(run_all):
    """Runs a tool in tmp_path."""
    return lambda tool, *args: run_all([{}], tool, *args)[0]
