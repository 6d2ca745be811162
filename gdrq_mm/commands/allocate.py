"""Choose bits for each layer within a budget, and write a config with them that can be read and changed.

Three ways to judge bits: by the gradients of the loss (minutes), by the metric with one layer quantized at a time (a
test run for each layer and number of bits; it goes on where it stopped), or by learning them in a training.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..core.errors import UserError, check_least, command
from ..core.files import check_file, write_whole
from ..core.mixed.allocation import Allocation, config_text
from ..core.mixed.budgets import read_budgets
from ..core.mixed.choices import bits_to_try
from ..core.mixed.program import monotone
from ..deploy.runtime import RUNTIMES, installed_backends
from ..openmmlab.amp import use_amp
from ..openmmlab.checkpoints import checkpoint_digest
from ..openmmlab.cli import add_config_arguments, build_runner, given_settings, load_config
from ..openmmlab.data_only import data_only
from ..openmmlab.describe import model_name
from ..openmmlab.mixed import check_target, open_chooser, prepare, search_bits, times_of, written_settings
from ..openmmlab.models import read_quantization
from ..openmmlab.sensitivities import SensitivityFile, batches_of, measure_loss, measure_metric
from ..openmmlab.sweep_cell import digest_of
from ..report.allocation import allocation_page, curve_picture
from ..report.record import plain

UNITS = dict(loss='expected rise of the loss', metric='summed loss of {}', search='-log of the learned share')
"""Way -> what its sensitivities are."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a quantized config')
    parser.add_argument('checkpoint', help='path or address of the float checkpoint')
    add_config_arguments(parser)
    parser.add_argument(
        '--budget',
        nargs='+',
        action='extend',
        required=True,
        metavar='KIND=LIMIT',
        help='size (bytes) and bitops (bit operations), up to 1 as a share of the float model; ms in a runtime',
    )
    parser.add_argument('--out', type=Path, required=True, help='config to write, NAME.py, with NAME.html and NAME.png')
    bits = 'to choose from, as 2 4 8 or 2,4,8 (default: 2 3 4 8 that the method has)'
    parser.add_argument('--bits', type=numbers, nargs='+', action='extend', help=bits)
    parser.add_argument('--by', choices=list(UNITS), default='loss', help='how bits are judged (default: %(default)s)')
    parser.add_argument('--sensitivities', type=Path, help='JSON file (default: WORK_DIR/sensitivities_BY.json)')
    batches = 'training batches for the gradients of --by loss, and for the thresholds of bits (default: %(default)s)'
    parser.add_argument('--batches', type=int, default=8, help=batches)
    parser.add_argument('--samples', type=int, help='--by metric: so many test pictures, evenly spaced (default: all)')
    metric = "--by metric: its key, the higher the better (default: the task's main one)"
    parser.add_argument('--metric', help=metric)
    parser.add_argument('--amp', action='store_true', help='--by search: automatic mixed precision')
    parser.add_argument('--runtime', choices=list(RUNTIMES), help='for ms (default: onnxruntime)')
    parser.add_argument('--threads', type=int, help="for ms (default: the runtime's choice)")
    args = parser.parse_args()
    if args.launcher != 'none':
        raise UserError('--launcher: bits are chosen in one process')
    check_least(args, batches=1, samples=1, threads=1)
    args.bits = args.bits and [b for several in args.bits for b in several]
    return args


def numbers(text: str) -> list[int]:
    """The integers of a text such as '2,4,8'."""
    return [int(each) for each in text.split(',')]


def check_used(args: argparse.Namespace, limits: dict[str, float]) -> None:
    """Refuse options that this way of choosing bits does not read.

    Raises:
        UserError: names the option, and what it is for.
    """
    ways = dict(samples=('metric',), metric=('metric',), sensitivities=('loss', 'metric'), amp=('search',))
    for name, by in ways.items():
        if getattr(args, name) and args.by not in by:
            raise UserError(f'--{name} is for --by {" and ".join(by)}')
    for name in ('runtime', 'threads'):
        if getattr(args, name) and 'ms' not in limits:
            raise UserError(f'--{name} is for --budget ms=...')


def judge(cfg: Any, args: argparse.Namespace, limits: dict[str, float]) -> tuple[Allocation, str]:
    """Measure and choose; the answer, and what its sensitivities are."""
    file = args.sensitivities or Path(cfg.work_dir) / f'sensitivities_{args.by}.json'
    read = ['model', 'data_preprocessor', 'train_dataloader', 'randomness']
    read += ['test_dataloader', 'test_evaluator'] if args.by == 'metric' else []
    about = dict(
        by=args.by,
        checkpoint=checkpoint_digest(args.checkpoint) or args.checkpoint,
        quantization=cfg.quantization.to_dict(),
        config=digest_of({key: plain(cfg[key]) for key in read if cfg.get(key)}),
        batches=args.batches,
        **(dict(samples=args.samples, metric=args.metric) if args.by == 'metric' else {}),
    )
    sensitivities = None
    if args.by != 'search':
        check_file(file, '--sensitivities')
        sensitivities = SensitivityFile(file, about)
    runner = build_runner(cfg, args)

    def start() -> Any:
        times = times_of(runner, args.runtime, args.threads) if 'ms' in limits else None
        return open_chooser(runner, limits, args.bits, batches_of(runner, args.batches), times)

    if sensitivities is None:
        chooser, table = search_bits(runner, limits, start)
        return chooser.allocate(table, limits), UNITS['search']
    runner.load_calibrated()
    with data_only(args.unsafe_load):
        chooser = start()
        if args.by == 'loss':
            measure_loss(runner, chooser.candidates, sensitivities, batches_of(runner, args.batches))
        else:
            measure_metric(runner, chooser.candidates, sensitivities, args.samples, args.metric)
    unit = UNITS[args.by].format(sensitivities.notes.get('title', ''))
    return chooser.allocate(monotone(sensitivities.table(chooser.candidates)), limits), unit


def main() -> None:
    args = parse_args()
    limits = read_budgets(args.budget)
    check_used(args, limits)
    cfg = load_config(args, ('train_dataloader', 'test_dataloader'))
    base = check_target(args.out, args.config)
    if args.amp:
        use_amp(cfg)
    args.runtime = args.runtime or next(iter(RUNTIMES))
    if 'ms' in limits and args.runtime not in installed_backends():
        raise UserError(f"{args.runtime} is not installed: uv pip install 'gdrq-mm[deploy]'")
    prepare(cfg, args.checkpoint, args.by, args.unsafe_load)
    quantization = read_quantization(cfg)
    assert quantization is not None, 'prepare() refuses a float config'
    bits_to_try(quantization, args.bits, bool(limits.keys() - {'size'}))
    settings = written_settings(cfg, given_settings(args), args.checkpoint)
    found, unit = judge(cfg, args, limits)
    name = model_name(cfg)
    about = [f'{name} in mixed precision, chosen by tools/allocate.py --by {args.by}. Change what you like.']
    if 'ms' in limits:
        about.append(f'Times: the sum of its layers, each alone, in {args.runtime}.')
    facts = dict(
        config=args.config, checkpoint=args.checkpoint, sha256=checkpoint_digest(args.checkpoint) or '', by=args.by
    )
    write_whole(args.out.with_suffix('.png'), curve_picture(found, unit))
    write_whole(args.out.with_suffix('.html'), allocation_page(found, unit, name, facts).encode())
    write_whole(args.out, config_text(found, base, about, unit, settings).encode())
    print('\n'.join(found.summary(unit)))
    print(f'Wrote {args.out}, and beside it .html and .png; train it: {command("train")} {shlex.quote(str(args.out))}')
