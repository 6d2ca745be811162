"""Kill training at random moments with SIGKILL, resume it each time, and compare the end with an undisturbed run.

    python -m tests.campaigns.kill --kills 50

A small quantized model is trained by `tools/train.py --resume` through all stages, with a checkpoint each epoch, of
which two are kept beside the best. Two fifths of the kills come at any time after the first iteration, two fifths while
a checkpoint is being written, the others while the program starts. After each, every visible checkpoint must be whole,
and the next start must go on from the one that find_resumable names. The end must be that of the undisturbed run to the
last bit. As long as kills are due, a finished run is followed by a new one.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.checkpoints import POINTER, find_resumable, read_checkpoint
from tests.campaigns.report import FIGURES, report
from tests.helpers import ENV, ROOT, same
from tests.runs import COUNTS, QUANTIZATION, tiny_config

EPOCHS = 8
KINDS = ('running', 'writing', 'starting')
PARTS = ('state_dict', 'optimizer', 'param_schedulers')


class Run:
    """A training process and what it printed."""

    def __init__(self, config, work_dir):
        command = [sys.executable, '-u', ROOT / 'tools/train.py', config, '--work-dir', work_dir, '--resume']
        self.log = Path(f'{work_dir}.log')
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(command, cwd=config.parent, env=ENV, stdout=log, stderr=subprocess.STDOUT)

    def wait_for(self, condition, limit=300):
        """Whether a condition came true before the process ended."""
        end = time.monotonic() + limit
        while self.process.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def text(self):
        return self.log.read_text(errors='replace')

    def trains(self):
        return 'Epoch(train)' in self.text()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def start(self):
        """The iteration from which it went on; 0 if it began anew, None if it did not come that far."""
        found = re.search(r'resumed epoch: \d+, iter: (\d+)', self.text())
        return int(found[1]) if found else (0 if self.trains() else None)


def prepare(folder):
    """The data and the config."""
    digits.COUNTS = COUNTS
    data = digits.build(folder / 'digits', show_progress=False)
    cfg = tiny_config(
        data,
        folder / 'run',
        quantization={**QUANTIZATION, 'schedule': dict(reshape=0.3, freeze=0.7)},
        epochs=EPOCHS,
        log_level='INFO',
        **{'default_hooks.checkpoint.max_keep_ckpts': 2, 'default_hooks.checkpoint.save_best': 'accuracy/top1'},
    )
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


def being_written(work_dir):
    return work_dir.is_dir() and any(name.endswith('.pth.tmp') for name in os.listdir(work_dir))


def wait(run, kind, work_dir, chance, epoch):
    """Wait for a moment of that kind; False if training ended before."""
    if kind == 'starting':
        return run.wait_for(lambda: False, chance.uniform(0, 8)) or run.process.poll() is None
    if not run.wait_for(run.trains):
        return False
    delay = chance.uniform(0, 2.5 * epoch)
    if kind == 'running':
        return run.wait_for(lambda: False, delay) or run.process.poll() is None
    run.wait_for(lambda: False, delay)
    if not run.wait_for(lambda: being_written(work_dir)):
        return False
    time.sleep(chance.choice((0, 0.001, 0.003, 0.01)))
    return run.process.poll() is None


def expected_start(work_dir, failures, where):
    """The iteration from which the next start has to go on, and that of the newest checkpoint; all are read."""
    newest = 0
    for path in work_dir.glob('*.pth'):
        try:
            newest = max(newest, read_checkpoint(str(path))['meta']['iter'])
        except UserError as error:
            failures.append(f'{where}: {error}')
    try:
        found, reason = find_resumable(work_dir)
    except UserError as error:
        failures.append(f'{where}: {error}')
        return 0, newest
    if reason and (work_dir / POINTER).exists():
        failures.append(f'{where}: {reason}')  # what is moved into place is never damaged
    return (read_checkpoint(found)['meta']['iter'] if found else 0), newest


def campaign(folder, kills, chance):
    """Counts, and what failed."""
    config, failures = prepare(folder), []
    whole = Run(config, folder / 'whole')
    whole.wait_for(whole.trains)
    begin = time.monotonic()
    assert whole.process.wait() == 0, whole.text()
    epoch = (time.monotonic() - begin) / EPOCHS
    last = f'epoch_{EPOCHS}.pth'
    expected = read_checkpoint(str(folder / 'whole' / last))
    counts = dict.fromkeys(('kills', *(f'kills while {kind}' for kind in KINDS)), 0)
    left = dict.fromkeys(('half a file was left', 'the pointer was behind', 'started anew', 'runs compared'), 0)
    while counts['kills'] < kills:
        work_dir = folder / f'run{left["runs compared"]}'
        expect = 0
        while True:
            run, where = Run(config, work_dir), f'{work_dir.name} after {counts["kills"]} kills'
            kind = chance.choices(KINDS, (2, 2, 1))[0]
            killed = counts['kills'] < kills and wait(run, kind, work_dir, chance, epoch) and run.kill()
            code = run.process.wait()
            start = run.start()
            if start not in (expect, None):
                failures.append(f'{where}: went on from iteration {start}, not {expect}')
            left['started anew'] += start == 0
            if not killed:
                break
            counts['kills'] += 1
            counts[f'kills while {kind}'] += 1
            left['half a file was left'] += being_written(work_dir)
            expect, newest = expected_start(work_dir, failures, where)
            left['the pointer was behind'] += expect < newest
            print(f'kill {counts["kills"]} {kind}: {start} -> {expect} of {newest}', flush=True)
        if code != 0:
            failures.append(f'{where}: ended with {code}: {run.text()[-500:]}')
            break
        found = read_checkpoint(str(work_dir / last))
        failures += [f'{where}: {part} differs' for part in PARTS if not same(found[part], expected[part])]
        left['runs compared'] += 1
    return {**counts, **left}, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=FIGURES / 'kill.json')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, failures = campaign(Path(folder), args.kills, random.Random(args.seed))
    report(args.out, rows, failures, seed=args.seed)


if __name__ == '__main__':
    main()
