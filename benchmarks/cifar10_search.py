#!/usr/bin/env python
"""The short search that sets GDRQ's default k: one epoch of training on CIFAR-10 for each setting, from one checkpoint.

    python benchmarks/cifar10_search.py --checkpoint work_dirs/resnet18_width16_cifar10/epoch_180.pth --jobs 2

Every setting is trained by tools/train.py and tested by tools/test.py, under the same recipe and seed; finished ones
are not run again. Writes docs/figures/cifar10_search.json and prints a table.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from gdrq_mm.core.errors import UserError, check_least
from gdrq_mm.core.files import write_whole
from gdrq_mm.openmmlab.cli import main
from gdrq_mm.report.record import read_record

ROOT = Path(__file__).resolve().parent.parent
WEIGHT, ACTIVATION = 'quantization.weight.gdrq', 'quantization.activation.gdrq'
SETTINGS: list[tuple[str, str, dict[str, object]]] = [
    ('w4a4', 'defaults', {}),
    *(('w4a4', f'activation k = {k}', {f'{ACTIVATION}.k': k}) for k in (3.6, 6, 8)),
    *(('w4a4', f'weight k = {k}', {f'{WEIGHT}.k': k}) for k in (3.5, 5.5)),
    ('w2a4', 'defaults', {}),
    *(('w2a4', f'weight k = {k}', {f'{WEIGHT}.k': k}) for k in (1.5, 2.5)),
]
"""Bits, name, config options. What is not named has its default."""
EPOCH = {'train_cfg.max_epochs': 1, 'param_scheduler.T_max': 1, 'default_hooks.checkpoint.max_keep_ckpts': 1}


def run(bits: str, name: str, options: dict[str, object], checkpoint: str, work_dir: Path) -> dict | None:
    """Train and test one setting; its run record, or None if it failed."""
    folder = work_dir / f'{bits}_{name}'.replace(' ', '_').replace('=', '').replace(',', '')
    config = str(ROOT / f'configs/cls/resnet18_width16_gdrq_{bits}_cifar10.py')
    given = ['--cfg-options', *(f'{key}={value}' for key, value in {**options, **EPOCH}.items())]
    if not (folder / 'record.json').is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'output.txt', 'w') as output:
            for command in (
                ['train.py', config, '--amp', '--no-validate', *given, f'load_from={checkpoint}'],
                ['test.py', config, str(folder / 'epoch_1.pth'), *given],
            ):
                call = [sys.executable, str(ROOT / 'tools' / command[0]), *command[1:], '--work-dir', str(folder)]
                if subprocess.run(call, stdout=output, stderr=output, check=False).returncode:
                    return None
    return read_record(folder / 'record.json')


def search() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='float checkpoint of resnet18_width16_cifar10')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once, a thread each')
    parser.add_argument(
        '--bits', nargs='+', default=['w4a4', 'w2a4'], choices=['w4a4', 'w2a4'], help='which of the settings'
    )
    parser.add_argument('--work-dir', default='work_dirs/cifar10_search')
    parser.add_argument('--out', default=str(ROOT / 'docs/figures/cifar10_search.json'))
    args = parser.parse_args()
    check_least(args, jobs=1)
    if not Path(args.checkpoint).is_file():
        raise UserError(f'checkpoint {args.checkpoint} does not exist')
    os.environ['OMP_NUM_THREADS'] = '1'
    settings = [setting for setting in SETTINGS if setting[0] in args.bits]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, *setting, args.checkpoint, Path(args.work_dir)) for setting in settings]
        records = [future.result() for future in track(futures, 'settings')]
    rows = []
    table = Table('bits', 'setting', 'top-1 in %', title='CIFAR-10, ResNet-18 of width 16, one epoch from float')
    for (bits, name, options), record in zip(settings, records):
        top1 = record and record['metrics']['accuracy/top1']
        table.add_row(bits.upper(), name, 'failed' if record is None else f'{top1:.2f}')
        row = dict(bits=bits, setting=name, options=options, top1=top1)
        if record is not None:
            row.update(seed=record['training']['seed'], **{key: record[key] for key in ('git', 'versions', 'hardware')})
        rows.append(row)
    write_whole(args.out, (json.dumps(rows, indent=1) + '\n').encode())
    Console().print(table)


if __name__ == '__main__':
    main(search)
