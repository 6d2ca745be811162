"""The command gdrq and the scripts of tools/: the same functions, and messages that name what the user has."""

import re
import subprocess
import sys

import pytest

from gdrq_mm.commands import COMMANDS, doctor
from gdrq_mm.core.errors import command
from tests.helpers import ENV, ROOT, UPSTREAM

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10 has none; this is the same, and pytest needs it there
    import tomli as tomllib

SCRIPTS = sorted((ROOT / 'tools').glob('*.py'))
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
WITHOUT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
from gdrq_mm.commands import main
sys.argv = ['gdrq', *{arguments!r}]
main()
"""
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


def gdrq(*arguments, blocked=(), path=None, **variables):
    """Runs the command where some packages cannot be imported; `path` is a folder in front of all others."""
    variables = {**ENV, **variables, **({} if path is None else {'PYTHONPATH': f'{path}:{ENV["PYTHONPATH"]}'})}
    program = WITHOUT.format(blocked=set(blocked), arguments=[*map(str, arguments)])
    return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=variables)


def test_the_overview_has_a_line_for_each_command():
    done = subprocess.run([sys.executable, '-m', 'gdrq_mm'], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert re.findall(r'^  (\w+) +\S', done.stdout, re.MULTILINE) == [*COMMANDS]
    modules = {path.stem for path in (ROOT / 'gdrq_mm/commands').glob('*.py')} - {'__init__'}
    assert modules == COMMANDS.keys()


def test_a_command_that_is_none_is_one_line():
    done = gdrq('trian')
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('error: gdrq trian: choose one of train, ') and done.stderr.endswith(
        'nearest: train\n'
    )
    assert gdrq('--version').stdout.startswith('gdrq_mm ')


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_a_command_and_messages_name_it(script, monkeypatch):
    (name,) = re.findall(r"^    main\('(\w+)'\)$", script.read_text(), re.MULTILINE)
    assert name in COMMANDS
    monkeypatch.setattr(sys, 'argv', [str(script)])
    assert command(name) == f'python tools/{script.name}'
    monkeypatch.setattr(sys, 'argv', [f'gdrq {name}'])
    assert command(name) == f'gdrq {name}'


def test_messages_name_gdrq_where_another_script_runs(monkeypatch, tmp_path):
    """Started by mim, or the script of another project that lies in a folder tools."""
    for script in (ROOT / 'gdrq_mm/.mim/tools/train.py', tmp_path / 'tools/train.py', 'train.py', ''):
        monkeypatch.setattr(sys, 'argv', [str(script)])
        assert command('export') == 'gdrq export'


def test_a_command_without_openmmlab(tmp_path):
    done = gdrq('train', 'config.py', blocked=OPENMMLAB)
    expected = 'error: gdrq train needs mmengine, which is not installed; gdrq doctor tells how to install it\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, '', expected)
    names = [name for name, needs in COMMANDS.items() if not needs]
    program = WITHOUT.format(blocked=set(OPENMMLAB), arguments=[]).partition('from gdrq_mm')[0]
    program += (
        f'from importlib import import_module\nfor name in {names}: import_module(f"gdrq_mm.commands.{{name}}").main'
    )
    assert subprocess.run([sys.executable, '-c', program], env=ENV).returncode == 0 and len(names) == 4
    done = gdrq('compare', tmp_path, blocked=OPENMMLAB)
    assert (done.returncode, done.stderr) == (1, f'error: {tmp_path} has no run record; gdrq test writes one\n')


def test_without_what_a_report_needs_there_are_tables(tmp_path):
    records = sorted((ROOT / 'docs/records/quickstart').glob('resnet18*.json'))
    done = gdrq('compare', *records, blocked=(*OPENMMLAB, 'matplotlib', 'jinja2', 'PIL'))
    assert done.returncode == 0 and 'W4A4' in done.stdout, done.stderr
    options = ('--html', tmp_path / 'report.html')
    done = gdrq('compare', *records, *options, blocked=(*OPENMMLAB, 'matplotlib', 'jinja2', 'PIL'))
    expected = r"error: \w+ is not installed: uv pip install 'gdrq-mm\[report\]'\n"
    assert done.returncode == 1 and re.fullmatch(expected, done.stderr), done.stderr


def test_where_the_locale_is_not_utf_8():
    records = sorted((ROOT / 'docs/records/quickstart').glob('resnet18*.json'))
    done = gdrq('compare', *records, blocked=OPENMMLAB, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert (done.returncode, done.stderr) == (0, '') and r'2.82\u21920.37' in done.stdout


def test_plain_torch_without_what_exports(tmp_path):
    """It saves and loads; what needs an extra names it."""
    program = """
