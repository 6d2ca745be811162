"""Which layers cost the accuracy: the metric with only one layer quantized, SQNR, clipping, distributions.

A float checkpoint is calibrated first, as `gdrq calibrate` does. Writes analysis.json, analysis.png and weights.png.
"""

import argparse
import datetime
import json
from pathlib import Path

from rich.console import Console

from ..core.errors import UserError, check_least
from ..core.files import check_writable, write_whole
from ..openmmlab.analysis import analyze, load, prepare, weights_of
from ..openmmlab.checkpoints import checkpoint_digest, read_checkpoint
from ..openmmlab.cli import add_config_arguments, build_runner, check_data, load_config
from ..openmmlab.describe import model_name
from ..openmmlab.models import bare_model
from ..openmmlab.tasks import task_of
from ..openmmlab.weights import check_fits, state_of
from ..report.analysis import analysis_dict, analysis_table, cost_picture, weight_sheet
from ..report.provenance import git_revision, hardware, versions
from ..report.text import print_whole


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='path of a quantized config')
    parser.add_argument('checkpoint', help='path or address of a quantized checkpoint, or of a float one')
    add_config_arguments(parser)
    parser.add_argument('--out', help='folder for JSON and pictures (default: WORK_DIR/analysis)')
    parser.add_argument('--samples', type=int, help='use so many test pictures, evenly spaced (default: all)')
    parser.add_argument(
        '--metric', help="metric that tells the cost, the higher the better (default: the task's main one)"
    )
    parser.add_argument(
        '--reference',
        choices=['float', 'quantized'],
        help='quantize one layer of the float model (default), or make one layer of the quantized model float, for '
        'weights that training has adapted to their quantizers',
    )
    parser.add_argument('--no-metric', action='store_true', help='statistics only: one run over the pictures')
    parser.add_argument('--layers', nargs='+', default=[], metavar='PATTERN', help='look at these layers only')
    parser.add_argument('--float-checkpoint', help='where training started: its weights are drawn beside those of now')
    args = parser.parse_args()
    if args.launcher != 'none':
        raise UserError('--launcher: the analysis runs in one process')
    check_least(args, samples=1)
    if args.no_metric and (args.metric or args.reference):
        raise UserError('--metric and --reference tell how costs are measured, and --no-metric measures none')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args, ('test_dataloader',))
    out = Path(args.out or Path(cfg.work_dir) / 'analysis')
    check_writable(out)
    calibrate = prepare(cfg, args.checkpoint, args.unsafe_load)
    if calibrate:
        check_data(cfg, ('train_dataloader',))
    runner = build_runner(cfg, args)
    load(runner, calibrate)
    model, start = bare_model(runner.model), None
    if args.float_checkpoint:
        start = read_checkpoint(args.float_checkpoint, args.unsafe_load)
        check_fits(model, start, args.float_checkpoint, share=1.0)
        start = state_of(start)
    found = analyze(
        runner, args.layers, args.samples, args.metric, None if args.no_metric else args.reference or 'float'
    )
    about = dict(
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        task=task_of(cfg),
        model=dict(name=model_name(cfg), **runner.describe()),
        config=args.config,
        quantization=cfg.quantization.to_dict(),
        checkpoint=dict(file=args.checkpoint, sha256=checkpoint_digest(args.checkpoint), calibrated_here=calibrate),
        git=git_revision(),
        versions=versions(),
        hardware=hardware(),
    )
    files = {'analysis.png': cost_picture(found)}
    weights = weights_of(model, found.rows, start)
    if weights:
        files['weights.png'] = weight_sheet(weights, {row.name: row for row in found.rows})
    files['analysis.json'] = (json.dumps(analysis_dict(found, **about), indent=1) + '\n').encode()
    for name, data in files.items():
        write_whole(out / name, data)
    console = Console(markup=False)  # a path is none
    print_whole(console, analysis_table(found))
    console.print(f'Wrote {", ".join(files)} to {out}', highlight=False, soft_wrap=True)
