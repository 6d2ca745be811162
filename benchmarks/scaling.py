#!/usr/bin/env python
"""Weak scaling of a training step over one and two processes, float and GDRQ, and what moving the thresholds costs.

Each process has one thread and the same batch, so the work a process does not change; a step is that of train_step.py
under DistributedDataParallel with gloo. Every round runs one step of each model alone and on both processes, in an
order drawn anew; the time of two processes is that of the slower one. Efficiency is the median of one over that of two.

ThresholdHook adds up the statistics of all activation quantizers over the processes in one all_reduce a step. It is
timed by itself, with all processes at its start, and all_reduce for vectors of several lengths gives the latency and
the bandwidth of the formula in docs/speed.md. Prints tables and writes a JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contestants import build
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shared import write_figure
from torch.nn.parallel import DistributedDataParallel
from train_step import WARM_UP

from gdrq_mm.core.errors import check_least
from gdrq_mm.core.modules import moving_quantizers
from gdrq_mm.core.quantizers.following import collected
from gdrq_mm.openmmlab.cli import check_writable, main

MODELS = ('float', 'gdrq')
SIZES = (1, 64, 1024, 16384, 262144, 4194304)
"""Numbers in the vectors that are added up."""
GPUS = (8, 64, 512)


def serve(commands: Connection, rank: int, size: int, store: str, args: argparse.Namespace) -> None:
    """One process: builds the models, then does what it is told and answers with seconds."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=size)
    steps, numbers = {}, 0
    for name in MODELS:
        contestant = build(name, 'contiguous', 'float32', 'ResNet-18', args.batch, args.size)
        following = moving_quantizers(contestant.model).values()
        numbers = max(numbers, collected(following).numel() if following else 0)
        contestant.model = DistributedDataParallel(contestant.model, broadcast_buffers=False)  # as mmengine does
        steps[name] = contestant.step
    for command in iter(commands.recv, 'end'):
        if command in steps:
            answer: Any = steps[command]()
        else:
            answer = {n: [all_reduce(n) for _ in range(args.collectives)] for n in (numbers, *SIZES)}
        commands.send(answer)
    dist.destroy_process_group()


def all_reduce(numbers: int) -> float:
    """Seconds to add up so many float32 numbers over the processes, from when all of them are there."""
    vector = torch.ones(numbers)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(vector)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: str, console: Console) -> tuple[dict[tuple[int, str], list[float]], dict]:
    """Seconds of the steps by processes and model, and of the collectives of two processes by their size."""
    context = mp.get_context('spawn')
    worlds: dict[int, list[Connection]] = {1: [], 2: []}
    for size, connections in worlds.items():
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, f'{folder}/store{size}', args)
            context.Process(target=serve, args=arguments, daemon=True).start()
            theirs.close()
            connections.append(ours)

    def ask(size: int, command: str) -> list[Any]:
        for connection in worlds[size]:
            connection.send(command)
        return [connection.recv() for connection in worlds[size]]

    keys = [(size, name) for size in worlds for name in MODELS]
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in keys}
    shuffle = random.Random(0).shuffle
    for number in track(range(WARM_UP + args.rounds), 'timing', console=console, transient=True):
        shuffle(keys)
        for key in keys:
            slower = max(ask(*key))
            if number >= WARM_UP:
                seconds[key].append(slower)
    collectives = ask(2, 'collectives')[0]
    for connection in (c for connections in worlds.values() for c in connections):
        connection.send('end')
    return seconds, collectives


def constants(collectives: dict[int, list[float]]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes a second of a message, from all_reduce between two processes.

    A ring of P sends 2 (P - 1) messages of 1/P of the vector one after the other (Thakur et al., 2005): for two
    processes t = 2 latency + bytes / bandwidth. Fitted to the relative error over all sizes.
    """
    medians = {4 * n: statistics.median(times) for n, times in collectives.items()}
    sizes, times = np.array(list(medians)), np.array(list(medians.values()))
    (double_latency, inverse), *_ = np.linalg.lstsq(
        np.stack([np.ones_like(times), sizes], axis=1) / times[:, None], np.ones_like(times), rcond=None
    )
    return double_latency / 2, 1 / inverse


def on_paper(latency: float, bandwidth: float, size: int) -> list[dict[str, float]]:
    """Seconds of the collective for more processes: as a ring, and as a tree, which libraries take for few bytes."""
    return [
        dict(
            gpus=gpus,
            ring=2 * (gpus - 1) * (latency + size / gpus / bandwidth),
            tree=2 * np.ceil(np.log2(gpus)) * (latency + size / bandwidth),
        )
        for gpus in GPUS
    ]


def show(found: dict[str, Any], console: Console) -> None:
    """The tables."""
    table = Table(title='A training step', title_justify='left')
    for column in ('model', '1 process, ms', '2 processes, ms', 'efficiency'):
        table.add_column(column, justify='left' if column == 'model' else 'right')
    for row in found['steps']:
        table.add_row(row['model'], *(f'{1000 * row[n]:.1f}' for n in ('one', 'two')), f'{row["efficiency"]:.3f}')
    console.print(table)
    sync = found['synchronization']
    console.print(
        f'Thresholds: {sync["numbers"]} numbers in one collective, {1e6 * sync["seconds"]:.0f} us, '
        f'{100 * sync["share"]:.3f} % of the step of two processes; '
        f'latency {1e6 * sync["latency"]:.0f} us, bandwidth {sync["bandwidth"] / 1e9:.2f} GB/s',
        soft_wrap=True,
    )
    for row in sync['on_paper']:
        console.print(f'{row["gpus"]} processes: ring {1e3 * row["ring"]:.2f} ms, tree {1e3 * row["tree"]:.2f} ms')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=8, help='images a process (default: %(default)s)')
    parser.add_argument('--size', type=int, default=224, help='image size in pixels (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=15, help='timed steps of each (default: %(default)s)')
    parser.add_argument('--collectives', type=int, default=50, help='timed collectives (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=Path('docs/figures/scaling.json'), help='default: %(default)s')
    args = parser.parse_args()
    check_least(args, batch=1, size=64, rounds=1, collectives=1)
    return args


def run() -> None:
    args = parse_args()
    check_writable(args.out.parent)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        seconds, collectives = measure(args, folder, console)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    steps = [
        dict(model=m, one=medians[1, m], two=medians[2, m], efficiency=medians[1, m] / medians[2, m]) for m in MODELS
    ]
    numbers = next(iter(collectives))
    cost = statistics.median(collectives[numbers])
    latency, bandwidth = constants({n: collectives[n] for n in SIZES})
    synchronization = dict(
        numbers=numbers,
        seconds=cost,
        share=cost / medians[2, 'gdrq'],
        latency=latency,
        bandwidth=bandwidth,
        on_paper=on_paper(latency, bandwidth, 4 * numbers),
    )
    found = dict(
        settings={key: getattr(args, key) for key in ('batch', 'size', 'rounds', 'collectives')},
        steps=steps,
        synchronization=synchronization,
        seconds={f'{name}, {size}': times for (size, name), times in seconds.items()},
        collectives={str(n): statistics.median(times) for n, times in collectives.items()},
    )
    show(found, console)
    write_figure(args.out, found, console)


if __name__ == '__main__':
    main(run)
