"""Several processes: the same model as one, the same on all ranks, and nothing lost when they are stopped."""

import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gdrq_mm.core.errors import Stopped, UserError
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ENV, ROOT, same
from tests.runs import TEST_ONLY, At

TRAIN = ROOT / 'tools/train.py'
W4A4 = dict(
    weight=dict(bits=4, groups=4, gdrq=dict(clip='project')),
    activation=dict(bits=4),
    calibration_batches=2,
    schedule=dict(reshape=0.4, freeze=0.8),
)
PLAIN = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def ranks(number=2):
    """What torchrun tells its processes."""
    shared = dict(WORLD_SIZE=str(number), MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    return [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]


@pytest.fixture
def train_on_two(run_all, config, tmp_path):
    """Trains a config on two processes, each with half of a batch of 16; returns what came of both."""

    def train(name, *args, **changes):
        hooks = [dict(type='tests.rank_hooks.Note'), *changes.pop('custom_hooks', [])]
        changes = {'quantization': W4A4, **changes, 'train_dataloader.batch_size': 8, 'custom_hooks': hooks}
        changes['env_cfg.dist_cfg.timeout'] = 30  # seconds, when one waits for what the other does not do
        config(name, **changes).dump(tmp_path / f'{name}.py')
        return run_all(ranks(), TRAIN, f'{name}.py', '--launcher', 'pytorch', *args)

    return train


SYNC = {'model.backbone.norm_cfg': dict(type='SyncBN')}
CASES = {
    'sync_bn': dict(sync_bn='torch'),
    'unused parameters': {
        **SYNC,
        'model.backbone.out_indices': (2,),  # nothing reads the last stage
        'model.head.in_channels': 16,
        'find_unused_parameters': True,
    },
    'accumulation': {**SYNC, 'optim_wrapper.accumulative_counts': 2},
    'attention': {
        'model.backbone': dict(
            _delete_=True,
            type='VisionTransformer',
            arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
            img_size=32,
            patch_size=8,
        ),
        'model.head': dict(_delete_=True, type='VisionTransformerClsHead', num_classes=10, in_channels=32),
        'model.neck': None,
    },
}


def distance(one, other):
    """Length of the difference of two dicts of tensors, relative to the length of one."""
    vectors = [torch.cat([value.double().flatten() for value in tensors.values()]) for tensors in (one, other)]
    return float((vectors[0] - vectors[1]).norm() / vectors[0].norm().clamp(min=1e-9))


@pytest.mark.parametrize('case', CASES)
def test_two_processes_give_the_model_of_one(train_on_two, config, tmp_path, case):
    """At the same total batch, up to the order of summation; and both have the same one to the last bit.

    A last digit can turn a ReLU or a rounding, hence the small learning rate and these k, with which none did (at 8e-4
    one does, and a running mean ends 5e-5 apart). It also turns a value that is not zero into one that is, hence the
    mean of all. What is not projected (BN, biases) is compared by the way it went.
    """
    weight = dict(bits=4, groups=4, gdrq=dict(clip='project', k=3.5))
    settings = {**W4A4, 'weight': weight, 'activation': dict(bits=4, gdrq=dict(mean='all', k=12.0))}
    changes = {'train_dataloader.dataset.pipeline': PLAIN, 'optim_wrapper.optimizer.lr': 1e-3, **CASES[case]}
    changes['quantization'] = settings
    finished(train_on_two('two', **changes))
    runner = QuantRunner.from_cfg(config('one', **changes))
    states = []

    def note(runner):
        states.append({key: value.clone() for key, value in runner.model.state_dict().items()})

    runner.register_hook(At(note, 'before_train', 'VERY_LOW'))
    runner.register_hook(At(note, 'after_train_epoch'))
    runner.train()
    start, *ends = states
    free = [name for name, value in runner.model.named_parameters() if value.dim() == 1]
    for one, two in zip(ends, same_states(tmp_path / 'two'), strict=True):
        assert one.keys() == two.keys()
        ways = [{name: state[name] - start[name] for name in free} for state in (one, two)]
        assert distance(*ways) < 1e-2
        for key, value in one.items():
            if value.is_floating_point():
                assert distance({key: value}, {key: two[key]}) < (2e-2 if key in free else 1e-5), key
            else:
                assert torch.equal(value, two[key]), key


def test_two_processes_hold_the_same_model_in_mixed_precision(train_on_two, tmp_path):
    statistics = [dict(type='StatisticsHook')]  # off in the others
    finished(train_on_two('amp', '--amp', sync_bn='torch', custom_hooks=statistics))
    assert list((tmp_path / 'amp').glob('*/vis_data/vis_image/distributions_*.png'))
    (state, *_) = same_states(tmp_path / 'amp')
    assert all(value.isfinite().all() for value in state.values())


def finished(processes):
    assert [done.returncode for done in processes] == [0] * len(processes), processes[0].stderr


def same_states(folder):
    """The state after each epoch, the same on both ranks."""
    states = []
    for epoch in (1, 2, 3):
        first, second = (torch.load(folder / f'state_{epoch}_{rank}.pt') for rank in range(2))
        assert same(dict(first), dict(second)), f'the ranks differ after epoch {epoch}'
        states.append(dict(first))
    return states


def end_of(folder):
    checkpoint = torch.load(folder / 'epoch_3.pth', weights_only=False)
    return {key: checkpoint[key] for key in ('state_dict', 'optimizer', 'param_schedulers')}


@pytest.mark.parametrize(
    ('name', 'changes', 'done'),
    [
        pytest.param(
            'SIGTERM',
            {'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': True},
            9,
            marks=pytest.mark.full,
        ),
        ('SIGUSR1', {'optim_wrapper.accumulative_counts': 2}, 10),  # iterations: not between two steps
    ],
    ids=['workers', 'accumulation'],
)
def test_two_processes_that_are_killed_or_stopped_lose_nothing(train_on_two, tmp_path, name, changes, done):
    """BN is not synchronized here, and samples are cropped at random."""
    finished(train_on_two('whole', **changes))
    same_states(tmp_path / 'whole')

    kill = dict(type='tests.rank_hooks.Kill', at=6, number='SIGKILL')
    killed = train_on_two('killed', custom_hooks=[kill], **changes)
    assert [done.returncode for done in killed] == [-9, -9]
    finished(train_on_two('killed', '--resume', **changes))

    stop = dict(type='tests.rank_hooks.Kill', at=8, number=name, rank=1)
    stopped = train_on_two('stopped', custom_hooks=[stop], **changes)
    for process in stopped:
        assert process.returncode == 75
        assert process.stderr.splitlines()[-1].startswith(f'{name} after iteration {done}: saved ')
    assert torch.load(tmp_path / 'stopped/stopped.pth', weights_only=False)['meta']['iter'] == done
    finished(train_on_two('stopped', '--resume', **changes))

    for name in ('killed', 'stopped'):
        assert same(end_of(tmp_path / 'whole'), end_of(tmp_path / name)), name
        assert same(same_states(tmp_path / 'whole')[1:], same_states(tmp_path / name)[1:]), name


@pytest.mark.parametrize(
    ('what', 'changes', 'message'),
    [
        ('number', SYNC, 'loss=nan at iteration 4: the input batch has values that are not finite'),
        (
            'input',
            {},
            'loss=nan at iteration 5: the output of backbone.conv1.own_input_quant (GDRQActivation) is the first',
        ),
        ('gradient', {}, 'the gradient of backbone.layer2.0.conv1.weight is not finite at iteration 4'),
    ],
)
def test_what_is_not_finite_in_one_process_stops_both(train_on_two, tmp_path, what, changes, message):
    """With the same message, after the same step."""
    spoil = dict(type='tests.rank_hooks.Spoil', what=what, at=4, rank=1)
    stopped = train_on_two('spoilt', custom_hooks=[spoil], **changes)
    for process in stopped:
        assert process.returncode == 1
        last = process.stderr.splitlines()[-1]
        assert last.startswith('error: ') and message in last
        assert last.endswith(f'the last good checkpoint is {tmp_path}/spoilt/epoch_1.pth')


FROZEN = {
    # of mmpretrain's ResNets the CIFAR one cannot be frozen: its stem has another name
    'model.backbone.type': 'ResNet',
    'model.backbone.frozen_stages': 1,
    'model.backbone.norm_eval': True,
}


@pytest.mark.parametrize(
    ('method', 'schedule'),
    [('lsq', {}), ('lsq', dict(reshape=0.4, freeze=0.8)), ('lsq_plus', {}), ('gdrq', {})],
    ids=['lsq', 'lsq in all stages', 'lsq_plus', 'gdrq'],
)
def test_frozen_stages_train_on_two_processes(train_on_two, tmp_path, method, schedule):
    """What frozen layers learn is not waited for, and what is not learned in a stage does not miss its gradient."""
    settings = dict(method=method, calibration_batches=2, schedule=schedule)
    finished(train_on_two('run', quantization=settings, **FROZEN))
    first, *_, last = same_states(tmp_path / 'run')
    frozen = [name for name in first if 'layer1' in name and name.endswith(('learned_step', '.weight'))]
    assert frozen and all(torch.equal(first[name], last[name]) for name in frozen)
    moving = [name for name in first if 'layer2' in name and name.endswith('own_input_quant.threshold')]
    assert moving and all(not torch.equal(first[name], last[name]) for name in moving)


@pytest.mark.full
@pytest.mark.parametrize(
    ('method', 'bits', 'buffer'), [('inq', 4, 'held'), ('loss_aware', 4, 'second'), ('tsq', 2, None)]
)
def test_what_a_method_keeps_of_the_training_is_the_same_in_both_processes(
    train_on_two, tmp_path, method, bits, buffer
):
    settings = dict(method=method, weight=dict(bits=bits), calibration_batches=2)
    finished(train_on_two('run', quantization=settings))
    first, *_, last = same_states(tmp_path / 'run')
    kept = [name for name in first if name.endswith(f'weight_quant.{buffer or "rounding"}')]
    assert len(kept) > 2 and all(last[name].any() for name in kept)
    if buffer:
        assert all(not torch.equal(first[name], last[name]) for name in kept)
    else:
        assert not any(first[name] for name in kept), 'weights are float in the first half'


@pytest.mark.parametrize('learning', [pytest.param(False, marks=pytest.mark.full), True])
def test_accumulation_over_the_end_of_an_epoch_resumes_exactly_on_two_processes(train_on_two, tmp_path, learning):
    """Each process gets its own gradients and sums back, which were not averaged yet."""
    settings = dict(method='lsq', calibration_batches=2) if learning else W4A4
    changes = {'optim_wrapper.accumulative_counts': 3, 'quantization': settings, **SYNC}
    finished(train_on_two('whole', **changes))
    kill = dict(type='tests.rank_hooks.Kill', at=6, number='SIGKILL')
    train_on_two('killed', custom_hooks=[kill], **changes)
    meta = torch.load(tmp_path / 'killed/epoch_1.pth', weights_only=False)['meta']
    assert len(meta['accumulated']) == 2
    finished(train_on_two('killed', '--resume', **changes))
    assert same(end_of(tmp_path / 'whole'), end_of(tmp_path / 'killed'))


def test_a_forked_process_ends_at_a_signal(make):
    """As the pools do that some metrics start: they end their workers by SIGTERM and wait for them without limit."""
    codes = []

    def fork(runner):
        if runner.iter == 1:
            child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(0.2)
            child.terminate()
            child.join(10)
            codes.append(child.exitcode)
            child.kill()

    runner = make()
    runner.register_hook(At(fork, 'before_train_iter'))
    runner.train()
    assert codes == [-signal.SIGTERM]


def test_training_that_fails_gives_the_signals_back(make):
    def fail(runner):
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    runner = make()
    runner.register_hook(At(fail, 'before_train_iter'))
    with pytest.raises(ZeroDivisionError):
        runner.train()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize('at', [5, 7], ids=['in an epoch', 'at its end'])
def test_one_process_stops_and_goes_on(config, tmp_path, at):
    def signalled(runner):
        if runner.iter == at:
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    QuantRunner.from_cfg(config('whole', quantization=W4A4)).train()
    assert signal.getsignal(signal.SIGTERM) == before
    stopped = QuantRunner.from_cfg(config('stopped', quantization=W4A4))
    stopped.register_hook(At(signalled, 'before_train_iter'))
    with pytest.raises(Stopped, match=f'SIGTERM after iteration {at + 1}:'):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) == before
    saved = (tmp_path / 'stopped/last_checkpoint').read_text()
    assert saved == str(tmp_path / 'stopped/stopped.pth')
    QuantRunner.from_cfg(config('stopped', quantization=W4A4, resume=True, load_from=saved)).train()
    assert same(end_of(tmp_path / 'whole'), end_of(tmp_path / 'stopped'))


