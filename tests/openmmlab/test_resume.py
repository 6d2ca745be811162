"""What a crash leaves: a damaged checkpoint is recognized, the newest whole one is taken, a full disk costs nothing."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.checkpoints import find_resumable, read_checkpoint
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ROOT, same
from tests.runs import QUANTIZATION, At, checkpoint_of, tiny_config, train

TRAIN = ROOT / 'tools/train.py'


def flip(path):
    """One bit in the middle of the weights."""
    whole = bytearray(path.read_bytes())
    whole[whole.index(bytes(range(50, 60)))] ^= 4
    path.write_bytes(whole)


DAMAGE = {
    'truncated': (lambda path: path.write_bytes(path.read_bytes()[:-100]), 'is truncated or damaged'),
    'one bit': (flip, 'is truncated or damaged'),
    'empty': (lambda path: path.write_bytes(b''), 'is empty'),
    'missing': (lambda path: path.unlink(), 'does not exist'),
    'weights': (lambda path: torch.save(dict(state_dict={}), path), 'does not hold the state of a training'),
    'pointer missing': (lambda path: (path.parent / 'last_checkpoint').unlink(), 'last_checkpoint is missing'),
    'pointer empty': (lambda path: (path.parent / 'last_checkpoint').write_text('\n'), 'last_checkpoint is empty'),
    'pointer of zeros': (lambda path: (path.parent / 'last_checkpoint').write_bytes(bytes(9)), 'does not exist'),
    'pointer damaged': (lambda path: (path.parent / 'last_checkpoint').write_bytes(b'\xff\xfe/x'), 'does not exist'),
}


def save(path, iterations, **more):
    """What counts in a training checkpoint."""
    path.parent.mkdir(exist_ok=True)
    weight = torch.arange(256).to(torch.uint8)
    meta = dict(iter=iterations, epoch=iterations // 10)
    torch.save(dict(meta=meta, state_dict=dict(weight=weight), message_hub={}, **more), path)


@pytest.fixture
def work(tmp_path):
    """A work directory whose pointer names its newest checkpoint; names and times say nothing."""
    folder = tmp_path / 'work'
    for name, iterations in (('epoch_11', 110), ('epoch_9', 90), ('epoch_10', 100), ('stopped', 95)):
        save(folder / f'{name}.pth', iterations, optimizer={})
    save(folder / 'best_accuracy_epoch_12.pth', 120)
    (folder / 'last_checkpoint').write_text(f'{folder}/epoch_11.pth')
    return folder


def test_what_the_pointer_names_is_taken(work):
    save(work / 'epoch_12.pth', 120, optimizer={})
    assert find_resumable(work) == (f'{work}/epoch_11.pth', '')


@pytest.mark.parametrize('kind', DAMAGE)
def test_the_newest_whole_checkpoint_stands_in(work, kind):
    damage, reason = DAMAGE[kind]
    damage(work / 'epoch_11.pth')
    found, why = find_resumable(work)
    assert found == f'{work}/epoch_{11 if kind.startswith("pointer") else 10}.pth'
    assert reason in why and '\n' not in why


def test_a_stop_after_the_last_epoch_stands_in(work):
    save(work / 'stopped.pth', 104, optimizer={})
    DAMAGE['one bit'][0](work / 'epoch_11.pth')
    assert find_resumable(work)[0] == f'{work}/stopped.pth'


def test_checkpoints_elsewhere_are_found(work, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert find_resumable(tmp_path / 'empty', work)[0] == f'{work}/epoch_11.pth'


def test_nothing_whole_is_an_error_and_nothing_at_all_is_a_start(work, tmp_path):
    for path in work.glob('*.pth'):
        path.write_bytes(path.read_bytes()[:-100])
    for pointer in ('epoch_11.pth is truncated', 'last_checkpoint is missing'):
        with pytest.raises(UserError, match=rf'{work} has no whole checkpoint .*{pointer}.*epoch_9\.pth.*--resume'):
            find_resumable(work)
        (work / 'last_checkpoint').unlink(missing_ok=True)
    for path in work.glob('*.pth'):
        path.unlink()
    (work / '.epoch_1.pth.tmp').write_bytes(b'PK')  # of a process that was killed
    assert find_resumable(work) == ('', '')
    save(work / 'calibrated.pth', 0)
    assert find_resumable(work) == ('', ''), 'no training was begun'
    (work / 'last_checkpoint').touch()
    with pytest.raises(UserError, match='no whole checkpoint'):
        find_resumable(work)


# ---- tools/train.py -------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def whole(digits_root, tmp_path_factory):
    """Work directory of a run of three epochs."""
    folder = tmp_path_factory.mktemp('whole')
    train(QuantRunner.from_cfg(tiny_config(digits_root, folder)))
    return folder


@pytest.fixture
def trained(whole, config, tmp_path):
    """A copy of it, and its config in run.py."""
    folder = tmp_path / 'run'
    shutil.copytree(whole, folder)
    (folder / 'last_checkpoint').write_text(f'{folder}/epoch_3.pth')
    config('run', log_level='INFO').dump(tmp_path / 'run.py')
    return folder


def test_a_damaged_checkpoint_costs_an_epoch(run, trained, tmp_path):
    """And the result is the same to the last bit."""
    expected = read_checkpoint(str(trained / 'epoch_3.pth'))
    for name in ('epoch_3.pth', 'epoch_2.pth'):
        (trained / name).write_bytes((trained / name).read_bytes()[:-999])
    done = run(TRAIN, 'run.py', '--resume')
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if 'the newest whole checkpoint' in line]
    assert f'checkpoint {trained}/epoch_3.pth is truncated or damaged' in line
    assert f'resuming from {trained}/epoch_1.pth' in line
    found = read_checkpoint(str(trained / 'epoch_3.pth'))
    assert all(same(found[part], expected[part]) for part in ('state_dict', 'optimizer', 'param_schedulers'))


def test_nothing_is_started_over_damaged_checkpoints(run, trained):
    for path in trained.glob('*.pth'):
        path.write_bytes(b'')
    done = run(TRAIN, 'run.py', '--resume')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f'error: {trained} has no whole checkpoint to resume from' in done.stderr
    assert {path.stat().st_size for path in trained.glob('*.pth')} == {0}


def test_weights_cannot_be_resumed(run, trained):
    torch.save(dict(state_dict=read_checkpoint(str(trained / 'epoch_3.pth'))['state_dict']), trained / 'plain.pth')
    done = run(TRAIN, 'run.py', '--resume', trained / 'plain.pth')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert 'plain.pth holds weights only' in done.stderr


# ---- writing --------------------------------------------------------------------------------------------------------

KEEP_ONE = {'default_hooks.checkpoint.max_keep_ckpts': 1}


def test_a_full_disk_leaves_the_last_checkpoint(run, config, tmp_path):
    """Even if only one is kept."""
    full = [dict(type='tests.rank_hooks.FullDisk', at=7, size=200_000)]
    config('run', **KEEP_ONE, custom_hooks=full).dump(tmp_path / 'run.py')
    done = run(TRAIN, 'run.py')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    first, second = (tmp_path / f'run/epoch_{n}.pth' for n in (1, 2))
    assert f'{second} cannot be written: File too large; the last good checkpoint is {first}' in done.stderr
    assert sorted(path.name for path in (tmp_path / 'run').glob('*epoch*')) == ['epoch_1.pth']
    assert first.stat().st_size > 200_000
    assert find_resumable(tmp_path / 'run') == (str(first), '')


def test_a_folder_that_becomes_read_only_leaves_the_last_checkpoint(run, config, tmp_path):
    hooks = [dict(type='tests.rank_hooks.ReadOnly', at=7)]
    config('run', **KEEP_ONE, custom_hooks=hooks).dump(tmp_path / 'run.py')
    done = run(TRAIN, 'run.py')
    if 'no mount' in done.stderr:
        pytest.skip('a root without the right to mount cannot make a folder read-only')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    first = tmp_path / 'run/epoch_1.pth'
    assert 'Read-only file system' in done.stderr or 'Permission denied' in done.stderr  # a root, or anybody else
    assert f'the last good checkpoint is {first}' in done.stderr
    assert find_resumable(tmp_path / 'run') == (str(first), '')


def test_old_checkpoints_go_when_the_new_one_is_written(make):
    """The best one too, and the pointer is replaced: another link to the old file still holds what it held."""
    seen = []
    runner = make(**KEEP_ONE, **{'default_hooks.checkpoint.save_best': 'accuracy/top1'})
    folder = Path(runner.work_dir)

    def look(runner, checkpoint):
        seen.append({path.name for path in folder.glob('*.pth')})

    def score(runner, metrics):
        metrics.update({'accuracy/top1': float(runner.epoch)})
        os.link(folder / 'last_checkpoint', folder / f'pointer_{runner.epoch}')

    for point, priority, function in (
        ('before_save_checkpoint', 'LOWEST', look),
        ('after_val_epoch', 'HIGHEST', score),
    ):
        hook = At(None, point, priority)
        setattr(hook, point, function)
        runner.register_hook(hook)
    train(runner)
    best = [f'best_accuracy_top1_epoch_{n}.pth' for n in (1, 2, 3)]
    assert seen[3:6] == [  # epoch 2: written, the best written, written again with the name of the best
        {'epoch_1.pth', best[0]},
        {'epoch_2.pth', best[0]},
        {'epoch_2.pth', best[0], best[1]},
    ]
    assert {path.name for path in folder.glob('*.pth')} == {'epoch_3.pth', best[2]}
    for n in (1, 2, 3):
        assert (folder / f'pointer_{n}').read_text() == checkpoint_of(runner, f'epoch_{n}.pth')


def test_what_was_kept_is_known_after_a_resume(make):
    train(make('run', epochs=2, **{'default_hooks.checkpoint.max_keep_ckpts': 2}))
    resumed = make('run', epochs=4, resume=True, **{'default_hooks.checkpoint.max_keep_ckpts': 2})
    train(resumed)
    assert {path.name for path in Path(resumed.work_dir).glob('*.pth')} == {'epoch_3.pth', 'epoch_4.pth'}


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_spawned_data_workers_load_what_this_process_loads(make, method):
    """The class that seeds a sample is made anew in them."""
    state = train(make('here', epochs=1))
    runner = make(
        'there',
        epochs=1,
        **{'train_dataloader.num_workers': 1, 'env_cfg.mp_cfg.mp_start_method': method},
        val_dataloader=None,
        val_cfg=None,
        val_evaluator=None,
    )
    try:
        assert same(train(runner), state)
    finally:
        multiprocessing.set_start_method('fork', force=True)


# ---- another length -------------------------------------------------------------------------------------------------

FREEZES = {**QUANTIZATION, 'schedule': dict(freeze=0.8)}


@pytest.mark.parametrize('size', [8, 16, 32])
def test_with_another_batch_size_all_epochs_run_and_the_stages_end_with_them(make, size):
    """64 pictures, the checkpoint is of batches of 16."""
    train(make('before', epochs=3, quantization=FREEZES))
    start = checkpoint_of(make('before'), 'epoch_1.pth')
    again = {'train_dataloader.batch_size': size}
    runner = make('after', epochs=3, quantization=FREEZES, load_from=start, resume=True, **again)
    seen, batches = [], 64 // size
    train(runner, lambda runner: seen.append((runner.epoch, runner.iter)))
    assert seen == [(epoch, epoch * batches + number) for epoch in (1, 2) for number in range(batches)]
    assert runner.iter == 3 * batches and runner.describe()['stage'] == 'freeze'


@pytest.mark.parametrize(('quantization', 'told'), [(FREEZES, True), (QUANTIZATION, False)])
def test_another_length_is_told_where_stages_are_fractions_of_it(make, quantization, told):
    train(make('run', epochs=1, quantization=quantization))
    longer = make('run', epochs=2, quantization=quantization, resume=True)
    longer.load_or_resume()
    lines = [line for line in longer.changed if 'train_cfg.max_epochs 1 → 2' in line]
    assert len(lines) == told
