"""A grid of runs from one file: methods x bits x seeds x configs, each cell trained and tested by the project's tools.

A sweep file is a Python config:

    work_dir = 'work_dirs/sweep'          # training logs and checkpoints, one folder for each cell
    records = 'docs/records/sweep'        # run records, one file for each cell; a cell that has one is finished
    # A cell is its whole configuration. If any of it changes (the config, a file that it inherits, an option, the float
    # checkpoint), the cell is run anew; the old record and work directory are kept beside the new ones, as NAME.old-1.
    # A record that was removed is made anew, from the start.
    runs = [
        dict(
            name='cifar10',               # how the names of its cells begin
            config='configs/cls/resnet18_width16_gdrq_w4a4_cifar10.py',     # load_from is its float checkpoint
            float_config='configs/cls/resnet18_width16_cifar10.py',         # optional: tested once, the baseline
            methods=['gdrq', 'lsq'],
            bits=['w4a4', 'w2a4'],
            seeds=[0, 1, 2],
            variants={'': {}, 'project': {'quantization.weight.gdrq.clip': 'project'}},     # optional
            options={'train_cfg.max_epochs': 3},                        # optional: settings of every cell
            last=3,                      # optional: mean of so many last checkpoints, for small data; of the float
                                         # baseline too, if its checkpoint has a name like epoch_20.pth
            amp=True)]                                                  # optional
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..core.config import Quantization, near
from ..core.errors import UserError
from ..core.files import file_digest
from ..core.quantizers import METHODS
from ..report.record import plain
from .cli import TOOLS, read_config
from .describe import compared_by
from .sweep_cell import Cell

KEYS = dict(work_dir=str, records=str, runs=list)
RUN_KEYS = dict(
    name=str,
    config=str,
    float_config=str,
    methods=list,
    bits=list,
    seeds=list,
    variants=dict,
    options=dict,
    amp=bool,
    last=int,
)
OPTIONAL = {'float_config', 'variants', 'options', 'amp', 'last'}


def _whole(cfg: Config, seed: int | None, amp: bool, start: str) -> dict[str, Any]:
    """The whole configuration of a cell as plain data: the resolved config, its seed, and the float checkpoint."""
    config = {key: value for key, value in plain(cfg.to_dict()).items() if key not in ('work_dir', 'load_from')}
    found = dict(config=config, seed=seed, amp=amp, start=_digest_of_file(start) or start)
    teacher = ((cfg.get('quantization') or {}).get('distill') or {}).get('teacher')
    return found | ({'teacher': _digest_of_file(teacher) or teacher} if teacher else {})


@functools.lru_cache
def _digest_of_file(path: str) -> str | None:
    return file_digest(path)


def read_sweep(path: str) -> list[Cell]:
    """The cells of a sweep file in the order of its runs, the float baseline of a run first.

    Raises:
        UserError: lists everything that is wrong with the file, one line each.
    """
    if not Path(path).is_file():
        raise UserError(f'sweep file {path} does not exist')
    try:
        sweep = Config.fromfile(path).to_dict()
    except Exception as error:  # it is Python code: anything can go wrong in it
        raise UserError(f'sweep file {path} cannot be read: {type(error).__name__}: {error}'.splitlines()[0]) from None
    problems = list(_wrong_keys(sweep, KEYS, path))
    runs = sweep.get('runs') if isinstance(sweep.get('runs'), list) else []
    whole = not problems
    cells: list[Cell] = []
    for number, run in enumerate(runs):
        place = f'runs[{number}]'
        found = list(_wrong_keys(run, RUN_KEYS, place)) if isinstance(run, dict) else [f'{place} is not a dict']
        problems += found
        if whole and not found:
            made = list(_cells(sweep, run, place))
            cells += [cell for cell in made if isinstance(cell, Cell)]
            problems += dict.fromkeys(cell for cell in made if isinstance(cell, str))
    names = [cell.name for cell in cells]
    problems += [f'two cells are called {name}' for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise UserError(f'{len(problems)} errors in {path}:\n  ' + '\n  '.join(problems))
    return cells


def _wrong_keys(found: Mapping[str, Any], keys: Mapping[str, type], place: str) -> Iterator[str]:
    for key in found:
        if key not in keys:
            yield f"{place} has no key '{key}'{near(key, keys)}"
    for key, kind in keys.items():
        if key in found and not isinstance(found[key], kind):
            yield f'{place}.{key}={found[key]!r} is not a {kind.__name__}'
        elif key in found and kind is list and not found[key]:
            yield f'{place}.{key} is empty'
        elif key not in found and key not in OPTIONAL:
            yield f'{place} has no {key}'


def _cells(sweep: Mapping[str, Any], run: Mapping[str, Any], place: str) -> Iterator[Cell | str]:
    """The cells of a run, or what is wrong with them."""
    problems = [
        f'{place}.{where}'
        for name, settings in (('options', run.get('options', {})), *run.get('variants', {}).items())
        for where in _not_plain(settings, 'options' if name == 'options' else f'variants[{name!r}]')
    ]
    problems += [
        f'{place}.variants: the name {v!r} is not a string' for v in run.get('variants', {}) if type(v) is not str
    ]
    if run.get('last', 1) < 1:
        problems.append(f'{place}.last={run["last"]} is not at least 1')
    if problems:
        yield from problems
        return
    try:
        cfg = read_config(run['config'], run.get('options'))
        before = read_config(run['float_config']) if 'float_config' in run else None
    except UserError as error:
        configs = [run['config'], run.get('float_config', run['config'])]
        there = all('::' in config or Path(config).is_file() for config in configs)
        yield from [f'{place}: {error}'] if there else _later(sweep, run, f'{place}: {error}')
        return
    if not cfg.get('load_from'):
        yield f'{place}: {run["config"]} has no load_from: a quantized run starts from a float checkpoint'
        return
    problems += [f'{place}: {text}' for text in _conflicts(cfg, run['methods'])]
    tested = before is not None and all(
        each.get('test_dataloader') and each.get('test_evaluator') for each in (before, cfg)
    )
    if tested and compared_by(before) != compared_by(cfg):
        what = 'model' if compared_by(before)[0] != compared_by(cfg)[0] else 'evaluation'
        problems.append(f'{place}: the {what} of {run["float_config"]} is not that of {run["config"]}')
    if problems:
        yield from problems
        return
    if before is not None:
        yield _float_cell(sweep, run, cfg, before, place)
    for name, (bits, method, variant, seed) in _named(run):
        settings = run.get('variants', {'': {}})[variant]
        yield _cell(sweep, run, name, method, bits, settings, seed, f'{place}: {name}')


def _named(run: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any, str, Any]]]:
    """The name of each quantized cell of a run, with its bits, method, variant and seed."""
    for cell in itertools.product(run['bits'], run['methods'], run.get('variants', {'': {}}), run['seeds']):
        bits, method, variant, seed = cell
        yield '-'.join(filter(None, [run['name'], str(method), variant, str(bits), f'seed{seed}'])), cell


def _later(sweep: Mapping[str, Any], run: Mapping[str, Any], missing: str) -> Iterator[Cell]:
    """The cells of a run whose config does not exist yet, as one that `tools/allocate.py` is to write."""
    names = [f'{run["name"]}-float'] if 'float_config' in run else []
    for name in [*names, *(name for name, _ in _named(run))]:
        yield dataclasses.replace(_made(sweep, name, [], run['config'], None, {}, {}), missing=missing)


def _float_cell(
    sweep: Mapping[str, Any], run: Mapping[str, Any], cfg: Config, before: Config, place: str
) -> Cell | str:
    """The test of the float baseline: of as many last checkpoints as the quantized cells, where they have numbers."""
    last = run.get('last', 1) if re.fullmatch(r'(epoch|iter)_\d+\.pth', Path(cfg.load_from).name) else 1
    if last > (kept := _kept_checkpoints(before)):
        return f'{place}.last={last} is not at most {kept}, the checkpoints that {run["float_config"]} leaves'
    settings = _whole(before, None, False, cfg.load_from) | ({'last': last} if last > 1 else {})
    cell = _made(sweep, f'{run["name"]}-float', [], run['float_config'], cfg.load_from, {}, settings, last)
    return dataclasses.replace(cell, missing=_missing(cfg, run['config'], place))


def _missing(cfg: Config, config: str, place: str) -> str:
    """What is said where the checkpoint that a cell starts from does not exist; '' where it does."""
    if '://' in cfg.load_from or Path(cfg.load_from).is_file():
        return ''
    return f'{place}: the float checkpoint {cfg.load_from} of {config} does not exist'


def _conflicts(cfg: Config, methods: list[Any]) -> Iterator[str]:
    """The sides whose method the config sets itself, so that a cell would not be of the method that its name says."""
    for number, side in enumerate(('weight', 'activation')):
        own = ((cfg.get('quantization') or {}).get(side) or {}).get('method')
        for method in methods:
            if own is not None and isinstance(method, str) and method in METHODS and METHODS[method][number] != own:
                yield f'the config sets quantization.{side}.method={own!r}, which method {method!r} does not replace'


def _cell(
    sweep: Mapping[str, Any],
    run: Mapping[str, Any],
    name: str,
    method: Any,
    bits: Any,
    variant: Any,
    seed: Any,
    place: str,
) -> Cell | str:
    match = re.fullmatch(r'w(\d+)a(\d+)', str(bits))
    if match is None:
        return f'{place}: bits {bits!r} are not written like w4a4'
    if not isinstance(seed, int) or isinstance(seed, bool) or not isinstance(variant, dict):
        return f'{place}: the seed is not an integer, or the variant is not a dict of settings'
    named = {
        'quantization.method': method,
        'quantization.weight.bits': int(match[1]),
        'quantization.activation.bits': int(match[2]),
        'randomness.seed': seed,
    }
    options = {
        **named,
        'default_hooks.checkpoint.max_keep_ckpts': run.get('last', 1),
        **run.get('options', {}),
        **variant,
    }
    try:
        cfg = read_config(run['config'], options)
        Quantization.from_dict(cfg.quantization)
    except UserError as error:
        return f'{place}: {error}'
    for key, value in named.items():
        part: Any = cfg
        for name_of_part in key.split('.'):
            part = part[name_of_part]
        if part != value:
            return f'{place}: options or the variant set {key}={part!r}, but the name of the cell says {value!r}'
    last = 1 if method == 'ptq' else run.get('last', 1)
    if last > (kept := _kept_checkpoints(cfg)):
        run_place = place.split(':')[0]
        return f'{run_place}.last={last} is not at most {kept}, the checkpoints that its training leaves'
    work = Path(sweep['work_dir']) / name
    checkpoint = f'{work}/calibrated.pth' if method == 'ptq' else None
    if method == 'ptq':
        first = [TOOLS / 'calibrate.py', run['config'], cfg.load_from, '--out', checkpoint]
    else:
        first = [TOOLS / 'train.py', run['config'], '--resume', *(['--amp'] if run.get('amp') else [])]
    amp = bool(run.get('amp')) and method != 'ptq'
    whole = _whole(cfg, seed, amp, cfg.load_from)
    if last not in (1, cfg.default_hooks.checkpoint.get('max_keep_ckpts')):  # else that tells it
        whole['last'] = last
    cell = _made(sweep, name, first, run['config'], checkpoint, options, whole, last)
    return dataclasses.replace(cell, missing=_missing(cfg, run['config'], place.split(':')[0]))


def _kept_checkpoints(cfg: Config) -> float:
    """How many numbered checkpoints a training leaves at most, by its config; inf where that does not say it."""
    hook, loop = cfg.get('default_hooks', {}).get('checkpoint', {}), cfg.get('train_cfg') or {}
    steps = loop.get('max_epochs' if hook.get('by_epoch', True) else 'max_iters')
    if not isinstance(steps, int):
        return math.inf
    default = -1 if 'type' in hook else 1
    interval = 1 if hook.get('save_best') else hook.get('interval', default)  # a best score is saved as well
    saved = set(range(hook.get('save_begin') or interval, steps + 1, interval) if interval > 0 else ())
    saved |= {steps} if hook.get('save_last', True) else set()
    kept = hook.get('max_keep_ckpts', -1)
    return min(len(saved), kept) if kept > 0 else len(saved)


def _made(
    sweep: Mapping[str, Any],
    name: str,
    first: list[Any],
    config: str,
    checkpoint: str | None,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    last: int = 1,
) -> Cell:
    """A cell whose command runs `first`, if there is something, and tests a checkpoint.

    Args:
        checkpoint: None is the last one that training wrote into the work directory.
        last: checkpoints that are tested, this one and those before it.
    """
    work, record = Path(sweep['work_dir']) / name, Path(sweep['records']) / f'{name}.json'
    cell = Cell(name, '', record, work / 'log.txt', settings)
    common = ['--work-dir', str(work), *(['--cfg-values', repr(dict(options))] if options else [])]
    tested = shlex.quote(checkpoint) if checkpoint else f'"$(cat {shlex.quote(str(work / "last_checkpoint"))})"'
    before, after = [str(TOOLS / 'test.py'), config], [*common, '--record', str(record), '--cell', cell.digest]
    after += ['--last', str(last)] if last != 1 else []
    steps = [[*map(str, first), *common]] if first else []
    commands = [shlex.join([sys.executable, *step]) for step in steps]
    commands.append(f'{shlex.join([sys.executable, *before])} {tested} {shlex.join(after)}')
    commands.append(shlex.join(['touch', str(cell.done)]))
    return dataclasses.replace(cell, command=' && '.join(commands))


def _not_plain(settings: Any, place: str) -> Iterator[str]:
    """What of some settings cannot be told to a tool as a value."""
    if not isinstance(settings, dict):
        yield f'{place}={settings!r} is not a dict of settings'
        return
    for key, value in settings.items():
        try:
            same = isinstance(key, str) and ast.literal_eval(repr(value)) == value
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            same = False
        if not same:
            yield f'{place}[{key!r}]={value!r} is not plain data: numbers, strings, None, lists, dicts'
