"""gdrq_mm/sweep.py, tools/sweep.py, tools/calibrate.py: a grid of real runs, its errors, its slurm jobs."""

import json
import os
import re
import subprocess
import sys

import pytest

from gdrq_mm.errors import UserError
from gdrq_mm.results.record import find_records
from gdrq_mm.results.table import comparison_rows
from gdrq_mm.sweep import read_sweep
from tests.helpers import ROOT, tiny_config


def run(folder, tool, *arguments):
    command = [sys.executable, ROOT / f'tools/{tool}.py', *arguments]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '200'}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path, digits_root, float_checkpoint, monkeypatch):
    """A folder with configs of the tiny model and its float checkpoint; the working directory."""
    changes = {'log_level': 'INFO', 'load_from': float_checkpoint}
    tiny_config(digits_root, tmp_path / 'run', epochs=1, **changes).dump(tmp_path / 'quantized.py')
    tiny_config(digits_root, tmp_path / 'run', quantization=None, **changes).dump(tmp_path / 'float.py')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sweep(folder, **changes):
    run = dict(
        name='tiny',
        config='quantized.py',
        float_config='float.py',
        methods=['lsq', 'ptq'],
        bits=['w4a4'],
        seeds=[1],
    )
    run.update(changes)
    content = f"work_dir = 'work'\nrecords = 'records'\nruns = [{run!r}]\n"
    (folder / 'sweep.py').write_text(content)


def test_a_sweep_runs_what_is_not_finished(folder):
    write_sweep(folder)
    done = run(folder, 'sweep', 'sweep.py')
    assert done.returncode == 0, done.stdout + done.stderr
    names = ['tiny-float', 'tiny-lsq-w4a4-seed1', 'tiny-ptq-w4a4-seed1']
    assert sorted(path.stem for path in (folder / 'records').iterdir()) == names
    rows = comparison_rows(find_records([folder / 'records']))
    assert {(row['method'], row['bits'], row['seeds']) for row in rows} == {
        (f'{m} (groups=4)', 'W4A4', '1') for m in ('LSQ', 'PTQ')
    }
    assert all(re.fullmatch(r'\d+\.\d\d', row['float']) for row in rows)
    seeds = {path.stem: json.loads(path.read_text())['training']['seed'] for path in (folder / 'records').iterdir()}
    assert (seeds[names[1]], seeds[names[2]]) == (1, 1)

    before = {path.name: path.stat().st_mtime_ns for path in (folder / 'records').iterdir()}
    (folder / 'records/tiny-float.json').unlink()
    done = run(folder, 'sweep', 'sweep.py')
    assert '3 cells, 2 finished, 1 to run' in done.stdout and 'tiny-float: done' in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (folder / 'records').iterdir()}
    assert [name for name in before if before[name] != after[name]] == ['tiny-float.json']
    listed = run(folder, 'sweep', 'sweep.py', '--list', '--only', 'ptq').stdout
    assert listed.split() == ['tiny-ptq-w4a4-seed1:', 'finished']


def test_a_cell_that_fails_leaves_the_others(folder):
    broken = {'': {}, 'broken': {'optim_wrapper.optimizer.lr': 1e30}}
    write_sweep(folder, methods=['lsq'], variants=broken)
    done = run(folder, 'sweep', 'sweep.py', '--jobs', '2', '--cores', '2')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert '1 of 3 cells failed' in done.stderr and 'tiny-lsq-broken-w4a4-seed1: error: ' in done.stderr
    assert sorted(p.stem for p in (folder / 'records').iterdir()) == ['tiny-float', 'tiny-lsq-w4a4-seed1']


def test_an_interrupted_cell_goes_on_from_its_checkpoint(folder):
    write_sweep(folder, methods=['lsq'], options={'train_cfg.max_epochs': 2})
    (cell,) = [cell for cell in read_sweep('sweep.py') if 'lsq' in cell.name]
    first = cell.command.split(' && ')[0].replace('train_cfg.max_epochs=2', 'train_cfg.max_epochs=1')
    assert subprocess.run(['bash', '-c', first], capture_output=True).returncode == 0
    done = run(folder, 'sweep', 'sweep.py')
    assert done.returncode == 0, done.stderr
    log = cell.log.read_text()
    assert 'Epoch(train) [2]' in log and 'Epoch(train) [1]' not in log
    assert json.loads(cell.record.read_text())['training']['epoch'] == 2


def test_cells_become_slurm_jobs(folder):
    write_sweep(folder, seeds=[0, 1])
    done = run(folder, 'sweep', 'sweep.py', '--slurm', 'jobs.sh', '--slurm-args', '-p gpu --gres=gpu:1')
    assert done.returncode == 0, done.stderr
    script = (folder / 'jobs.sh').read_text()
    assert subprocess.run(['bash', '-n', 'jobs.sh'], cwd=folder).returncode == 0
    jobs = [line for line in script.splitlines() if line.startswith('sbatch ')]
    assert len(jobs) == 5 and all('-p gpu --gres=gpu:1 --job-name tiny-' in job for job in jobs)
    # A sbatch that runs its job at once shows that the quoting survives.
    (folder / 'bin').mkdir()
    (folder / 'bin/sbatch').write_text('#!/bin/bash\nexec bash -n -c "${@: -1}"\n')
    (folder / 'bin/sbatch').chmod(0o755)
    env = {**os.environ, 'PATH': f'{folder / "bin"}:{os.environ["PATH"]}'}
    assert subprocess.run(['bash', 'jobs.sh'], cwd=folder, env=env).returncode == 0


