"""A slurm of its own for the tests: a controller and two nodes of one CPU each on loopback, in a folder."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers import ENV

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol', 'squeue', 'scancel')
# Nodes are called by their addresses, which processes find without a name server. A requeued job waits until its
# credential has expired: 5 s (2 s had no effect) instead of two minutes. Trainings take a port by the
# number of their job, so that numbers differ from those of another slurm on this machine.
SETTINGS = """
ClusterName=tests
FirstJobId={ports[0]}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=127.0.0.2 Port={ports[2]} CPUs=1
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=100
PartitionName=high Nodes=ALL PriorityTier=2
"""


class Cluster:
    """Runs within a `with` block, whatever other slurm the machine has: ports, key and files are its own.

    Without the programs the tests end with one line.
    """

    def __init__(self, folder):
        self.folder = folder
        self.environment = {name: value for name, value in ENV.items() if not name.startswith(('SLURM_', 'SBATCH_'))}
        self.environment['SLURM_CONF'] = str(folder / 'slurm.conf')
        path = [str(Path(sys.executable).parent), os.environ['PATH'], '/usr/sbin']
        self.environment['PATH'] = os.pathsep.join(path)
        missing = [name for name in PROGRAMS if shutil.which(name, path=self.environment['PATH']) is None]
        if missing:
            pytest.exit(f'{", ".join(missing)} not found; install the packages slurm-wlm and munge', returncode=1)

    def __enter__(self):
        with ExitStack() as self._stack:
            self.folder.mkdir()
            self._stack.callback(shutil.rmtree, self.folder)
            self._start_munge()
            (self.folder / 'state').mkdir()
            settings = SETTINGS.format(ports=free_ports(3), user=getpass.getuser(), folder=self.folder)
            (self.folder / 'slurm.conf').write_text(settings)
            self._start('slurmctld', '-D')
            for node in ('127.0.0.1', '127.0.0.2'):
                self._start('slurmd', '-D', '-N', node)
            self._stack.callback(self._cancel)
            wait(lambda: self.run('sinfo', '--noheader', '-p', 'low', '-o', '%D %t') == '2 idle\n', 60, self.logs)
            self._stack = self._stack.pop_all()  # nothing went wrong: what was started stays
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def _start_munge(self):
        key = self.folder / 'munge.key'
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f'--{kind}-file={self.folder}/munge.{kind}' for kind in ('key', 'pid', 'seed', 'log')]
        # --force: it wants a socket that all users can reach, but these folders are of one user
        self._start('munged', '--foreground', '--force', f'--socket={self.folder}/munge.socket', *files)
        wait((self.folder / 'munge.socket').exists, 10, self.logs)

    def _start(self, *command):
        """A daemon; in a session of its own, so that an interruption of the tests does not end it before its jobs."""
        with open(self.folder / f'{command[0]}.log', 'a') as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, start_new_session=True)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)

    def _cancel(self):
        """End all jobs, which would outlive the daemons."""
        self.run('scancel', '--user', getpass.getuser())
        wait(lambda: self.run('squeue', '--noheader') == '', 60, self.logs)

    def logs(self):
        """The ends of the daemons' logs."""
        return '\n'.join(f'{path}:\n{path.read_text()[-2000:]}' for path in sorted(self.folder.glob('*.log')))

    def run(self, *command, cwd=None, **variables):
        """Run a command that finds this slurm; returns its output."""
        environment = {**self.environment, **variables}
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f'{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}'
        return done.stdout

    def job(self, number):
        """What slurm says of a job: a dict with JobState, Restarts, and so on."""
        line = self.run('scontrol', 'show', 'job', '--oneliner', number)
        return dict(part.split('=', 1) for part in line.split() if '=' in part)


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for probe in sockets:
        probe.bind(('127.0.0.1', 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def wait(done, seconds, explain):
    """Until `done()` is true; after `seconds` fail with what `explain()` says."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)
