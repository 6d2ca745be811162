"""Mixed precision for a config: its model with the choices of bits, times of its layers, and the search for bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner

from ..core.errors import UserError
from ..core.files import check_file
from ..core.mixed.allocation import Chooser
from ..core.mixed.budgets import choices_of_layers
from ..core.mixed.search import BitSearch
from ..core.modules import hooked, modes_kept, only
from ..deploy.layer_times import TimedLayer, costs_of, time_layers, timed_layer
from ..report.layers import totals
from .checkpoints import read_checkpoint
from .hooks import SettleHook, StatisticsHook, StopHook
from .loading import trials_of
from .models import bare_model
from .runner import QuantRunner
from .seeding import kept_random_state
from .sensitivities import loss_of
from .weights import is_quantized

NOT_IN_A_SEARCH = (CheckpointHook, EMAHook, SettleHook, StatisticsHook, StopHook)
"""Hooks for a model that is kept; that of a search is not."""


def prepare(cfg: Config, checkpoint: str, by: str, unsafe: bool = False) -> None:
    """Remove from a config what choosing bits does not need, and start from `checkpoint`.

    Args:
        by: 'loss', 'metric' or 'search', how bits are judged.

    Raises:
        UserError: the config quantizes nothing or has no test data for the metric, or the checkpoint is not of the
            float model: training has adapted its weights to their quantizers, and without them it computes something
            else.
    """
    if 'quantization' not in cfg:
        raise UserError('the config has no quantization: there are no bits to choose')
    if cfg.quantization.get('control'):
        raise UserError('quantization.control=True: the model stays float, there are no bits to choose')
    if by == 'metric' and not cfg.get('test_dataloader'):
        raise UserError('the config has no test_dataloader: --by metric has nothing to run it on')
    if is_quantized(read_checkpoint(checkpoint, unsafe)):
        raise UserError(
            f'checkpoint {checkpoint} is of a quantized model; bits are chosen for the float one: name that'
        )
    cfg.load_from, cfg.resume = checkpoint, False
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if by != 'search':
        cfg.log_level = 'WARNING'


def open_chooser(
    runner: Any,
    limits: Mapping[str, float],
    bits: Sequence[int] | None,
    batches: Sequence[Any],
    times: Mapping[str, Callable[[Any], float]] | None = None,
) -> Chooser:
    """The choices of a runner whose model is loaded and calibrated.

    Args:
        limits: kind of a budget -> its limit. With a size alone, inputs keep the bits of the config.
        bits: to choose from.
        batches: training batches for the thresholds of other bits.
        times: see Costs.

    Raises:
        UserError: there is nothing to choose, or a budget is impossible.
    """
    model, size = bare_model(runner.model), totals(bare_model(runner.model), runner.report).float_bytes
    inputs = bool(limits.keys() - {'size'})
    chooser = Chooser(model, runner.quantization, runner.report, size, bits, inputs, times)
    chooser.check(limits)
    with kept_random_state():
        chooser.candidates.calibrate(batches, lambda batch: loss_of(runner, batch))
    return chooser


def times_of(runner: Any, backend: str, threads: int | None, rounds: int = 10) -> dict[str, Callable[[Any], float]]:
    """Layer -> its milliseconds by bits, in a runtime, for the picture that a trial prediction takes.

    Float layers too; those whose form in a graph is not known are named in a warning.
    """
    model = bare_model(runner.model)
    layers = {row.name: model.get_submodule(row.name) for row in runner.report.layers}
    calls, unknown = dict[str, list[TimedLayer]](), dict[str, None]()

    def note(name: str) -> Callable[..., None]:
        def see(layer: Any, args: Any, kwargs: Any) -> None:
            x = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            timed = None if x is None else timed_layer(layer, x.shape)
            if timed is not None:
                calls.setdefault(name, []).append(timed)
            else:
                unknown[name] = None

        return see

    with only(model, []), modes_kept(model), torch.no_grad():
        with hooked(layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()):
            trials_of(runner, model.eval())[0]()
    if unknown:
        warnings.warn(f'layers without a time, which the budget in ms leaves out: {", ".join(unknown)}', stacklevel=2)
    return costs_of(calls, time_layers((each for own in calls.values() for each in own), backend, threads, rounds))


class BitSearchHook(Hook):
    """Learns bits while the weights train, see core/mixed/search.py.

    Args:
        open: makes the choices of the runner's model, whose thresholds are known.
        limits: kind of a budget -> its limit.
    """

    priority = 'LOW'  # behind CalibrationHook

    def __init__(self, open: Callable[[], Chooser], limits: Mapping[str, float]) -> None:
        self.open, self.limits = open, limits
        self.chooser: Any = None
        self.search: Any = None
        self.scale = 1.0
        """By which the loss of this iteration is multiplied."""

    def before_train(self, runner: Runner) -> None:
        self.chooser = chooser = self.open()
        budgets = [chooser.costs.budget(kind, limit) for kind, limit in self.limits.items()]
        given = {choice.name: choice.bits[0] for choice in chooser.choices if len(choice.bits) == 1}
        self.search = BitSearch(chooser.candidates, choices_of_layers(chooser.choices), given, budgets)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        self.scale = scaler.get_scale() if scaler is not None else 1.0  # after a step it may be another one

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if runner.optim_wrapper.should_update():
            self.search.step((runner.iter + 1) / runner.max_iters, self.scale)


def search_bits(
    runner: QuantRunner, limits: Mapping[str, float], open: Callable[[], Chooser]
) -> tuple[Chooser, dict[str, dict[int, float]]]:
    """Train as the config says, with bits that are learned; nothing of the model is kept.

    Returns:
        The choices, and what the integer program takes for sensitivities.
    """
    hook = BitSearchHook(open, limits)
    runner.register_hook(hook)
    runner._hooks = [each for each in runner.hooks if not isinstance(each, NOT_IN_A_SEARCH)]
    runner.train()
    hook.search.stop()
    return hook.chooser, hook.search.sensitivities()


def written_settings(cfg: Config, options: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """What a config that inherits the user's has to say beside the bits.

    That is what options of the command line changed in `model` and `quantization`, and the checkpoint to start from.

    Raises:
        UserError: an option changes an entry of a list, which a config cannot inherit.
    """
    found: dict[str, Any] = {}
    for path, value in options.items():
        *parts, last = path.split('.')
        if [*parts, last][0] not in ('model', 'quantization'):
            continue
        if any(part.isdigit() for part in (*parts, last)):
            raise UserError(f'--cfg-options {path}: an entry of a list cannot be written; put it into a config')
        inner = found
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found | dict(load_from=checkpoint)


def check_target(out: Path, config: str) -> str:
    """The path of the user's config as seen from the folder of `out`, a config that is to be written.

    `PACKAGE::PATH` is the same from everywhere.

    Raises:
        UserError: it, its page or its picture exists; it is no .py file or cannot be written; or the user's config
            cannot be its base.
    """
    if Path(config).is_file() and Config._is_lazy_import(config):
        raise UserError(
            f'{config} is a config in the new style (read_base), which a config with _base_ cannot inherit: write it '
            f'anew first, Config.fromfile({config!r}).dump(NEW)'
        )
    if out.suffix != '.py' or not out.stem.replace('-', '_').replace('.', '_').isidentifier():
        raise UserError(f'--out {out} is not the name of a config: write NAME.py')
    for each in (out, out.with_suffix('.html'), out.with_suffix('.png')):
        if each.exists():
            raise UserError(f'--out {out}: {each} exists')
    check_file(out, '--out')
    return config if '::' in config else os.path.relpath(Path(config).absolute(), out.absolute().parent)
