"""Does memory grow with the length of training? 10,000 iterations of a tiny quantized model through the runner.

    python -m tests.campaigns.memory --iterations 10000

At a tenth of them and at the end: resident memory, and the bytes of what our quantizers, our hooks and mmengine's
message hub keep. Those of ours may grow by less than a byte an iteration. The hub keeps every logged scalar of every
iteration, up to a million each; that is mmengine's, and what resident memory may grow by, with 5 % for the allocator.
"""

import argparse
import gc
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import psutil
import torch.nn as nn
from mmengine.logging.history_buffer import HistoryBuffer
from mmpretrain.registry import MODELS
from torch import Tensor

from gdrq_mm.core.quantizers import Quantizer
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.campaigns.report import FIGURES, report
from tests.runs import COUNTS, QUANTIZATION, At, tiny_config


@MODELS.register_module()
class TwoConvolutions(nn.Sequential):
    """A backbone whose iterations cost little."""

    def __init__(self):
        convs = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Conv2d(8, 16, 3, stride=2, bias=False)
        super().__init__(convs[0], nn.BatchNorm2d(8), nn.ReLU(), convs[1], nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x):
        return (super().forward(x),)


def size(value):
    """Bytes of plain data and tensors; other objects count as nothing, as they do not belong to their holder."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, HistoryBuffer):
        return sum(array.nbytes for array in value.data)
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(size(part) for pair in value.items() for part in pair)
    if isinstance(value, (list, tuple, set, deque)):
        return sys.getsizeof(value) + sum(map(size, value))
    return sys.getsizeof(value) if isinstance(value, (int, float, str, bytes)) else 0


def kept(runner):
    """Bytes that live from iteration to iteration."""
    gc.collect()
    hub = runner.message_hub
    return {
        'resident': psutil.Process().memory_info().rss,
        'quantizers': sum(size(vars(m)) for m in runner.model.modules() if isinstance(m, Quantizer)),
        'hooks': sum(size(vars(h)) for h in runner.hooks if type(h).__module__.startswith('gdrq_mm')),
        'message hub': size(dict(hub.log_scalars)) + size(dict(hub.runtime_info)),
    }


def campaign(folder, iterations):
    """What is kept at a tenth of the iterations, and at the end."""
    digits.COUNTS = COUNTS
    data = digits.build(folder / 'digits', show_progress=False)
    changes = {
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations // 10),
        'param_scheduler': dict(type='CosineAnnealingLR', T_max=iterations, by_epoch=False),
        'model.backbone': dict(_delete_=True, type='TwoConvolutions'),
        'model.head.in_channels': 16,
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=iterations // 10, by_epoch=False),
        'default_hooks.logger.interval': 10,
        'custom_hooks': [dict(type='StatisticsHook', interval=iterations // 20)],
        'train_dataloader.batch_size': 8,
        'train_dataloader.sampler.type': 'InfiniteSampler',  # mmengine waits 2 s before an epoch of any other
    }
    schedule = dict(reshape=0.05, freeze=1.0)
    cfg = tiny_config(data, folder / 'run', quantization={**QUANTIZATION, 'schedule': schedule}, **changes)
    runner = QuantRunner.from_cfg(cfg)
    found = {}

    def look(runner):
        if runner.iter in (iterations // 10 + 1, iterations - 1):
            found[runner.iter] = kept(runner)
            print(runner.iter, found[runner.iter], flush=True)

    runner.register_hook(At(look, 'before_train_iter'))
    runner.train()
    return tuple(found.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--iterations', type=int, default=10_000)
    parser.add_argument('--out', type=Path, default=FIGURES / 'memory.json')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        early, late = campaign(Path(folder), args.iterations)
    moments = {args.iterations // 10: early, args.iterations: late}
    rows = {f'bytes, {name}, iteration {n}': value for n, moment in moments.items() for name, value in moment.items()}
    failures = [
        f'{name}: {early[name]} bytes, then {late[name]}'
        for name in ('quantizers', 'hooks')
        if late[name] - early[name] > args.iterations * 0.9  # a byte an iteration; lazy counters are a few in all
    ]
    growth = late['resident'] - early['resident'] - (late['message hub'] - early['message hub'])
    if growth > 0.05 * early['resident']:
        failures.append(f'resident memory grew by {growth} bytes besides the message hub')
    report(args.out, rows, failures)


if __name__ == '__main__':
    main()