@pytest.mark.parametrize(
    ('hooks', 'code', 'last'),
    [
        ([], 0, ''),
        ([dict(type='Spoil', what='gradient', at=2)], 1, 'error: the gradient of '),
        ([dict(type='Kill', at=2, number='SIGTERM')], 75, 'SIGTERM after iteration 3: saved '),
        ([dict(type='Break', at=2)], 1, 'ZeroDivisionError: broken'),
    ],
    ids=['done', 'error', 'stopped', 'bug'],
)
def test_what_is_left_of_other_processes_does_not_change_an_end(train_on_two, hooks, code, last):
    """Seen on slurm: a job whose training had ended well was aborted by gloo's threads."""
    hooks = [dict(hook, type=f'tests.rank_hooks.{hook["type"]}') for hook in [*hooks, dict(type='AbortAtExit')]]
    for process in train_on_two('run', epochs=1, custom_hooks=hooks):
        assert process.returncode == code, process.stderr
        assert last in (process.stderr.splitlines() or [''])[-1]


@pytest.mark.parametrize(
    ('hook', 'code', 'last'),
    [
        (dict(type='Kill', at=2, number='SIGTERM'), 75, 'SIGTERM after iteration 3: saved '),
        pytest.param(dict(type='Break', at=2), 1, 'ZeroDivisionError: broken', marks=pytest.mark.full),
    ],
    ids=['stopped', 'bug'],
)
def test_a_data_worker_that_hangs_does_not_keep_a_run_from_its_end(run, config, tmp_path, hook, code, last):
    hooks = [dict(type='tests.rank_hooks.Freeze', at=2), dict(hook, type=f'tests.rank_hooks.{hook["type"]}')]
    config(custom_hooks=hooks, **{'train_dataloader.num_workers': 1}).dump(tmp_path / 'run.py')
    ended = run(TRAIN, 'run.py')
    assert ended.returncode == code and ended.stderr.splitlines()[-1].startswith(last), ended.stderr


