"""What the command-line tools share: config options, and errors as one line without a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..core.errors import Stopped, UserError, building
from .compat import check_environment, mute_debug_prints
from .distributed import leave

LAUNCHERS = {
    'pytorch': ('RANK', 'torchrun (tools/dist_train.sh, tools/dist_test.sh)'),
    'slurm': ('SLURM_PROCID', 'srun (tools/slurm_train.sh, tools/slurm_test.sh)'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}
"""Launcher -> a variable that its processes find, and the command that starts them."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """OpenMMLab's common options."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value, a.b=value, a=[1,2]'
    )
    parser.add_argument('--launcher', choices=['none', *LAUNCHERS], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        '--unsafe-load', action='store_true', help='unpickle anything a checkpoint holds; that runs its code'
    )


class ConfigOptions(DictAction):
    """mmengine's, with a message that says what was expected."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            first, *parts = value.partition('=')[0].split('.')
            if '=' not in value or not first.isidentifier() or not all(parts):
                raise UserError(f'--cfg-options {value}: write key=value')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            raise UserError(f'--cfg-options {" ".join(values)}: {error}'.splitlines()[0]) from None


def load_config(args: argparse.Namespace) -> Config:
    """The config of the command line, with its options merged in.

    Raises:
        UserError: the file does not exist or cannot be parsed, or the work directory cannot be written.
    """
    variable, starter = LAUNCHERS.get(args.launcher, ('', ''))
    if variable and variable not in os.environ:
        raise UserError(f'--launcher {args.launcher} is for processes that {starter} starts')
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if not isinstance(cfg.work_dir, str):
        raise UserError(f'work_dir={cfg.work_dir!r} is not a path')
    check_data(cfg)
    check_writable(Path(cfg.work_dir))
    return cfg


def read_config(config: str | Path, options: dict[str, Any] | None = None) -> Config:
    """A config file with options merged in.

    Raises:
        UserError: the file does not exist or cannot be parsed.
    """
    path = Path(config)
    if not path.is_file():
        raise UserError(f'config {path} does not exist{_near_files(path)}')
    mend_bases()
    mute_debug_prints()
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python code: anything can go wrong in it
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}'.splitlines()[0]) from error
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'--cfg-options do not fit the config: {error}'.splitlines()[0]) from None
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f'config {path} has no model')
    return cfg


def mend_bases() -> None:
    """Make `_base_ = 'mmseg::...'` and `_base_ = 'gdrq_mm::...'` work.

    mmengine 0.10.12 maps the former to a package name that is no longer used, and accepts no other packages.
    """
    MODULE2PACKAGE.update(mmseg='mmseg', gdrq_mm='gdrq_mm')


def build_runner(cfg: Config, args: argparse.Namespace) -> Runner:
    """The runner that the config asks for."""
    check_environment()
    name = cfg.get('runner_type', 'gdrq_mm.openmmlab.QuantRunner')
    with building(f'runner_type={name!r}'):
        runner_class = RUNNERS.get(name)
    if runner_class is None:
        raise UserError(f'runner_type={name!r} is not a registered runner, nor the full path of one')
    if hasattr(runner_class, 'unsafe_load'):
        runner_class.unsafe_load = args.unsafe_load
    elif 'quantization' in cfg:
        raise UserError(
            f'runner_type={name!r} does not quantize: it would ignore the quantization config; '
            'take gdrq_mm.openmmlab.QuantRunner'
        )
    with building('the config'):
        return runner_class.from_cfg(cfg)


def prepare_test(cfg: Config, checkpoint: str) -> None:
    """Leave only what a test of `checkpoint` needs: mmengine refuses a training loop without its optimizer."""
    cfg.load_from, cfg.resume = checkpoint, False
    for name in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'auto_scale_lr', 'param_scheduler'):
        cfg[name] = None
    for name in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[name] = None


def check_writable(folder: Path) -> None:
    """Create a folder, or say why that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.{os.getpid()}.probe'
        probe.touch()
        probe.unlink(missing_ok=True)  # a process on another machine may have the same number
    except OSError as error:
        raise UserError(f'work directory {folder} cannot be written: {error.strerror}') from None


def check_data(cfg: Config) -> None:
    """Say which command prepares the data that is missing."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        with building(name, 'cannot be read'):
            roots = list(_data_roots((cfg.get(name) or {}).get('dataset') or {}))
        for root in map(str, roots):
            if '://' not in root and not Path(root).is_dir():
                known = next((PREPARED[part] for part in Path(root).parts if part in PREPARED), None)
                how = f'; prepare it with: python tools/prepare_data.py {known}' if known else ''
                raise UserError(f'{name}: the data folder {root} does not exist{how}')


def _data_roots(dataset: dict[str, Any]) -> Iterator[str]:
    """Those of a data set's config, and of the data sets that it wraps."""
    if dataset.get('data_root'):
        yield dataset['data_root']
    for inner in (*dataset.get('datasets', ()), *filter(None, [dataset.get('dataset')])):
        yield from _data_roots(inner)


PREPARED = {
    'digits': 'digits',
    'VOCdevkit': 'voc --source PATH',
    **{name: f'{name} --source PATH' for name in ('bccd', 'camvid', 'cifar10', 'cityscapes', 'coco', 'imagenet')},
}
"""Folder name below data/ -> what to tell tools/prepare_data.py."""


def _near_files(path: Path) -> str:
    import difflib

    folder = path.parent if path.parent.is_dir() else Path('configs')
    names = [str(p) for p in folder.rglob('*.py') if not any(part.startswith('.') for part in p.parts)]
    close = difflib.get_close_matches(str(path), names, n=3, cutoff=0.5)
    return f'; nearest: {", ".join(close)}' if close else ''


def main(command: Callable[[], None]) -> NoReturn:
    """Run a tool and end the process as `ending` says."""
    leave(ending(command))


def ending(command: Callable[[], None]) -> str | int:
    """Run a tool; a UserError, a missing file, an interruption or a stop ends it with one line.

    Returns:
        What sys.exit takes: an exit code, or a last line.
    """
    try:
        command()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return 'interrupted'
    except Exception as error:
        if isinstance(error, (UserError, OSError)) and not os.environ.get('GDRQ_DEBUG'):
            return f'error: {error}'
        sys.excepthook(*sys.exc_info())
        return 1
    return os.EX_OK
