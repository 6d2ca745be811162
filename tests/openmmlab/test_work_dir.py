"""A work directory belongs to one training at a time, and what is resumed is that training."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from gdrq_mm.openmmlab.checkpoints import find_resumable, read_checkpoint
from tests.helpers import ENV, ROOT
from tests.runs import At, train

TRAIN = ROOT / 'tools/train.py'
KILL = dict(type='tests.rank_hooks.Kill', at=1, number='SIGKILL')


def test_a_new_training_that_is_killed_early_is_not_the_old_one(run, config, tmp_path):
    config(epochs=1).dump(tmp_path / 'old.py')
    assert run(TRAIN, 'old.py').returncode == 0
    old = tmp_path / 'run/epoch_1.pth'
    assert find_resumable(tmp_path / 'run')[0] == str(old)
    config(epochs=2, custom_hooks=[KILL]).dump(tmp_path / 'killed.py')
    assert run(TRAIN, 'killed.py').returncode == -9
    assert old.exists() and find_resumable(tmp_path / 'run')[0] == ''
    config(epochs=2).dump(tmp_path / 'new.py')
    done = run(TRAIN, 'new.py', '--resume')
    assert done.returncode == 0, done.stderr
    ours = read_checkpoint(str(tmp_path / 'run/epoch_2.pth'))['meta']
    assert ours['iter'] == 8 and read_checkpoint(str(old))['meta']['run'] == ours['run'], 'it was written anew'
    assert find_resumable(tmp_path / 'run')[0] == str(tmp_path / 'run/epoch_2.pth')


def test_a_resumed_training_goes_on_as_the_same_one(make, tmp_path):
    whole = make('one', epochs=2)
    train(whole)
    resumed = make('other', epochs=2, resume=True, load_from=str(tmp_path / 'one/epoch_1.pth'))
    train(resumed)
    runs = {read_checkpoint(str(tmp_path / name / 'epoch_2.pth'))['meta']['run'] for name in ('one', 'other')}
    assert len(runs) == 1 and find_resumable(tmp_path / 'other')[0].endswith('epoch_2.pth')


def test_a_second_training_in_a_work_directory_is_refused(run, config, tmp_path):
    """Until the first one has ended, however it ends."""
    holder = (
        'import sys; from pathlib import Path; from gdrq_mm.openmmlab.hooks.work_dir import only_user;'
        'lock = only_user(Path(sys.argv[1])); print("locked", flush=True); sys.stdin.read()'
    )
    config(epochs=1).dump(tmp_path / 'run.py')
    (tmp_path / 'run').mkdir()
    command = [sys.executable, '-c', holder, str(tmp_path / 'run')]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV) as first:
        while first.stdout.readline() != 'locked\n':  # a library prints when it is imported
            pass
        refused = run(TRAIN, 'run.py')
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith('error: another training is writing into ')
        assert not list((tmp_path / 'run').glob('*.pth'))
        os.kill(first.pid, signal.SIGKILL)
    assert run(TRAIN, 'run.py').returncode == 0


@pytest.mark.parametrize('best', [True, False])
def test_a_run_that_ended_before_its_last_validation_is_validated(make, tmp_path, best):
    """As one that is killed while the best checkpoint is written."""
    saving = {'default_hooks.checkpoint.save_best': 'accuracy/top1', 'default_hooks.checkpoint.rule': 'greater'}
    killed = make('run', epochs=2, **saving)

    class Killed(BaseException):
        pass

    def kill(runner):
        if runner.epoch == 2:
            raise Killed

    hook = At(None, 'after_val_epoch', 'HIGHEST')
    hook.after_val_epoch = lambda runner, metrics: (
        metrics.update({'accuracy/top1': 50.0 + runner.epoch}),
        kill(runner),
    )
    killed.register_hook(hook)
    with pytest.raises(Killed):
        train(killed)
    assert [p.name for p in (tmp_path / 'run').glob('best*')] == ['best_accuracy_top1_epoch_1.pth']
    resumed = make('run', epochs=2, resume=True, load_from=str(tmp_path / 'run/epoch_2.pth'), **saving)
    scores = []
    rising = At(None, 'after_val_epoch', 'HIGHEST')
    rising.after_val_epoch = lambda runner, metrics: (
        scores.append(runner.epoch),
        metrics.update({'accuracy/top1': 52.0 if best else 1.0}),
    )
    resumed.register_hook(rising)
    train(resumed)
    assert scores == [2]
    newest = 2 if best else 1
    assert [p.name for p in (tmp_path / 'run').glob('best*')] == [f'best_accuracy_top1_epoch_{newest}.pth']


def test_a_run_that_was_validated_is_not_validated_again(make, tmp_path):
    saving = {'default_hooks.checkpoint.save_best': 'accuracy/top1', 'default_hooks.checkpoint.rule': 'greater'}
    train(make('run', epochs=1, **saving))  # its first score is the best one: the checkpoint is saved again with it
    resumed = make('run', epochs=2, resume=True, load_from=str(tmp_path / 'run/epoch_1.pth'), **saving)
    epochs = []
    resumed.register_hook(At(lambda runner: epochs.append(runner.epoch), 'before_val'))
    train(resumed)
    assert epochs == [2]


def test_the_command_that_calibrate_prints_works_and_the_config_stays(run, config, float_checkpoint, tmp_path):
    """In the folder of the config, where mmengine would write what it made of the config over it."""
    cfg, file = config(log_level='INFO'), tmp_path / 'mine.py'
    cfg.work_dir = '.'
    cfg.dump(file)
    before = file.read_text()
    given = ['--out', 'calibrated.pth', '--cfg-options', 'quantization.weight.bits=8']
    done = run(ROOT / 'tools/calibrate.py', 'mine.py', float_checkpoint, *given)
    assert done.returncode == 0, done.stderr
    printed = re.search(r'evaluate it with: python (\S+) (.*)', done.stdout)
    tested = run(ROOT / printed[1], *shlex.split(printed[2]))
    assert tested.returncode == 0, tested.stderr
    assert file.read_text() == before and (tmp_path / 'record.json').exists()
