"""Calibration: start the thresholds from a few batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UserError
from .layers import QuantLayer
from .modules import (
    activation_quantizers,
    every_module,
    follow,
    hooked,
    modes_kept,
    mute_leaves,
    quant_layers,
    uncompiled,
)
from .quantizers import ActivationQuantizer, Quantizer, Stage
from .ranks import all_gather, all_reduce, world_size

GROSSLY_WRONG = 3.0
"""Running statistics are grossly wrong if they give the median channel of a batch a root mean square above this number,
or below 1 / this number (ours); right ones give it 1."""

FEWEST = 32
"""Values of a channel in a batch, below which its statistics say too little (ours)."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    predict: Callable[[Any], Any] | None = None,
    training: bool = False,
    trains_next: bool = True,
    missing: bool = False,
) -> list[str]:
    """Start all thresholds, ranges and zero points from a few batches; from then on every quantizer quantizes.

    The batches change nothing else: dropout is off, and BN normalizes by its running statistics without updating them.
    All processes of a training find the same thresholds. A layer that no batch reaches stays float.

    Args:
        batches: a few, such as the first ones of the training data.
        predict: runs one batch; None: `model(batch)`. If it fails, no quantizer remembers anything of it.
        training: `predict` computes a loss. Modules with children are then in training mode: some models compute a loss
            in that mode only.
        trains_next: the model is trained with these thresholds.
        missing: only what is :func:`uncalibrated`; the rest is in use meanwhile, and stays.

    Raises:
        UserError: no batch reached a layer, in any process; or an input is not finite.

    Returns:
        Names of the batch normalizations whose running statistics are grossly wrong, as after a few iterations of
        training. If there are some and the model is trained next, all normalize by the batch, as training will do:
        thresholds that fit wrong statistics would clip almost everything, or nothing. Those that training leaves alone
        (`norm_eval`) are not judged and keep their statistics.
    """
    follow(model, every_module(model))
    chosen = set(uncalibrated(model) if missing else [m for m in model.modules() if isinstance(m, Quantizer)])
    activations = [each for each in activation_quantizers(model).values() if each in chosen]
    layers = [each for each in quant_layers(model).values() if not missing or each.weight_quant in chosen]
    for layer in layers:
        layer.seen = False
    predict, batches = predict or model, iter(batches)
    with _observing(chosen), uncompiled(), _quiet(model, training) as judged:
        first = list(islice(batches, 1))
        again = copy.deepcopy(first) if judged else []  # a model may change what it is given
        with _judging(judged) as verdicts:
            for batch in first:
                predict(batch)
        wrong, called, once_more = _wrong_norms(verdicts)
        if once_more:
            for quantizer in activations:
                quantizer.forget()
            for norm in called if wrong and trains_next else ():
                norm.training, norm.momentum = True, 0.0
            for batch in again:
                predict(batch)
        for batch in batches:
            predict(batch)
        _start_thresholds(activations, layers)
    return [name for name, module in model.named_modules() if module in wrong]


def uncalibrated(model: nn.Module) -> list[Quantizer]:
    """The quantizers that have no threshold yet, and are to have one."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    return [each for each in found if not each.calibrated and each.stage != Stage.FLOAT]


@contextmanager
def _observing(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Quantizers observe. If something fails, they forget what they saw, and are in the stages of before."""
    stages = {quantizer: quantizer.stage for quantizer in quantizers}
    for quantizer in stages:
        quantizer.set_state(stage=Stage.OBSERVE)
    try:
        yield
    except BaseException:
        for quantizer, stage in stages.items():
            quantizer.set_state(stage=stage)
            if isinstance(quantizer, ActivationQuantizer):
                quantizer.forget()
        raise


@contextmanager
def _quiet(model: nn.Module, training: bool) -> Iterator[list[Any]]:
    """Evaluation mode, or training mode without dropout and with BN that does not update its running statistics.

    Gives the BN whose running statistics are used here, and are not used in training.

    BN that has no statistics yet (a start without a checkpoint) normalizes by those of the batch. With its initial mean
    0 and variance 1 the values would grow from layer to layer, and the thresholds with them.
    """
    with modes_kept(model):
        model.train()
        tracked: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and _has_state(m)]
        fresh = [norm for norm in tracked if _is_fresh(norm)]
        before = [(norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]) for norm in tracked]
        mute_leaves(model) if training else model.eval()
        for norm in fresh:
            norm.training, norm.momentum = True, 0.0
        try:
            yield [norm for norm in tracked if norm not in fresh]
        finally:
            for norm, (momentum, buffers) in zip(tracked, before):
                norm.momentum = momentum
                for buffer, value in zip(norm.buffers(recurse=False), buffers):
                    buffer.copy_(value)  # 0 times a NaN of the batch is no 0