import sys, torch, gdrq_mm as gq
from gdrq_mm.core.errors import UserError
build = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
model, x, folder = build(), torch.randn(2, 3, 8, 8), sys.argv[1]
gq.quantize(model, 'w4a4', example=x)
gq.calibrate(model, [x])
torch.save(gq.checkpoint(model), folder + '/model.pth')
gq.load(build(), folder + '/model.pth')
open(folder + '/packed', 'wb').write(bytes([9, *[0] * 7, 123]))
for act in (lambda: gq.export(model, x, folder + '/exported'), lambda: gq.load(build(), folder + '/packed')):
    try:
        act()
    except UserError as error:
        print(error)
"""
    blocker = WITHOUT.format(blocked={'onnx', 'safetensors', *OPENMMLAB}, arguments=[]).partition('from gdrq_mm')[0]
    command = [sys.executable, '-c', blocker + program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    expected = [f"{name} is not installed: uv pip install 'gdrq-mm[deploy]'" for name in ('onnx', 'safetensors')]
    assert done.stdout.splitlines()[-2:] == expected


# ---- gdrq doctor ----------------------------------------------------------------------------------------------------


def test_the_doctor_knows_what_the_package_asks_for():
    assert [re.split('[<>=]', name)[0] for name in PROJECT['dependencies']] == ['torch', 'numpy', 'rich']
    extras = {
        extra: [re.split('[<>=]', name)[0] for name in names]
        for extra, names in PROJECT['optional-dependencies'].items()
    }
    for extra, packages in doctor.EXTRAS.items():
        assert extras[extra] == [*packages]
    for line, extra in enumerate(('onedl', 'upstream')):
        assert {pair[line] for pair in doctor.OPENMMLAB.values()} <= {*extras[extra]}
    assert {name for needs in doctor.USES.values() for name in needs} <= {
        n for names in doctor.EXTRAS.values() for n in names
    }


def test_what_an_import_says(tmp_path, monkeypatch):
    (tmp_path / 'good.py').write_text('print("a library that prints")')
    (tmp_path / 'broken.py').write_text('raise ImportError("no operators")')
    (tmp_path / 'deadly.py').write_text('import os\nos.abort()')
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._imports(['good', 'deadly', 'broken', 'good'])
    assert found['good'] == 'fine' and found['broken'] == 'ImportError: no operators'
    assert re.fullmatch(r'its import ended the process \(-\d+\)', found['deadly'])


ONEDL_PACKAGES = {pair[0]: '1.0' for pair in doctor.OPENMMLAB.values()}
UPSTREAM_PACKAGES = {pair[1]: '1.0' for pair in doctor.OPENMMLAB.values()}
TORCH = dict(torch='2.13.0')


@pytest.mark.parametrize(
    ('stack', 'packages', 'failures', 'broken', 'mends'),
    [
        ('none', TORCH, {}, [], []),
        ('onedl', TORCH | ONEDL_PACKAGES, {}, [], []),
        ('upstream', TORCH | UPSTREAM_PACKAGES, {}, [], []),
        (
            'mixture',
            TORCH | ONEDL_PACKAGES | {'mmengine': '0.10.7'},
            {},
            ['both lines of OpenMMLab'],
            ['uv pip uninstall mmengine && uv pip install --reinstall --no-deps onedl-mmengine'],
        ),
        (
            'onedl',
            TORCH | dict([*ONEDL_PACKAGES.items()][:-1]),
            {},
            [],
            [],
        ),
        (
            'onedl',
            TORCH | dict([*ONEDL_PACKAGES.items()][:2]),
            {},
            ['onedl-mmdetection, onedl-mmsegmentation, onedl-mmpretrain not installed'],
            ["'gdrq-mm[onedl]'"],
        ),
        (
            'upstream',
            TORCH | UPSTREAM_PACKAGES,
            {'mmdet.models': 'AssertionError: MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4'},
            ['mmdet cannot be imported: AssertionError: MMCV==2.2.0'],
            ['--no-binary mmcv "mmcv>=2.1.0,<2.2.0"'],
        ),
        (
            'upstream',
            TORCH | UPSTREAM_PACKAGES,
            dict.fromkeys(['mmcv.ops', 'mmdet.models'], "ModuleNotFoundError: No module named 'mmcv._ext'"),
            ['mmcv cannot be imported: its operators were not built'],
            ['--no-build-isolation --reinstall-package mmcv --refresh-package mmcv --no-binary mmcv "mmcv>=2'],
        ),
        ('none', TORCH | dict(openvino='1'), {'openvino': 'OSError: x'}, ['openvino cannot'], ['--reinstall openvino']),
        ('none', dict(torch='1.13.1'), {}, ['torch 1.13.1: 2.1 is the oldest'], ['uv pip install -U torch']),
    ],
)
def test_a_problem_has_its_command(stack, packages, failures, broken, mends):
    found = doctor.Diagnosis(stack, packages, failures, [], '')
    found.problems = doctor._problems(found)
    assert len(found.problems) == len(broken)
    for (text, mend), one, other in zip(found.problems, broken, mends):
        assert one in text and other in mend
    rows = {row[0].partition(': ')[2]: row[1:] for row in doctor.abilities(found) if row[0].startswith('train,')}
    if stack == 'none':
        assert [row[0] for row in rows.values()] == ['needs OpenMMLab'] and all(row[1] for row in rows.values())
        return
    installed = {name for pair in doctor.OPENMMLAB.values() for name in pair if name in packages}
    for module, task in doctor.TASKS.items():
        library = doctor.OPENMMLAB[module][stack == 'upstream']
        wrong = 'mmcv.ops' in failures or module in failures or stack == 'mixture'
        expected = f'needs {library}' if library not in installed else 'see below' if wrong else ''
        assert rows[task] == (expected, f'uv pip install {library}' if expected.startswith('needs') else '')


def test_the_mmcv_that_is_asked_for_is_that_of_the_extra():
    assert f'"{doctor.MMCV["mmcv"]}",' in (ROOT / 'pyproject.toml').read_text()


def test_what_is_not_installed_has_its_extra():
    found = doctor.Diagnosis('none', TORCH | dict(onnx='1'), {}, [], '')
    rows = {row[0]: row[1:] for row in doctor.abilities(found)}
    assert rows['export to ONNX'] == ('needs onnx-ir, onnxscript', "uv pip install 'gdrq-mm[deploy]'")
    assert rows['compare records: HTML report'][1] == "uv pip install 'gdrq-mm[report]'"
    assert rows['quantize, calibrate and train in plain torch'] == ('', '')


def test_export_needs_a_newer_torch_than_training():
    onnx = dict.fromkeys(doctor.USES['export to ONNX'], '1')
    for number, works in (('2.1.2', False), ('2.8.0', True), ('2.13.0+cpu', True)):
        found = doctor.Diagnosis('none', dict(torch=number, **onnx), {}, [], '')
        (lacks,) = [row[1] for row in doctor.abilities(found) if row[0] == 'export to ONNX']
        assert lacks.startswith('' if works else 'needs torch 2.8') and bool(lacks) != works


@pytest.mark.full
@pytest.mark.skipif(UPSTREAM, reason='looks for the packages of onedl')
def test_the_doctor_looks_at_what_is_really_installed(tmp_path):
    done = gdrq('doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'OpenMMLab: onedl\n' in done.stdout and not re.search(r'^(no|broken)', done.stdout, re.MULTILINE)
    (tmp_path / 'mmengine-0.10.7.dist-info').mkdir()
    (tmp_path / 'mmengine-0.10.7.dist-info/METADATA').write_text(
        'Metadata-Version: 2.1\nName: mmengine\nVersion: 0.10.7\n'
    )
    (tmp_path / 'openvino.py').write_text('raise OSError("no such library")')
    done = gdrq('doctor', path=tmp_path)
    assert done.returncode == 1
    assert 'OpenMMLab: mixture' in done.stdout and 'uv pip uninstall mmengine && ' in done.stdout
    assert 'broken: openvino cannot be imported: OSError: no such library' in done.stdout
