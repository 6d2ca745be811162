"""Test a float or a quantized checkpoint of any task, and write a run record."""

import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process

from ..core.errors import UserError, command
from ..core.files import check_file
from ..openmmlab.checkpoints import checkpoints_before
from ..openmmlab.cli import add_config_arguments, build_runner, load_config, prepare_test
from ..openmmlab.describe import make_record, mean_of
from ..openmmlab.models import bare_model
from ..openmmlab.recipe import other_settings
from ..openmmlab.tasks import dump_after_build, dump_before_build, metrics_of, show_predictions, task_of, use_tta
from ..report.record import RUNTIMES, write_record


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path or address of the checkpoint')
    add_config_arguments(parser)
    parser.add_argument('--out', help='predictions: a .pkl file, for segmentation a folder of index PNGs')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a picture is shown')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--last', type=int, default=1, metavar='N', help='the mean of the checkpoint and the N - 1 before it'
    )
    parser.add_argument(
        '--record',
        help='run record (default: WORK_DIR/record.json; with --backend, --parts, --tta or --last its name says so)',
    )
    parser.add_argument('--backend', choices=RUNTIMES, help='runtime that runs the exported graphs (default: torch)')
    parser.add_argument('--exported', help=f'folder that {command("export")} wrote, for --backend')
    parser.add_argument(
        '--parts', action='store_true', help='test the graphs of the parts, not end2end.onnx; --tta does so too'
    )
    parser.add_argument('--cell', help=argparse.SUPPRESS)  # what `gdrq sweep` calls the settings of a cell
    args = parser.parse_args()
    if bool(args.backend) != bool(args.exported):
        raise UserError('--backend and --exported DIR belong together')
    if args.parts and not args.backend:
        raise UserError('--parts belongs to --backend and --exported DIR')
    if args.last != 1 and (args.backend or args.out or args.show or args.show_dir):
        raise UserError('--last is for metrics of checkpoints: without --backend, --out, --show and --show-dir')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args, ('test_dataloader',))
    task_of(cfg)  # the record states it: what has none is refused before it is tested
    ways = [args.backend, 'parts' * args.parts, 'tta' * args.tta, f'last{args.last}' * (args.last != 1)]
    name = '_'.join(filter(None, ['record', *ways])) + '.json'
    record = Path(args.record or Path(cfg.work_dir) / name)
    check_file(record, '--record')
    earlier = checkpoints_before(args.checkpoint, args.last - 1)
    prepare_test(cfg, args.checkpoint)
    if args.show or args.show_dir:
        show_predictions(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        use_tta(cfg)
    if args.out:
        dump_before_build(cfg, args.out)
    runner = build_runner(cfg, args)
    if args.out:
        dump_after_build(cfg, runner, args.out)
    parts = args.parts or args.tta
    described: dict[str, Any] = {'backend': args.backend or 'torch'}
    if args.backend:
        from ..openmmlab.bundle import use_runtime  # with onnx, an extra of the package

        described['parts'] = parts
        use_runtime(bare_model(runner.model), args.exported, args.backend, args.checkpoint, parts=parts)
    metrics = runner.test()
    described, training = {**runner.describe(), **described}, runner.training
    others = [runner.test_another(checkpoint) for checkpoint in earlier]
    if not is_main_process():
        return
    if not metrics and any(metric.get('format_only') for metric in metrics_of(cfg)):
        runner.logger.warning('format_only: predictions were written and not evaluated, so there is no run record')
        return
    found = make_record(cfg, args.checkpoint, metrics, described, training)
    if others:
        found.update(mean_of(found, dict(zip(earlier, others))))
    for line in other_settings(found['quantization'], cfg.get('quantization')):
        runner.logger.warning(f'{line}; the record states the former')
    write_record({**found, 'cell': args.cell} if args.cell else found, record)
    runner.logger.info(f'Wrote the run record {record}')