def test_data_workers_that_stay_until_the_end_leave_no_error(run, config, tmp_path):
    workers = {'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': True}
    config(epochs=1, **workers).dump(tmp_path / 'run.py')
    done = run(TRAIN, 'run.py')
    assert (done.returncode, done.stderr) == (0, '')


def test_slurm_without_a_gpu(run_all, config, tmp_path):
    """In the variables that srun sets; the port comes from the number of the job."""
    config(epochs=1, **{'env_cfg.dist_cfg.timeout': 30}).dump(tmp_path / 'config.py')
    shared = dict(SLURM_NTASKS='2', SLURM_NODELIST='localhost', SLURM_JOB_ID=str(os.getpid()), MASTER_ADDR='127.0.0.1')
    tasks = [dict(shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    finished(run_all(tasks, TRAIN, 'config.py', '--launcher', 'slurm'))
    assert (
        torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)['meta']['iter'] == 2
    )  # 64 pictures, 2 x 16 a step


def test_what_would_cut_weights_into_pieces_is_refused(config):
    wrapper = dict(type='MMFullyShardedDataParallel')
    with pytest.raises(UserError, match=r"model_wrapper_cfg.type='MMFullyShardedDataParallel' .*MMDistributedDataP"):
        QuantRunner.from_cfg(config(model_wrapper_cfg=wrapper))


# ---- scripts --------------------------------------------------------------------------------------------------------

COMMANDS = """#!/usr/bin/env bash
echo "$(basename "$0")$(printf ' %q' "$@")" >> "$LOG"
case $(basename "$0") in
    scontrol) echo "JobId=7 JobState=${STATE:-RUNNING} PreemptTime=${PREEMPTED:-None} SuspendTime=None" ;;
    srun) [ -z "${STOPPED:-}" ] || { sleep 0.02; touch "$STOPPED"; exit 75; } ;;
esac
"""
"""Stands in for the commands of slurm: writes down how it was called."""


@pytest.fixture
def script(tmp_path):
    """Runs a script of tools/ in tmp_path with commands of slurm that do nothing; returns how these were called."""
    folder, log = tmp_path / 'bin', tmp_path / 'calls'
    folder.mkdir()
    for name in ('sbatch', 'srun', 'scontrol'):
        (folder / name).write_text(COMMANDS)
        (folder / name).chmod(0o755)

    def script(name, *args, code=0, **variables):
        log.write_text('')
        path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), ENV['PATH']])
        environment = {**ENV, 'PATH': path, 'LOG': str(log), **variables}
        command = [ROOT / 'tools' / name, *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return script


TRAINING = ('part', 'my job', 'my config.py', 'work dir', '--cfg-options', 'a=[1,2]')


def test_slurm_train_submits_a_job_that_can_be_requeued(script, tmp_path):
    variables = dict(GPUS='16', GPUS_PER_NODE='4', CPUS_PER_TASK='3', SRUN_ARGS='--account=me --time=1:00')
    [(command, *options, wrap)] = script('slurm_train.sh', *TRAINING, **variables)
    assert command == 'sbatch'
    asked = {'--partition=part', '--job-name=my job', '--ntasks=16', '--ntasks-per-node=4', '--gres=gpu:4', '--requeue'}
    assert asked | {'--cpus-per-task=3', '--account=me', '--time=1:00', '--signal=USR1@120'} <= set(options)
    assert shlex.split(wrap.removeprefix('--wrap=')) == ['exec', str(ROOT / 'tools/slurm_train.sh'), *TRAINING]
    assert (tmp_path / 'work dir').is_dir()


def test_slurm_resources(script):
    def asked(**variables):
        [(_, *options)] = script('slurm_train.sh', *TRAINING, **variables)
        return [option for option in options if option.startswith(('--ntasks', '--gres'))]

    assert asked(GPUS='2') == ['--ntasks=2', '--ntasks-per-node=2', '--gres=gpu:2']
    assert asked(GPUS='0', NTASKS='3') == ['--ntasks=3']
    assert asked(GPUS='0') == ['--ntasks=1']


def test_slurm_train_in_its_job(script):
    [call] = script('slurm_train.sh', *TRAINING, SLURM_JOB_ID='7', CPUS_PER_TASK='3')
    launched = ['python', '-u', str(ROOT / 'tools/train.py'), 'my config.py', '--launcher', 'slurm']
    options = ['--work-dir', 'work dir', '--resume', '--cfg-options', 'a=[1,2]']
    assert call == ['srun', '--cpus-per-task=3', '--kill-on-bad-exit=1', *launched, *options]


@pytest.mark.parametrize(
    ('variables', 'requeued'),
    [
        (dict(STOPPED='work dir/stopped.pth'), True),
        (dict(STOPPED='another file'), False),
        (dict(STOPPED='another file', PREEMPTED='2026-01-31T10:00:00'), True),
        (dict(STOPPED='work dir/stopped.pth', STATE='COMPLETING'), False),
    ],
    ids=['stopped', 'failed', 'preempted at its start', 'cancelled'],
)
def test_slurm_train_requeues_what_was_stopped_only(script, tmp_path, variables, requeued):
    (tmp_path / 'work dir').mkdir()
    (tmp_path / 'work dir/stopped.pth').touch()  # of an earlier run
    calls = script('slurm_train.sh', *TRAINING, SLURM_JOB_ID='7', code=75, **variables)
    assert (['scontrol', 'requeue', '7'] in calls) == requeued


def test_slurm_test_waits(script):
    [call] = script('slurm_test.sh', 'part', 'my job', 'c.py', 'e.pth', '--tta', GPUS='1', SRUN_ARGS='--account=me')
    job = ['--partition=part', '--job-name=my job', '--ntasks=1', '--ntasks-per-node=1', '--gres=gpu:1']
    job += ['--cpus-per-task=5', '--kill-on-bad-exit=1', '--account=me']
    launched = ['python', '-u', str(ROOT / 'tools/test.py'), 'c.py', 'e.pth', '--launcher', 'slurm', '--tta']
    assert call == ['srun', *job, *launched]


@pytest.mark.parametrize('name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_too_few_arguments(script, name):
    assert script(name, 'one', code=2) == []


def test_dist_train_and_dist_test(script, config, tmp_path):
    """Through torchrun; the test of two processes gives what one gives."""
    config('work', epochs=1).dump(tmp_path / 'config.py')
    script('dist_train.sh', 'config.py', 2, '--work-dir', 'work', PORT=free_port())
    script('dist_test.sh', 'config.py', 'work/epoch_1.pth', 2, '--work-dir', 'two', PORT=free_port())
    record = json.loads((tmp_path / 'two/record.json').read_text())
    runner = QuantRunner.from_cfg(config('one', **TEST_ONLY, load_from=str(tmp_path / 'work/epoch_1.pth')))
    assert record['metrics'] == runner.test()
    assert len(list((tmp_path / 'work').glob('2*'))) == 1  # logs: one run of two processes, not two runs