def test_all_errors_are_named_at_once_before_anything_runs(folder):
    write_sweep(folder, methods=['lsqq', 'xnor'], bits=['w4a4', '4'], seeds=['one'], verions={})
    with pytest.raises(UserError) as error:
        read_sweep('sweep.py')
    assert "runs[0] has no key 'verions'; did you mean 'variants'?" in str(error.value)
    write_sweep(folder, methods=['lsqq', 'xnor'], bits=['w4a4', '4'], seeds=[0, True])
    done = run(folder, 'sweep', 'sweep.py')
    assert done.returncode == 1 and 'Traceback' not in done.stderr and not (folder / 'records').exists()
    for message in (
        'errors in sweep.py',
        "tiny-lsqq-w4a4-seed0: quantization.method='lsqq' is unknown; did you mean 'lsq'?",
        'tiny-xnor-w4a4-seed0: quantization.weight.bits=4 is not 1',
        "bits '4' are not written like w4a4",
        'the seed is not an integer',
    ):
        assert message in done.stderr


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(config='none.py'), 'config none.py does not exist'),
        (dict(float_config='none.py'), 'config none.py does not exist'),
        (dict(config='float.py', options={'load_from': 'none.pth'}), 'none.pth of float.py does not exist'),
        (dict(methods=[]), 'methods is empty'),
        (dict(seeds=3), 'seeds=3 is not a list'),
        (dict(seeds=[0, 0]), 'two cells are called tiny-lsq-w4a4-seed0'),
    ],
)
def test_an_error_is_named_with_its_place(folder, changes, message):
    write_sweep(folder, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        read_sweep('sweep.py')


def test_errors_of_every_run_are_named(folder):
    run = dict(name='a', config='none.py', methods=['lsq'], bits=['w4a4'], seeds=[0])
    content = f"work_dir = 'work'\nrecords = 'records'\nruns = [{run!r}, {dict(run, config='nil.py')!r}]\n"
    (folder / 'sweep.py').write_text(content)
    with pytest.raises(UserError, match=r'2 errors(.|\n)*runs\[0\]: config none.py(.|\n)*runs\[1\]: config nil.py'):
        read_sweep('sweep.py')


@pytest.mark.parametrize('content, message', [('runs = [', 'cannot be read'), ('runs = []', 'has no work_dir')])
def test_a_damaged_sweep_file_is_refused(folder, content, message):
    (folder / 'sweep.py').write_text(content)
    with pytest.raises(UserError, match=message):
        read_sweep('sweep.py')


def test_a_record_of_other_settings_is_not_taken_for_the_cell(folder):
    write_sweep(folder, methods=['ptq'])
    assert run(folder, 'sweep', 'sweep.py').returncode == 0
    write_sweep(folder, methods=['ptq'], options={'quantization.weight.groups': 1})
    done = run(folder, 'sweep', 'sweep.py')
    assert done.returncode == 1 and 'is of other settings; remove it to run the cell again' in done.stderr
    (folder / 'records/tiny-ptq-w4a4-seed1.json').write_text('{')
    done = run(folder, 'sweep', 'sweep.py')
    assert done.returncode == 1 and 'tiny-ptq-w4a4-seed1.json cannot be read' in done.stderr


# ---- tools/calibrate.py ---------------------------------------------------------------------------------------------


def test_calibration_writes_a_checkpoint_that_evaluates(folder, float_checkpoint):
    done = run(folder, 'calibrate', 'quantized.py', float_checkpoint, '--out', 'new/ptq.pth', '--work-dir', 'w')
    assert done.returncode == 0, done.stderr
    assert 'python tools/test.py quantized.py new/ptq.pth' in done.stdout + done.stderr
    done = run(folder, 'test', 'quantized.py', 'new/ptq.pth', '--work-dir', 'w')
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / 'w/record.json').read_text())
    assert record['model']['stage'] == 'quantize' and record['training']['iter'] == 0
    assert record['training']['start']['file'] == 'epoch_1.pth'


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['quantized.py', 'none.pth'], 'checkpoint none.pth does not exist'),
        (['float.py', 'FLOAT'], 'the config has no quantization: there is nothing to calibrate'),
        (['quantized.py', 'FLOAT', '--out', '.'], '--out . is a folder'),
    ],
)
def test_what_cannot_be_calibrated_ends_in_one_line(folder, float_checkpoint, arguments, message):
    arguments = [float_checkpoint if argument == 'FLOAT' else argument for argument in arguments]
    done = run(folder, 'calibrate', *arguments, '--work-dir', 'w')
    assert done.returncode == 1 and 'Traceback' not in done.stderr and message in done.stderr.splitlines()[-1]
    assert not list(folder.rglob('calibrated.pth'))
