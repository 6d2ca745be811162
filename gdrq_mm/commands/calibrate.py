"""Quantize a float checkpoint without training: thresholds from a few training batches (post-training quantization)."""

import argparse
import shlex
from pathlib import Path

from ..core.errors import UserError, command
from ..core.files import check_file
from ..openmmlab.cli import add_config_arguments, build_runner, given_settings, load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a quantized config, such as one with method ptq')
    parser.add_argument('checkpoint', help='path or address of the float checkpoint')
    add_config_arguments(parser)
    parser.add_argument('--out', help='quantized checkpoint to write (default: WORK_DIR/calibrated.pth)')
    args = parser.parse_args()
    cfg = load_config(args, ('train_dataloader', 'test_dataloader'))
    out = Path(args.out or Path(cfg.work_dir) / 'calibrated.pth')
    check_file(out, '--out')
    cfg.load_from, cfg.resume = args.checkpoint, False
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = build_runner(cfg, args)
    if not hasattr(runner, 'calibrate'):
        raise UserError(f'runner_type={cfg.runner_type!r} does not quantize')
    runner.calibrate(str(out))
    settings = given_settings(args)
    same = ['--work-dir', args.work_dir] if args.work_dir else []
    same += ['--cfg-values', repr(settings)] if settings else []
    then = f'{command("test")} {shlex.join([args.config, str(out), *same])}'
    runner.logger.info(f'Wrote {out}; evaluate it with: {then}')
