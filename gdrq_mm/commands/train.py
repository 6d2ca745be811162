"""Train a float or a quantized config of any task."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config

from ..core.errors import UserError
from ..openmmlab.amp import use_amp
from ..openmmlab.checkpoints import find_resumable
from ..openmmlab.cli import add_config_arguments, build_runner, check_data, load_config
from ..openmmlab.distill import name_teacher


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    add_config_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the newest of the work directory',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size'
    )
    parser.add_argument('--no-validate', action='store_true', help='do not validate while training')
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args, ('train_dataloader',))
    adapt(cfg, args)
    check_data(cfg, ['val_dataloader' if cfg.get('val_dataloader') else 'test_dataloader'])  # of the trial prediction
    name_teacher(cfg)
    reason = ''
    if args.resume == 'auto':
        found, reason = find_resumable(cfg.work_dir, checkpoint_folder(cfg), args.unsafe_load)
        if found:  # else start anew, from the config's load_from
            cfg.resume, cfg.load_from = True, found
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    runner = build_runner(cfg, args)
    if reason:
        how = f'resuming from {cfg.load_from}, the newest whole checkpoint' if cfg.resume else 'starting anew'
        runner.logger.warning(f'{reason}; {how}')
    runner.train()


def adapt(cfg: Config, args: argparse.Namespace) -> None:
    """Change the config as the options say."""
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        scale = cfg.get('auto_scale_lr') or {}
        if isinstance(scale, dict):  # else the runner refuses it
            if 'base_batch_size' not in scale:
                raise UserError(
                    '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the pictures of a step over all '
                    'processes that its learning rate is for'
                )
            cfg.auto_scale_lr = {**scale, 'enable': True}
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None


def checkpoint_folder(cfg: Config) -> Path:
    """Where mmengine's CheckpointHook writes."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if not isinstance(hook, dict):
        raise UserError(f'default_hooks.checkpoint={hook!r} is not a dict')
    out_dir = hook.get('out_dir')
    return Path(out_dir, Path(cfg.work_dir).name) if out_dir else Path(cfg.work_dir)
