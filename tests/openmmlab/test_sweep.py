"""gdrq_mm/openmmlab/sweep.py, tools/sweep.py: a grid of real runs, its errors, its slurm jobs."""

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab import sweep as sweep_module
from gdrq_mm.openmmlab.cli import add_config_arguments
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.sweep import _digest_of_file, _not_plain, read_sweep
from gdrq_mm.openmmlab.sweep_cell import run_cell
from gdrq_mm.report import recipe
from gdrq_mm.report.compare import comparison_rows
from gdrq_mm.report.record import find_records
from tests.helpers import ROOT
from tests.runs import tiny_config

TOOL = ROOT / 'tools/sweep.py'


@pytest.fixture(scope='session')
def configs(tmp_path_factory, digits_root, float_checkpoint):
    """A folder with a float and a quantized config of the tiny model, and a sweep of them: a float model, LSQ, PTQ."""
    folder = tmp_path_factory.mktemp('configs')
    changes = {'log_level': 'INFO', 'load_from': float_checkpoint}
    tiny_config(digits_root, folder / 'run', epochs=1, **changes).dump(folder / 'quantized.py')
    tiny_config(digits_root, folder / 'run', quantization=None, **changes).dump(folder / 'float.py')
    write_sweep(folder)
    return folder


@pytest.fixture(scope='session')
def finished(configs, tmp_path_factory, run_in):
    """A copy of it where the sweep has run; the processes of pytest share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'finished'
    with open(f'{folder}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = shutil.copytree(configs, tmp_path_factory.mktemp('sweep'), dirs_exist_ok=True)
            (done,) = run_in(made, [{}], TOOL, 'sweep.py', '--jobs', 2, '--cores', 2)
            assert done.returncode == 0, done.stderr
            made.rename(folder)
    return folder


@pytest.fixture
def folder(configs, tmp_path, monkeypatch):
    """A folder with configs and a sweep, the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(configs, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def sweep(run_all):
    """Runs the tool in the working directory."""
    return lambda *arguments: run_all([{'COLUMNS': '200'}], TOOL, 'sweep.py', *arguments)[0]


@pytest.fixture
def swept(finished, tmp_path, monkeypatch):
    """A folder where the sweep has run, the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


def write_sweep(folder, **changes):
    run = dict(
        name='tiny', config='quantized.py', float_config='float.py', methods=['lsq', 'ptq'], bits=['w4a4'], seeds=[1]
    )
    run.update(changes)
    content = f"work_dir = 'work'\nrecords = 'records'\nruns = [{run!r}]\n"
    (folder / 'sweep.py').write_text(content)


def test_a_sweep_leaves_a_record_of_each_cell(swept):
    names = ['tiny-float', 'tiny-lsq-w4a4-seed1', 'tiny-ptq-w4a4-seed1']
    records = {path.stem: json.loads(path.read_text()) for path in (swept / 'records').iterdir()}
    assert sorted(records) == names
    assert [records[name]['training']['seed'] for name in names[1:]] == [1, 1]
    rows = comparison_rows(find_records([swept / 'records']))
    methods = {(row['method'], row['bits'], row['seeds']) for row in rows}
    assert methods == {(f'{m} (groups=4)', 'W4A4', '1') for m in ('LSQ', 'PTQ')}
    assert all(re.fullmatch(r'\d+\.\d\d', row['float']) for row in rows)


def test_finished_cells_are_skipped(swept, sweep):
    before = {path.name: path.stat().st_mtime_ns for path in (swept / 'records').iterdir()}
    (swept / 'records/tiny-float.json').unlink()
    out = sweep().stdout
    assert '3 cells, 2 finished, 1 to run' in out and 'tiny-float: done' in out
    after = {path.name: path.stat().st_mtime_ns for path in (swept / 'records').iterdir()}
    assert [name for name in before if before[name] != after[name]] == ['tiny-float.json']
    for only in ('ptq', 'nothing|tq-'):
        assert sweep('--list', '--only', only).stdout.split() == ['tiny-ptq-w4a4-seed1:', 'finished']
    done = sweep('--list', '--only', '(')
    assert '--only (: ' not in done.stdout
    assert 'error: --only ( is not a regular expression' in done.stderr


def test_a_cell_that_fails_leaves_the_others(swept, sweep):
    write_sweep(swept, methods=['lsq'], seeds=[1, 2], variants={'broken': {'optim_wrapper.optimizer.lr': 1e30}})
    error = sweep('--only', 'seed2').stderr
    assert error.startswith('error: 1 of 1 cells failed') and 'tiny-lsq-broken-w4a4-seed2: error: ' in error
    assert len(find_records(['records'])) == 3


def test_a_cell_whose_folder_cannot_be_written_leaves_the_others(swept, sweep):
    before = {path.name: path.read_bytes() for path in (swept / 'records').iterdir()}
    shutil.rmtree(swept / 'work/tiny-float')
    (swept / 'work/tiny-float').touch()
    (swept / 'records/tiny-float.json').unlink()
    error = sweep('--only', 'tiny').stderr
    assert error.startswith('error: 1 of 1 cells failed') and 'tiny-float: [Errno ' in error
    assert {path.name: path.read_bytes() for path in (swept / 'records').iterdir()} == {
        name: content for name, content in before.items() if name != 'tiny-float.json'
    }


def cell_of(name):
    (cell,) = [cell for cell in read_sweep('sweep.py') if name in cell.name]
    return cell


def test_an_interrupted_cell_goes_on_from_its_checkpoint(swept):
    cell = cell_of('lsq')
    before = json.loads(cell.record.read_text())['checkpoint']
    cell.record.unlink()
    cell.done.unlink()  # killed in the test
    (cell.work_dir / 'last_checkpoint').write_text(str(cell.work_dir / 'epoch_1.pth'))  # the folder was copied
    assert run_cell(cell, 1) == (True, 'tiny-lsq-w4a4-seed1: done')
    assert 'Epoch(train)' not in cell.log.read_text()
    assert json.loads(cell.record.read_text())['checkpoint'] == before


@pytest.mark.full
def test_a_cell_whose_record_was_removed_is_run_again(swept):
    cell = cell_of('lsq')
    cell.record.unlink()
    fine, line = run_cell(cell, 1)
    assert fine and 'its record was removed; what was there is kept in work/tiny-lsq-w4a4-seed1.old-1' in line
    assert 'Epoch(train)' in cell.log.read_text()
    assert cell.finished() and (swept / 'work/tiny-lsq-w4a4-seed1.old-1/epoch_1.pth').exists()


def test_a_changed_cell_is_run_anew_with_its_values_and_the_old_record_is_kept_aside(swept, sweep):
    before = (swept / 'records/tiny-lsq-w4a4-seed1.json').read_text()
    changes = {
        'train_cfg.max_epochs': 2,
        'quantization.overrides': {'*.conv2': {'weight': {'bits': 8}}},
        'optim_wrapper.clip_grad': {'max_norm': 35.0},
        'note': dict(spaces='a b', text='0.10', comma='a,b', none=None, listed=['x', (1, 2)]),
    }
    write_sweep(swept, methods=['lsq'], options=changes)
    name = 'tiny-lsq-w4a4-seed1'
    listed = sweep('--list', '--only', 'lsq').stdout
    assert f'{name}: not run with these settings; records/{name}.json is of other ones' in listed
    done = sweep('--only', 'lsq')
    assert done.returncode == 0, done.stderr
    assert 'other settings (' in done.stdout and 'train_cfg.max_epochs: 1 → 2' in done.stdout
    log = (swept / f'work/{name}/log.txt').read_text()
    assert 'Epoch(train) [1]' in log and 'Epoch(train) [2]' in log  # not resumed from the old settings
    assert (swept / f'records/{name}.json.old-1').read_text() == before
    found = find_records(['records'])
    assert len(found) == 3
    (record,) = [record for record in found if name in record['path']]
    assert record['training']['epoch'] == 2 and record['checkpoint'] != json.loads(before)['checkpoint']
    assert record['training']['recipe']['train_cfg']['max_epochs'] == 2
    assert record['training']['recipe']['optim_wrapper']['clip_grad'] == {'max_norm': 35.0}
    assert record['quantization']['overrides'] == changes['quantization.overrides']
    for text in ("spaces='a b'", "text='0.10'", "comma='a,b'", 'none=None'):
        assert text in record['config']['text']
    assert cell_of('lsq').finished()


@pytest.mark.parametrize(
    'changes',
    [
        dict(options={'train_cfg.max_epochs': 2}),
        dict(options={'optim_wrapper.optimizer.lr': 0.5}),
        dict(options={'log_level': 'WARNING'}),
        dict(variants={'': {'quantization.weight.groups': 1}}),
        dict(seeds=[2]),
        dict(amp=True),
    ],
)
def test_a_cell_is_its_whole_configuration(folder, changes):
    before = cell_of('lsq')
    write_sweep(folder, **changes)
    assert cell_of('lsq').digest != before.digest
    assert cell_of('float').digest == cell_of('float').digest


@pytest.mark.parametrize(
    'options, said',
    [
        ({'randomness.seed': 5}, 'randomness.seed=5, but the name of the cell says 1'),
        ({'quantization.weight.bits': 8}, 'quantization.weight.bits=8, but the name of the cell says 4'),
        ({'quantization.activation': dict(bits=2)}, 'quantization.activation.bits=2, but the name of the cell says 4'),
        ({'quantization.method': 'pact'}, "quantization.method='pact', but the name of the cell says 'lsq'"),
    ],
)
@pytest.mark.parametrize('where', ['options', 'variants'])
def test_settings_that_belie_the_name_of_a_cell_are_refused(folder, options, said, where):
    write_sweep(folder, methods=['lsq'], **{where: options if where == 'options' else {'changed': options}})
    with pytest.raises(UserError, match=re.escape(said)):
        read_sweep('sweep.py')


def test_a_variant_may_start_from_another_checkpoint_which_has_to_be_there(folder):
    write_sweep(folder, variants={'': {}, 'other': {'load_from': 'none.pth'}})
    missing = {cell.name: cell.missing for cell in read_sweep('sweep.py')}
    assert [name for name in missing if missing[name]] == ['tiny-lsq-other-w4a4-seed1', 'tiny-ptq-other-w4a4-seed1']
    assert 'the float checkpoint none.pth of quantized.py does not exist' in missing['tiny-lsq-other-w4a4-seed1']


def test_a_cell_follows_its_config_file_and_its_float_checkpoint(folder):
    before = cell_of('lsq')
    config = folder / 'quantized.py'
    config.write_text(config.read_text() + "\noptim_wrapper['optimizer']['momentum'] = 0.5\n")
    changed = cell_of('lsq')
    assert changed.digest != before.digest
    load_from = re.search("load_from ?= ?'(.*?)'", config.read_text())[1]
    shutil.copy(load_from, 'other.pth')
    config.write_text(config.read_text().replace(load_from, 'other.pth'))
    assert cell_of('lsq').digest == changed.digest  # the same weights
    with open('other.pth', 'ab') as file:
        file.write(b'0')
    _digest_of_file.cache_clear()
    assert cell_of('lsq').digest != changed.digest


def test_a_record_without_a_cell_counts_by_its_quantization_and_seed(swept):
    cell = cell_of('lsq')
    record = json.loads(cell.record.read_text())
    del record['cell']
    cell.record.write_text(json.dumps(record))
    assert cell.finished()
    cell.record.write_text(json.dumps({**record, 'training': {**record['training'], 'seed': 2}}))
    assert not cell.finished()
    (swept / 'quantized.py').unlink()
    assert not cell_of('lsq').finished()


@pytest.mark.parametrize(
    'value', ['a b', '0.10', 'a,b', '', "it's", '{"a": 1}', None, True, 1e-4, [1, 'x'], (1, 'a b'), {'a.b': {'c': []}}]
)
def test_a_value_reaches_the_tool_as_it_is(value):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    (cell_value,) = shlex.split(shlex.join([repr({'a.b': value})]))
    assert parser.parse_args(['--cfg-values', cell_value]).cfg_values == {'a.b': value}


@pytest.mark.parametrize('value', [float('nan'), object(), len, {1: print}])
def test_what_is_no_value_is_named_before_anything_runs(value):
    (message,) = _not_plain({'a.b': value}, 'options')
    assert message.startswith("options['a.b']=") and 'is not plain data' in message


def test_values_that_are_given_twice_count_both_times():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    given = ['--cfg-values', '{"a": 1, "b": 1}', '--cfg-values', '{"b": 2}']
    assert parser.parse_args(given).cfg_values == {'a': 1, 'b': 2}


@pytest.mark.parametrize('text', ['3', 'a=3', '{1: 2}', '{"a": print()}', '{'])
def test_values_that_are_no_dict_are_refused(text):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    with pytest.raises(UserError, match='--cfg-values'):
        parser.parse_args(['--cfg-values', text])


def test_a_cell_that_another_sweep_runs_is_left_to_it(folder, sweep):
    log = folder / 'work/tiny-ptq-w4a4-seed1/log.txt'
    log.parent.mkdir(parents=True)
    with open(log, 'w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write('what it has printed')
        other.flush()
        assert 'tiny-ptq-w4a4-seed1: left to another sweep that runs it' in sweep('--only', 'ptq').stdout
    assert log.read_text() == 'what it has printed' and not (folder / 'records/tiny-ptq-w4a4-seed1.json').exists()


def test_a_cell_that_another_sweep_has_run_since_is_skipped(swept):
    for cell in read_sweep('sweep.py'):
        before = cell.record.stat().st_mtime_ns
        assert run_cell(cell, 1) == (True, f'{cell.name}: done by another sweep')
        assert cell.record.stat().st_mtime_ns == before


def test_cells_become_slurm_jobs_but_for_one_that_runs(swept, sweep):
    write_sweep(swept, seeds=[0, 1, 2])
    assert "error: --slurm-args 'a \"b': No closing" in sweep('--slurm', 'jobs.sh', '--slurm-args', 'a "b').stderr
    log = swept / 'work/tiny-ptq-w4a4-seed0/log.txt'
    log.parent.mkdir()
    with open(log, 'w') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sweep('--slurm', 'jobs.sh', '--slurm-args', '-p gpu --gres=gpu:1')
    script = (swept / 'jobs.sh').read_text()
    assert subprocess.run(['bash', '-n', 'jobs.sh'], cwd=swept).returncode == 0
    assert '# tiny-ptq-w4a4-seed0 is left to another sweep that runs it' in script
    jobs = [shlex.split(line) for line in script.splitlines() if line.startswith('sbatch ')]
    assert len(jobs) == 3 and all(job[1:5] == ['-p', 'gpu', '--gres=gpu:1', '--job-name'] for job in jobs)
    for job in jobs:
        log, command = job[job.index('--output') + 1], shlex.split(job[-1])
        assert subprocess.run(['bash', '-n', '-c', command[-1]]).returncode == 0, 'the quoting survives'
        with open(swept / log, 'w') as other:  # a sweep has begun to run the cell before slurm does
            fcntl.flock(other, fcntl.LOCK_EX)
            done = subprocess.run(job[-1], shell=True, capture_output=True, text=True)
        assert done.returncode == 1 and 'failed to get lock' in done.stderr


def test_all_errors_are_named_at_once_before_anything_runs(folder, sweep):
    write_sweep(folder, methods=['lsqq', 'xnor'], bits=['w4a4', '4'], seeds=['one'], verions={})
    with pytest.raises(UserError) as error:
        read_sweep('sweep.py')
    assert "runs[0] has no key 'verions'; did you mean 'variants'?" in str(error.value)
    write_sweep(folder, methods=['lsqq', 'xnor'], bits=['w4a4', '4'], seeds=[0, True])
    done = sweep()
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
        (dict(methods=[]), 'methods is empty'),
        (dict(last=0), 'runs[0].last=0 is not at least 1'),
        (dict(last=2), '1 errors in sweep.py:\n  runs[0].last=2 is not at most 1'),
        (dict(seeds=3), 'seeds=3 is not a list'),
        (dict(seeds=[0, 0]), 'two cells are called tiny-lsq-w4a4-seed0'),
    ],
)
def test_an_error_is_named_with_its_place(folder, changes, message):
    write_sweep(folder, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        read_sweep('sweep.py')


@pytest.mark.parametrize(
    ('file', 'change', 'message'),
    [
        (
            'quantized.py',
            "quantization['weight']['method'] = 'gdrq'",
            "quantization.weight.method='gdrq', which method 'lsq'",
        ),
        (
            'float.py',
            "test_evaluator['topk'] = (5,)",
            'runs[0]: the evaluation of float.py is not that of quantized.py',
        ),
        ('float.py', "model['backbone']['depth'] = 34", 'runs[0]: the model of float.py is not that of quantized.py'),
    ],
)
def test_cells_that_would_not_be_what_their_name_says_are_refused(folder, file, change, message):
    with open(folder / file, 'a') as config:
        config.write(f'\n{change}\n')
    with pytest.raises(UserError, match=re.escape(message)):
        read_sweep('sweep.py')


def test_another_teacher_is_another_cell(folder):
    with open(folder / 'quantized.py', 'a') as config:
        config.write("\nquantization['distill'] = dict(teacher='teacher.pth')\n")
    digests = []
    for content in (b'one', b'other'):
        (folder / 'teacher.pth').write_bytes(content)
        sweep_module._digest_of_file.cache_clear()
        digests.append(next(cell.digest for cell in read_sweep('sweep.py') if 'lsq' in cell.name))
    assert digests[0] != digests[1]


@pytest.mark.parametrize('what', ['config later.py', 'the float checkpoint none.pth of later.py'])
def test_a_missing_config_or_float_checkpoint_stops_the_cells_that_start_from_it(folder, sweep, what):
    config = (folder / 'quantized.py').read_text()
    load_from = re.search("load_from ?= ?'(.*?)'", config)[1]
    if 'checkpoint' in what:
        (folder / 'later.py').write_text(config.replace(load_from, 'none.pth'))
    run = dict(name='later', config='later.py', methods=['lsq'], bits=['w4a4'], seeds=[1])
    with open('sweep.py', 'a') as file:
        file.write(f'runs += [{run!r}]\n')
    line = f'runs[1]: {what} does not exist'
    for arguments in ([], ['--only', 'later']):
        done = sweep(*arguments)
        assert done.returncode == 1 and f'1 errors in sweep.py:\n  {line}' in done.stderr
    assert not (folder / 'records').exists()
    done = sweep('--only', 'tiny-float')
    assert done.returncode == 0 and (folder / 'records/tiny-float.json').exists(), done.stderr
    assert f'later-lsq-w4a4-seed1: cannot run, {line}' in sweep('--list').stdout


ITERATIONS = dict(
    train_cfg=dict(by_epoch=False, max_iters=9, val_interval=99),
    param_scheduler=None,
    log_processor=dict(by_epoch=False),
)


@pytest.mark.parametrize(
    'settings, loop, left',
    [
        (dict(interval=2), {}, 2),  # after epochs 2 and 3
        (dict(interval=2, save_last=False), {}, 1),
        (dict(interval=1, max_keep_ckpts=2), {}, 2),
        (dict(interval=3, save_begin=1, by_epoch=False), ITERATIONS, 4),  # after iterations 1, 4, 7 and 9
    ],
)
def test_more_checkpoints_than_a_training_leaves_are_refused(folder, config, float_checkpoint, settings, loop, left):
    options = {f'default_hooks.checkpoint.{key}': value for key, value in settings.items()}
    cfg = config(load_from=float_checkpoint, **options, **loop)
    cfg.dump(folder / 'quantized.py')
    config(quantization=None, **options, **loop).dump(folder / 'float.py')
    write_sweep(folder, methods=['lsq'], options=options, last=left)
    assert f'--last {left}' in cell_of('lsq').command or left == 1
    write_sweep(folder, methods=['lsq'], seeds=[0, 1], options=options, last=left + 1)
    said = rf'2 errors in sweep.py:\n  runs\[0\].last={left + 1} is not at most {left}, .* (float.py|its)'
    with pytest.raises(UserError, match=said):
        read_sweep('sweep.py')
    QuantRunner.from_cfg(cfg).train()
    assert len(list((folder / 'run').glob('[ei]*.pth'))) == left


@pytest.mark.parametrize('name, count', [('epoch_2.pth', 2), ('resnet18.pth', 1)])
def test_the_float_baseline_is_the_mean_of_as_many_checkpoints(folder, config, float_checkpoint, name, count):
    for file in ('epoch_1.pth', name):
        shutil.copy(float_checkpoint, file)
    config(load_from=name).dump('quantized.py')
    write_sweep(folder, methods=['lsq'], last=2)
    assert run_cell(cell_of('float'), threads=2)[0]
    assert recipe.tested(json.loads(cell_of('float').record.read_text())) == count


def test_another_number_of_tested_checkpoints_is_another_cell(folder):
    """Also where the config says how many are kept."""
    digests = set()
    for last in (1, 2):
        write_sweep(
            folder, last=last, options={'default_hooks.checkpoint.max_keep_ckpts': 3, 'train_cfg.max_epochs': 3}
        )
        digests.add(next(cell.digest for cell in read_sweep('sweep.py') if 'lsq' in cell.name))
    assert len(digests) == 2


def test_errors_of_every_run_are_named(folder):
    run = dict(name='a', config='float.py', methods=['lsq'], bits=['w4'], seeds=[0])
    content = f"work_dir = 'work'\nrecords = 'records'\nruns = [{run!r}, {dict(run, name='b')!r}]\n"
    (folder / 'sweep.py').write_text(content)
    with pytest.raises(UserError, match=r'2 errors(.|\n)*runs\[0\]: a-lsq(.|\n)*runs\[1\]: b-lsq'):
        read_sweep('sweep.py')


@pytest.mark.parametrize('content, message', [('runs = [', 'cannot be read'), ('runs = []', 'has no work_dir')])
def test_a_damaged_sweep_file_is_refused(folder, content, message):
    (folder / 'sweep.py').write_text(content)
    with pytest.raises(UserError, match=message):
        read_sweep('sweep.py')


def test_a_damaged_record_is_named(swept, sweep):
    (swept / 'records/tiny-ptq-w4a4-seed1.json').write_text('{')
    assert 'tiny-ptq-w4a4-seed1.json cannot be read' in sweep('--only', 'ptq').stderr
