"""The four floors: who may import whom, what stays importable without OpenMMLab and ONNX, where tests belong."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import ENV, ROOT

PACKAGE = ROOT / 'gdrq_mm'
FLOORS = {
    'core': {'core'},
    'deploy': {'core', 'deploy'},
    'report': {'core', 'report'},
    'data': {'core', 'data'},
    'plain': {'core', 'deploy', 'report'},
    'openmmlab': {'core', 'deploy', 'report', 'data', 'openmmlab'},
    'commands': {'core', 'deploy', 'report', 'data', 'openmmlab', 'commands'},
    '__main__': {'commands'},
}
"""Room of the package -> the rooms that it may import."""
CONSTANTS = {'__version__', 'CONFIGS'}
"""Of the package itself: any room may have them."""
OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
RUNTIMES = {'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'openvino'}


def imports_of(path):
    """Absolute names of what a file imports, at whatever depth."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[: len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, [base, node.module]))
            yield from (f'{module}.{alias.name}' for alias in node.names)


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)


@pytest.mark.parametrize('file', FILES)
def test_a_file_imports_only_the_floors_below_it(file):
    room = file.split('/')[0].removesuffix('.py')
    for name in imports_of(PACKAGE / file):
        top, *below = name.split('.')
        if top == 'gdrq_mm' and room in FLOORS:
            assert below[0] in FLOORS[room] | CONSTANTS, f'{file} imports {name}'
        if room not in ('openmmlab', 'commands'):
            assert top not in OPENMMLAB, f'{file} imports {name}'
        if room == 'core':
            assert top not in RUNTIMES, f'{file} imports {name}'


def test_every_room_has_its_rule():
    assert {file.split('/')[0].removesuffix('.py') for file in FILES} == {*FLOORS, '__init__'}


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""


def run(program, blocked=frozenset()):
    command = [sys.executable, '-c', BLOCK.format(blocked=set(blocked)) + program]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    'module, blocked',
    [
        ('gdrq_mm', OPENMMLAB | RUNTIMES),
        ('gdrq_mm.core', OPENMMLAB | RUNTIMES),
        ('gdrq_mm.core.convert, gdrq_mm.core.calibrate, gdrq_mm.core.step, gdrq_mm.plain', OPENMMLAB | RUNTIMES),
        ('gdrq_mm.deploy, gdrq_mm.deploy.merge, gdrq_mm.deploy.from_packed', OPENMMLAB | RUNTIMES),
        ('gdrq_mm.deploy.export', OPENMMLAB),
        ('gdrq_mm.deploy.measure, gdrq_mm.deploy.float_twin, gdrq_mm.report.record', OPENMMLAB | {'torch'}),
        ('gdrq_mm.report.record, gdrq_mm.report.html, gdrq_mm.data.digits', OPENMMLAB | RUNTIMES),
    ],
)
def test_importable_without_what_it_does_not_need(module, blocked):
    run(f'import {module}', blocked)


def test_the_door_needs_torch_alone_until_it_exports():
    program = """
import torch, gdrq_mm as gq
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten(),
    torch.nn.Linear(64, 2))
x = torch.randn(8, 3, 8, 8)
gq.quantize(model, 'w4a4', example=x)
gq.calibrate(model, [x])
gq.after_step(model)
gq.freeze(model)
print(sorted(name for name in sys.modules if name.split('.')[0] in ('onnx', 'mmengine')))
"""
    assert run(program, OPENMMLAB).splitlines()[-1] == '[]'


TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'tests').rglob('*.py'))
INNER = [file for file in TESTS if file.startswith(('tests/core/', 'tests/deploy/'))]


@pytest.mark.parametrize('file', [*INNER, 'tests/helpers.py', 'tests/conftest.py'])
def test_the_inner_ring_of_tests_needs_no_openmmlab(file):
    for name in imports_of(ROOT / file):
        top, *below = name.split('.')
        outer = (top == 'gdrq_mm' and below[:1] == ['openmmlab']) or name.startswith(('tests.runs', 'tests.stock'))
        assert top not in OPENMMLAB and not outer, f'{file} imports {name}'


@pytest.mark.parametrize(
    'file', sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'tests').rglob('test_*.py'))
)
def test_no_test_module_imports_another_and_none_is_long(file):
    path = ROOT / file
    modules = [name for name in imports_of(path) if any(part.startswith('test_') for part in name.split('.')[:-1])]
    assert not modules and len(path.read_text().splitlines()) <= 500
