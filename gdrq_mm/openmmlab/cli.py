"""What the commands share: config options, and errors as one line without a traceback."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..core.errors import Stopped, UserError, command, extras_named, of_machine
from ..core.files import check_writable
from .checkpoint_runner import CheckpointRunner
from .compat import check_environment, mend_bases, mute_warnings, needed_variables
from .mistakes import config_mistake
from .processes import keep_freed_memory, leave
from .runner import QuantRunner
from .tasks import TASKS, scope_of

LAUNCHERS = {
    'pytorch': 'torchrun ({0}/dist_train.sh, {0}/dist_test.sh)',
    'slurm': 'srun ({0}/slurm_train.sh, {0}/slurm_test.sh)',
    'mpi': 'mpirun',
}
"""Launcher -> what starts its processes, with our scripts in the folder {0}."""
TOOLS = Path(__file__).resolve().parents[1] / '.mim' / 'tools'
"""The scripts of the commands and of launchers, as a wheel has them; in a checkout a link to tools/."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """OpenMMLab's common options."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='override settings: key=value, a.b=value, a=[1,2]'
    )
    parser.add_argument(
        '--cfg-values',
        action=ConfigValues,
        metavar='DICT',
        help='override settings by a Python dict: {"a.b": "x y"}',
    )
    parser.add_argument('--launcher', choices=['none', *LAUNCHERS], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add_unsafe_load(parser)


def add_unsafe_load(parser: argparse.ArgumentParser) -> None:
    """The option that lets files run code."""
    parser.add_argument(
        '--unsafe-load',
        action='store_true',
        help='run the code that checkpoints, pretrained weights and pickled data files (.pkl, .yml, .npy) hold',
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
        except RecursionError:  # mmengine takes dict(...) apart without an end
            raise UserError(f'--cfg-options {" ".join(values)}: a dict goes into --cfg-values') from None
        except (AssertionError, ValueError) as error:
            raise UserError(f'--cfg-options {" ".join(values)}: {error}'.splitlines()[0]) from None


class ConfigValues(argparse.Action):
    """A Python dict of settings: each value is taken as it is, where --cfg-options guesses what a text means."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            found = ast.literal_eval(values)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise UserError(f'--cfg-values {values}: write a Python dict of plain values, such as {{"a.b": "x y"}}')
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **found})


LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What --cfg-options and --cfg-values set."""
    return {**(args.cfg_options or {}), **(args.cfg_values or {})}


def load_config(args: argparse.Namespace, loaders: Iterable[str] = LOADERS) -> Config:
    """The config of the command line, with its options merged in.

    Args:
        loaders: those whose data the command reads; a machine need not have the others.

    Raises:
        UserError: the file does not exist or cannot be parsed, its data are not there, or the work directory cannot be
            written.
    """
    if missing := [name for name in needed_variables(args.launcher) if name not in os.environ]:
        scripts = 'tools' if command('train').startswith('python') else TOOLS
        starter = LAUNCHERS[args.launcher].format(scripts)
        lacking = f'{", ".join(missing)} is not set' if len(missing) == 1 else f'{", ".join(missing)} are not set'
        raise UserError(f'--launcher {args.launcher} is for processes that {starter} starts: {lacking}')
    cfg = read_config(args.config, given_settings(args))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    if not isinstance(cfg.work_dir, str):
        raise UserError(f'work_dir={cfg.work_dir!r} is not a path')
    check_data(cfg, loaders)
    check_writable(Path(cfg.work_dir))
    return cfg


def read_config(config: str | Path, options: dict[str, Any] | None = None) -> Config:
    """A config file with options merged in.

    Args:
        config: path of a file, or `PACKAGE::PATH` for one of the configs that a package brings.

    Raises:
        UserError: the file does not exist or cannot be parsed.
    """
    mend_bases()
    path = _in_package(str(config)) if '::' in str(config) else Path(config)
    if not path.is_file():
        raise UserError(f'config {path} does not exist{_near_files(path)}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is Python code: anything can go wrong in it
        if str(error).startswith('Failed to import custom modules'):
            cause = _first_cause(error)
            raise UserError(f'config {path}, custom_imports: {cause}; is its folder in PYTHONPATH?') from error
        if any(frame.name == 'import_modules_from_strings' for frame in traceback.extract_tb(error.__traceback__)):
            raise  # in a module of custom_imports
        raise UserError(f'config {path} cannot be read: {type(error).__name__}: {error}'.splitlines()[0]) from error
    try:
        cfg.merge_from_dict(options or {})
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(f'--cfg-options do not fit the config: {error}'.splitlines()[0]) from None
    if not isinstance(cfg.get('model'), dict):
        raise UserError(f'config {path} has no model')
    if cfg.get('quantization', 0) is None:  # mmengine's way to switch off what a base config has
        cfg.pop('quantization')
    if cfg.get('default_scope') is None and (scope := scope_of(cfg)) is not None:  # as in the new style of configs
        cfg.default_scope = scope
    return cfg


def _first_cause(error: BaseException) -> BaseException:
    """The exception that began it, of those that were raised while one was handled."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _in_package(config: str) -> Path:
    """The file that `PACKAGE::PATH` means."""
    try:
        path = Path(Config._get_cfg_path(config, '')[0])
    except Exception as error:  # assertions and others, by what is wrong
        raise UserError(f'config {config} cannot be found: {error}'.splitlines()[0]) from None
    if not path.is_file():
        raise UserError(f'config {config} cannot be found{_near_files(path)}')
    return path


TOGETHER = (
    ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    ('val_dataloader', 'val_cfg', 'val_evaluator'),
    ('test_dataloader', 'test_cfg', 'test_evaluator'),
)
"""Settings of which mmengine wants all or none."""


def build_runner(cfg: Config, args: argparse.Namespace) -> Runner:
    """The runner that the config asks for."""
    check_environment()
    for names in TOGETHER:
        missing = [name for name in names if cfg.get(name) is None]
        if missing and len(missing) < len(names):
            raise UserError(f'the config has no {" and no ".join(missing)}: {", ".join(names)} belong together')
    name = cfg.get('runner_type', 'gdrq_mm.openmmlab.QuantRunner')
    runner_class: Any = RUNNERS.get(name) if isinstance(name, str) else name
    if not isinstance(runner_class, type):
        raise UserError(f'runner_type={name!r} is not a registered runner, nor the full path of one')
    if 'quantization' in cfg and not issubclass(runner_class, QuantRunner):
        raise UserError(
            f'runner_type={name!r} does not quantize: it would ignore the quantization config; '
            'take gdrq_mm.openmmlab.QuantRunner'
        )
    if not issubclass(runner_class, CheckpointRunner) and not args.unsafe_load:
        raise UserError(
            f'runner_type={name!r} runs the code that checkpoints and data files hold; take '
            'gdrq_mm.openmmlab.QuantRunner, which leaves a model without quantization config float (or --unsafe-load)'
        )
    if args.unsafe_load:
        cfg.unsafe_load = True
    return runner_class.from_cfg(cfg)  # type: ignore[attr-defined]


def prepare_test(cfg: Config, checkpoint: str) -> None:
    """Leave only what a test of `checkpoint` needs: mmengine refuses a training loop without its optimizer.

    Raises:
        UserError: the config has no test data.
    """
    if not cfg.get('test_dataloader'):
        raise UserError('the config has no test_dataloader: there is nothing to test')
    cfg.load_from, cfg.resume = checkpoint, False
    for name in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'auto_scale_lr', 'param_scheduler'):
        cfg[name] = None
    for name in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        cfg[name] = None


def check_data(cfg: Config, loaders: Iterable[str] = LOADERS) -> None:
    """Say which command prepares the data that is missing.

    Args:
        loaders: names of the data loaders to look at.
    """
    for name in loaders:
        loader = cfg.get(name) or {}
        if not isinstance(loader, dict):
            raise UserError(f'{name}={loader!r} is not a dict')
        for root in _data_roots(loader.get('dataset') or {}, f'{name}.dataset'):
            if '://' not in root and not Path(root).is_dir():
                known = next((PREPARED[part] for part in Path(root).parts if part in PREPARED), None)
                how = f'; prepare it with: {command("data")} {known}' if known else ''
                raise UserError(f'{name}: the data folder {root} does not exist{how}')


def _data_roots(dataset: Any, path: str) -> Iterator[str]:
    """Those of a data set's config, and of the data sets that it wraps."""
    if not isinstance(dataset, dict):
        raise UserError(f'{path}={dataset!r} is not a dict')
    if dataset.get('data_root') and not _is_elsewhere(dataset):
        yield str(dataset['data_root'])
    inner = dataset.get('datasets') or []
    if not isinstance(inner, (list, tuple)):
        raise UserError(f'{path}.datasets={inner!r} is not a list')
    if dataset.get('dataset'):
        yield from _data_roots(dataset['dataset'], f'{path}.dataset')
    for number, each in enumerate(inner):
        yield from _data_roots(each, f'{path}.datasets[{number}]')


def _is_elsewhere(dataset: dict[str, Any]) -> bool:
    """Whether mmengine reads the files of a data set by a storage backend, to which a path means what it likes."""
    pipeline = dataset.get('pipeline')
    parts = [dataset, *(pipeline if isinstance(pipeline, list) else ())]
    return any(isinstance(each, dict) and bool(each.get('backend_args')) for each in parts)


PREPARED = {
    'digits': 'digits',
    'VOCdevkit': 'voc --source PATH',
    **{name: f'{name} --source PATH' for name in ('bccd', 'camvid', 'cifar10', 'cityscapes', 'coco', 'imagenet')},
}
"""Folder name below data/ -> what to tell `gdrq data`."""


def _near_files(path: Path) -> str:
    """The nearest names beside a path and below configs/; what lies below any other folder may be a whole disk."""
    found = dict.fromkeys([*path.parent.glob('*.py'), *Path('configs').rglob('*.py')])
    names = [str(p) for p in found if not p.name.startswith('.')]
    close = difflib.get_close_matches(str(path), names, n=3, cutoff=0.5)
    return f'; nearest: {", ".join(close)}' if close else ''


def _of_library(error: Exception) -> bool:
    """Whether a library of OpenMMLab raised it while it was imported, as for mmcv without operators."""
    if not isinstance(error, (ImportError, AssertionError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    imported = [frame.f_globals.get('__name__', '') for frame in frames if frame.f_code.co_name == '<module>']
    return any(name.partition('.')[0] in ('mmengine', 'mmcv', *TASKS) for name in imported)


def main(function: Callable[[], None]) -> NoReturn:
    """Run a command and end the process as `ending` says."""
    keep_freed_memory()
    mute_warnings()
    leave(ending(function))


def ending(function: Callable[[], None]) -> str | int:
    """Run a command; a UserError, a mistake in the config, a full disk, an interruption, a stop end it with one line.

    Any other exception shows its traceback.

    Returns:
        What sys.exit takes: an exit code, or a last line.
    """
    try:
        with extras_named():
            function()
    except UserError as error:
        return f'error: {error}'
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return 'interrupted'
    except Exception as error:
        if isinstance(error, OSError) and of_machine(error):
            return f'error: {of_machine(error)}'
        if _of_library(error):
            reason = ' '.join(str(error).split())
            return f'error: OpenMMLab cannot be imported: {reason}; {command("doctor")} tells more'
        mistake = config_mistake(error)
        if mistake:
            return f'error: the config cannot be used: {mistake}'
        sys.excepthook(*sys.exc_info())
        return 1
    return os.EX_OK
