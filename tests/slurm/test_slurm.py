"""tools/slurm_train.sh, tools/slurm_test.sh and the jobs of tools/sweep.py on a real slurm: `make test-slurm`.

A quantized YOLOX (yolox.py) is trained and tested on two nodes with a process each.
"""

import json
from pathlib import Path

import pytest
import torch

from gdrq_mm.data import digits
from tests.helpers import ROOT, same
from tests.slurm.cluster import Cluster, wait

TWO = dict(GPUS='0', NTASKS='2', CPUS_PER_TASK='1')
SHORT = ('--cfg-options', 'train_cfg.max_epochs=2')  # of two iterations
ENDS = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'PREEMPTED', 'NODE_FAIL')


class Site:
    """A folder from which jobs are handed to a slurm; trainings write below work/."""

    def __init__(self, folder, cluster):
        self.folder, self.cluster = folder, cluster

    def run(self, *command, **variables):
        """Output of a command."""
        return self.cluster.run(*command, cwd=self.folder, **variables).strip()

    def train(self, name, *options, hold=None, slurm=''):
        """Hands a training to slurm; returns the number of the job.

        Args:
            options: of tools/train.py.
            hold: where it waits for a signal, see tests/rank_hooks.py.
            slurm: options of sbatch.
        """
        hooks = [] if hold is None else [dict(type='tests.rank_hooks.Hold', at=hold)]
        base = Path(__file__).with_name('yolox.py')
        (self.folder / f'{name}.py').write_text(f'_base_ = {str(base)!r}\ncustom_hooks = {hooks}\n')
        command = [ROOT / 'tools/slurm_train.sh', 'low', name, f'{name}.py', f'work/{name}', *options]
        return self.run(*command, **TWO, SRUN_ARGS=f'--parsable {slurm}')

    def reach(self, job, state):
        """Waits until a job has a state; returns what slurm says of it then."""

        def explain():
            logs = [path.read_text()[-3000:] for path in self.folder.glob(f'work/*/slurm-{job}.out')]
            return '\n'.join([f'{state} expected: {self.cluster.job(job)}', *logs, self.cluster.logs()])

        wait(lambda: self.cluster.job(job)['JobState'] in (state, *ENDS), 300, explain)
        found = self.cluster.job(job)
        assert found['JobState'] == state, explain()
        return found

    def held(self, name, job):
        """Waits until both processes of a training stand still in their Hold hook."""
        self.reach(job, 'RUNNING')
        notes = [self.folder / f'work/{name}/held_{rank}' for rank in range(2)]
        wait(lambda: all(note.exists() for note in notes), 150, lambda: self.log(name, job))

    def preempt(self):
        """Takes a node away from the job that runs on both."""
        command = ['sbatch', '--parsable', '--partition=high', '--ntasks=1', '--output=high.out', '--wrap=sleep 1']
        self.reach(self.run(*command), 'COMPLETED')

    def log(self, name, job):
        """All output of a training's job."""
        return (self.folder / f'work/{name}/slurm-{job}.out').read_text()

    def outcome(self, name):
        """Metrics of the last validation, and what the last checkpoint holds."""
        folder = self.folder / 'work' / name
        lines = max(folder.glob('2*/vis_data/scalars.json')).read_text().splitlines()
        metrics = [line for line in map(json.loads, lines) if 'coco/bbox_mAP' in line][-1]
        checkpoint = torch.load(folder / 'epoch_20.pth', weights_only=False)
        state = {key: checkpoint[key] for key in ('state_dict', 'optimizer', 'param_schedulers')}
        return {key: value for key, value in metrics.items() if key.startswith('coco/')}, state


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    with Cluster(folder / 'cluster') as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', {'cls': {'train': 1, 'test': 1}, 'scenes': {'train': 8, 'test': 1}})
        digits.build(folder / 'data/digits', show_progress=False)
        yield Site(folder, cluster)


@pytest.fixture(scope='module')
def whole(site):
    """What came of a training that nothing interrupted."""
    job = site.reach(site.train('whole'), 'COMPLETED')
    assert (job['NumNodes'], job['Restarts']) == ('2', '0')
    return site.outcome('whole')


def test_a_preempted_training_goes_on_and_gives_the_same_detector(site, whole):
    job = site.train('preempted', hold=13)  # in the middle of an epoch
    site.held('preempted', job)
    site.preempt()
    assert site.reach(job, 'COMPLETED')['Restarts'] == '1'
    assert 'SIGTERM after iteration 14: saved' in site.log('preempted', job)
    metrics, state = site.outcome('preempted')
    assert metrics == whole[0] and metrics['coco/bbox_mAP'] > 0.05
    assert same(state, whole[1])


def test_slurm_test_measures_what_training_did(site, whole):
    command = [ROOT / 'tools/slurm_test.sh', 'low', 'test', 'whole.py', 'work/whole/epoch_20.pth']
    site.run(*command, '--work-dir', 'work/test', **TWO)
    record = json.loads((site.folder / 'work/test/record.json').read_text())
    assert record['metrics'] == whole[0]
    assert (record['task'], record['model']['bits']) == ('det', [4, 4])


def test_a_training_that_is_preempted_while_it_starts_is_requeued(site):
    job = site.train('starting', *SHORT, hold='start')
    site.held('starting', job)
    site.preempt()
    assert site.reach(job, 'COMPLETED')['Restarts'] == '1'


def test_a_training_near_its_time_limit_is_requeued(site):
    """Slurm looks at limits every 30 s: the signal comes up to a minute earlier than asked."""
    job = site.train('limited', *SHORT, hold=1, slurm='--time=2 --signal=USR1@30')
    site.held('limited', job)
    assert site.reach(job, 'COMPLETED')['Restarts'] == '1'
    assert 'SIGUSR1 after iteration 2: saved' in site.log('limited', job)


def test_a_cancelled_training_is_not_requeued(site):
    job = site.train('cancelled', *SHORT, hold=1)
    site.held('cancelled', job)
    site.run('scancel', job)
    wait(lambda: site.run('squeue', '--noheader') == '', 60, lambda: site.log('cancelled', job))
    assert site.reach(job, 'CANCELLED')['Restarts'] == '0'
    assert 'SIGTERM after iteration 2: saved' in site.log('cancelled', job)


def test_a_training_that_fails_is_not_requeued(site):
    job = site.train('failed', '--cfg-options', 'quantization.weight.bits=99')
    assert site.reach(job, 'FAILED')['Restarts'] == '0'


def test_cells_of_a_sweep_run_as_jobs(site, whole):
    options = {'load_from': 'work/whole/epoch_20.pth', 'train_cfg.max_epochs': 1}
    run = dict(name='cell', config='whole.py', methods=['gdrq'], bits=['w2a4'], seeds=[3], options=options)
    sweep = dict(work_dir='work/sweep', records='records', runs=[run])
    (site.folder / 'sweep.py').write_text(''.join(f'{key} = {value!r}\n' for key, value in sweep.items()))
    command = ['python', ROOT / 'tools/sweep.py', 'sweep.py']
    site.run(*command, '--slurm', 'jobs.sh', '--slurm-args', '-p low --ntasks=1')
    site.reach(site.run('bash', 'jobs.sh').split()[-1], 'COMPLETED')
    assert site.run(*command, '--list') == 'cell-gdrq-w2a4-seed3: finished'
