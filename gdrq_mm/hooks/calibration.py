"""Start thresholds from training batches, after the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from mmengine.dataset import DefaultSampler
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ..convert import activation_quantizers, bare_model, mute_leaves, quant_layers
from ..quantizers import ActivationQuantizer, Quantizer, Stage
from ..seeding import kept_random_state


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Run `batches` training batches in float, then decide ranges and start thresholds, the same on every rank.

    Nothing is done if the checkpoint held thresholds. A layer that no batch reaches stays float; the table of layers
    says so.

    Example:
        custom_hooks = [dict(type='CalibrationHook', batches=8)]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        if any(m.calibrated for m in model.modules() if isinstance(m, Quantizer)):
            return
        if not runner._load_from:
            runner.logger.warning('The config has no load_from: quantization starts without a trained float model.')
        runner.logger.info(f'Calibrating thresholds on {self.batches} training batches.')

        def predict() -> None:
            with kept_random_state(), _quiet(model):
                for number, batch in enumerate(_own_loader(runner)):
                    if number == self.batches:
                        break
                    data = model.data_preprocessor(batch, training=True)
                    model(**data, mode='loss')

        calibrate(model, predict)


@torch.no_grad()
def calibrate(model: nn.Module, predict: Callable[[], Any]) -> None:
    """Start all thresholds from what `predict` runs through the model; then every quantizer rounds."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_state(stage=Stage.OBSERVE)
    for layer in quant_layers(model).values():
        layer.seen = False
    predict()
    finish_calibration(model)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Training mode without noise and without a trace: dropout is off, BN normalizes by its statistics.

    BN that has none yet (a start without a checkpoint) normalizes by those of the batch: by the initial 0 and 1 the
    values would grow from layer to layer, and the thresholds with them.
    """
    flags = {module: module.training for module in model.modules()}
    model.train()
    fresh: list[Any] = [module for module in model.modules() if _is_fresh(module)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in fresh]
    mute_leaves(model)
    for norm in fresh:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(fresh, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
        for module, flag in flags.items():
            module.training = flag


def _is_fresh(module: Any) -> bool:
    if not isinstance(module, _BatchNorm) or not module.training or module.running_mean is None:
        return False
    return not bool(module.running_mean.any()) and bool(torch.all(module.running_var == 1))  # type: ignore[arg-type]


def _own_loader(runner: Runner) -> DataLoader:
    """The training data once more, so that the sampler of the run is not moved by calibration."""
    loader = runner.train_dataloader
    batch_size = loader.batch_size or loader.batch_sampler.batch_size
    sampler = DefaultSampler(loader.dataset, shuffle=True, seed=runner.seed)
    return DataLoader(loader.dataset, batch_size, sampler=sampler, collate_fn=loader.collate_fn)


@torch.no_grad()
def finish_calibration(model: nn.Module) -> None:
    """Turn what the activation quantizers observed into ranges and thresholds, and start those of the weights."""
    activations, layers = activation_quantizers(model), quant_layers(model)
    if activations:
        observed = torch.stack([quantizer.observed() for quantizer in activations.values()])
        sums, extremes = observed[:, :3].contiguous(), observed[:, 3:].contiguous()
        all_reduce(sums, 'sum')
        all_reduce(extremes, 'max')
        _share_samples(list(activations.values()))
        for quantizer, row in zip(activations.values(), torch.cat([sums, extremes], 1)):
            quantizer.calibrate(row)
            quantizer.set_state(stage=Stage.QUANTIZE if quantizer.calibrated else Stage.FLOAT)
    seen = torch.tensor([layer.seen for layer in layers.values()], dtype=torch.int32)
    all_reduce(seen, 'max')
    for layer, reached in zip(layers.values(), seen.tolist()):
        if layer.weight_quant is not None:
            if reached:
                layer.weight_quant.calibrate(layer.filters())
            layer.weight_quant.set_state(stage=Stage.QUANTIZE if reached else Stage.FLOAT)


def _share_samples(quantizers: list[ActivationQuantizer]) -> None:
    """Give every rank the samples of all, so that a search finds the same threshold on each."""
    keeping = [quantizer for quantizer in quantizers if quantizer.keeps_samples]
    if not keeping or get_world_size() == 1:
        return
    own = [None if quantizer.samples is None else quantizer.samples.cpu() for quantizer in keeping]
    for quantizer, parts in zip(keeping, zip(*all_gather_object(own))):
        found = [part for part in parts if part is not None]
        quantizer.samples = torch.cat(found).to(quantizer.threshold.device) if found else None
