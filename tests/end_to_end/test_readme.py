"""The README's commands are run, its settings are valid."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from gdrq_mm.core import compat
from gdrq_mm.core.config import Quantization
from gdrq_mm.data import digits
from gdrq_mm.report.compare import TASK_NAMES
from gdrq_mm.report.metrics import main_metric
from tests.runs import tool_function

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'make (\w+)', '\n'.join(blocks('bash'))):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


def test_the_settings_are_valid():
    (text,) = [t for t in blocks('python') if t.startswith('quantization')]
    call = ast.parse(text).body[0].value
    Quantization.from_dict(eval(compile(ast.Expression(call), 'README.md', 'eval')))


def test_the_path_from_a_config_and_a_checkpoint(tmp_path, run):
    """Every command of that section in its order, with one epoch of 640 pictures instead of six."""
    for folder in ('configs', 'tools', 'examples'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (config,) = [t for t in blocks('python') if '_base_' in t]
    name = config.splitlines()[0].removeprefix('# ')
    (tmp_path / name).write_text(config.replace('epoch_6', 'epoch_1'))
    commands = [line for text in blocks('bash') for line in text.splitlines() if line.startswith('python ')]
    commands = [c for c in commands if '--source' not in c and '/' in c.split()[1]]
    assert len(commands) == 10
    real = set()  # tools that were a process of their own, as a user starts them; again, they are forked
    for command in commands:
        words = command.replace('epoch_6', 'epoch_1').split()[1:]
        if words[0] == 'tools/train.py':
            words += ['--cfg-options', 'train_cfg.max_epochs=1', 'param_scheduler.T_max=1']
            words += ['train_dataloader.dataset.indices=640']
        if words[0] in real:
            done = run(*words)
        else:
            done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        real.add(words[0])
        if not compat.EXPORTS and words[0] == 'tools/export.py':
            assert done.returncode == 1
            (line,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
            assert line.startswith('error: ONNX export needs torch 2.8 or newer'), line
            break  # the commands behind it run what it exports
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert '| GDRQ | W4A4 |' in (tmp_path / 'table.md').read_text()
    assert (tmp_path / 'work_dirs/my_model_w4a4/record.json').is_file() and (tmp_path / 'prediction.png').is_file()
    (program,) = [t for t in blocks('python') if 'init_model' in t]
    (tmp_path / 'program.py').write_text(program.replace('epoch_6', 'epoch_1'))
    done = subprocess.run([sys.executable, 'program.py'], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] in [*'0123456789'], done.stdout


def test_quickstart_prints_a_row_for_each_task(tmp_path, monkeypatch, capsys):
    """One epoch of few pictures is too short to learn much; the rows have to hold what the records say."""
    monkeypatch.setattr(digits, 'COUNTS', {'cls': {'train': 320, 'test': 100}, 'scenes': {'train': 40, 'test': 20}})
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', '--work-dir', str(tmp_path / 'work'), '--epochs', '1'])
    tool_function('quickstart.py')()
    shown = capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / 'work').glob('*/record.json')]
    assert len(records) == 6
    for task, title in TASK_NAMES.items():
        row = next(line for line in shown.splitlines() if line.startswith(f'{title} ') and 'W4A4' in line)
        measured = {r['quantization'] is None: main_metric(r)[1] for r in records if r['task'] == task}
        values = [float(v) for v in re.findall(r'-?\d+\.\d+', row)]
        expected = [measured[True], measured[False], measured[True] - measured[False]]
        assert values[:3] == pytest.approx(expected, abs=0.006)
        picture = cv2.imread(str(tmp_path / f'work/{title}.png'))
        assert picture is not None and picture.std() > 20
