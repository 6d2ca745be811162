"""Calibration: start the thresholds from a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import activation_quantizers, modes_kept, mute_leaves, quant_layers
from .quantizers import ActivationQuantizer, Quantizer, Stage
from .ranks import all_gather, all_reduce, world_size


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None = None, training: bool = False
) -> None:
    """Start all thresholds, ranges and zero points from a few batches; from then on every quantizer quantizes.

    The batches change nothing else: dropout is off, and BN normalizes by its running statistics without updating them.
    All processes of a training find the same thresholds. A layer that no batch reaches stays float.

    Args:
        batches: a few, such as the first ones of the training data.
        predict: runs one batch; None: `model(batch)`.
        training: `predict` computes a loss. Modules with children are then in training mode: some models compute a loss
            in that mode only.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_state(stage=Stage.OBSERVE)
    for layer in quant_layers(model).values():
        layer.seen = False
    with _quiet(model, training):
        for batch in batches:
            (predict or model)(batch)
    _start_thresholds(model)


@contextmanager
def _quiet(model: nn.Module, training: bool) -> Iterator[None]:
    """Evaluation mode, or training mode without dropout and with BN that does not update its running statistics.

    BN that has no statistics yet (a start without a checkpoint) normalizes by those of the batch. With its initial mean
    0 and variance 1 the values would grow from layer to layer, and the thresholds with them.
    """
    with modes_kept(model):
        model.train()
        fresh: list[Any] = [module for module in model.modules() if _is_fresh(module)]
        before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in fresh]
        mute_leaves(model) if training else model.eval()
        for norm in fresh:
            norm.training, norm.momentum = True, 0.0
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(fresh, before):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)


def _is_fresh(module: Any) -> bool:
    if not isinstance(module, _BatchNorm) or not module.training or module.running_mean is None:
        return False
    return not bool(module.running_mean.any()) and bool(torch.all(module.running_var == 1))  # type: ignore[arg-type]


def _start_thresholds(model: nn.Module) -> None:
    """Set ranges and thresholds of the activations from what was observed, and the thresholds of the weights."""
    activations, layers = activation_quantizers(model), quant_layers(model)
    if activations:
        observed = torch.stack([quantizer.observed() for quantizer in activations.values()])
        sums, extremes = observed[:, :3].contiguous(), observed[:, 3:].contiguous()
        all_reduce(sums, 'sum')
        all_reduce(extremes, 'max')
        _share_samples(list(activations.values()))
        for quantizer, row in zip(activations.values(), torch.cat([sums, extremes], 1)):
            quantizer.start(row)
            quantizer.set_state(stage=Stage.QUANTIZE if quantizer.calibrated else Stage.FLOAT)
    seen = torch.tensor([layer.seen for layer in layers.values()], dtype=torch.int32)
    all_reduce(seen, 'max')
    for layer, reached in zip(layers.values(), seen.tolist()):
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