def _has_state(norm: Any) -> bool:
    return norm.running_mean is not None and norm.num_batches_tracked is not None


def _is_fresh(norm: Any) -> bool:
    return not bool(norm.running_mean.any()) and bool(torch.all(norm.running_var == 1))


@contextmanager
def _judging(norms: list[Any]) -> Iterator[dict[Any, list[bool]]]:
    """Tells of each BN and call whether its running statistics are grossly wrong for its input.

    The call then gives what the statistics of the batch make of the input, so that the BN behind it are judged fairly.
    """
    found: dict[Any, list[bool]] = {norm: [] for norm in norms}

    def judge(norm: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        x = (*args, *kwargs.values())[0].float()
        if x.numel() < FEWEST * x.shape[1]:
            return None
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        square = variance + (mean - norm.running_mean).square()
        size = float(((square + norm.eps) / (norm.running_var + norm.eps)).sqrt().median())
        found[norm].append(not 1 / GROSSLY_WRONG < size < GROSSLY_WRONG)
        if not found[norm][-1]:
            return None
        weight, bias = (None if each is None else each.float() for each in (norm.weight, norm.bias))
        return nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps).to(out.dtype)

    with hooked(norm.register_forward_hook(judge, with_kwargs=True) for norm in norms):
        yield found


def _wrong_norms(verdicts: dict[Any, list[bool]]) -> tuple[set[Any], set[Any], bool]:
    """The BN of which most calls, in any process, said that its running statistics are wrong.

    Also those that were judged at all, and whether any call said so.
    """
    rows = [(2 * sum(calls) > len(calls), bool(calls), any(calls)) for calls in verdicts.values()]
    flags = torch.tensor(rows, dtype=torch.int32).view(-1, 3)
    all_reduce(flags, 'max')  # synchronized BN needs the same mode, and the same calls, in all processes
    wrong, called, once_more = flags.bool().unbind(1)
    norms = list(verdicts)
    return {norms[i] for i in wrong.nonzero()}, {norms[i] for i in called.nonzero()}, bool(once_more.any())


def wrong_statistics(names: list[str], by_batch: bool) -> str:
    """A warning for batch normalizations that :func:`calibrate` returned."""
    instead = 'thresholds fit the statistics of the batches' if by_batch else 'thresholds fit them all the same'
    shown = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
    return (
        f'the running statistics of {len(names)} batch normalizations do not fit the data, as if the model had hardly '
        f'been trained, or on other data: {shown}; {instead}'
    )


def _start_thresholds(activations: list[ActivationQuantizer], layers: list[QuantLayer]) -> None:
    """Set ranges and thresholds of the activations from what was observed, and the thresholds of the weights."""
    if activations:
        observed = torch.stack([quantizer.observed() for quantizer in activations])
        sums, extremes = observed[:, :3].contiguous(), observed[:, 3:].contiguous()
        all_reduce(sums, 'sum')
        all_reduce(extremes, 'max')
        _share_samples(activations)
        for quantizer, row in zip(activations, torch.cat([sums, extremes], 1)):
            quantizer.start(row)
            quantizer.set_state(stage=Stage.QUANTIZE if quantizer.calibrated else Stage.FLOAT)
    seen = torch.tensor([layer.seen for layer in layers], dtype=torch.int32)
    all_reduce(seen, 'max')
    if layers and not bool(seen.any()):
        raise UserError('calibration: no batch reached a layer; is the loader an iterator that was used before?')
    for layer, reached in zip(layers, seen.tolist()):
        if layer.weight_quant is not None:
            if reached:
                layer.weight_quant.start(layer.filters())
            layer.weight_quant.set_state(stage=Stage.QUANTIZE if reached else Stage.FLOAT)


def _share_samples(quantizers: list[ActivationQuantizer]) -> None:
    """Give every process the samples of all, so that a search finds the same threshold in each."""
    keeping = [quantizer for quantizer in quantizers if quantizer.keeps_samples]
    if not keeping or world_size() == 1:
        return
    own = [None if quantizer.samples is None else quantizer.samples.cpu() for quantizer in keeping]
    for quantizer, parts in zip(keeping, zip(*all_gather(own))):
        found = [part for part in parts if part is not None]
        quantizer.samples = torch.cat(found).to(quantizer.threshold.device) if found else None
