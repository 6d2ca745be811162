"""Statistics of batch normalization, and thresholds, anew for the weights of the end of a training.

During training both are running averages over weights that move, on pictures that are augmented strongly. Merchant et
al., "Does Data Augmentation Benefit from Split BatchNorms", 2020, arXiv:2010.07810, find those of weakly augmented
pictures better; an average of weights (SWA, Izmailov et al., 2018, arXiv:1803.05407) has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import modes_kept, moving_quantizers, mute_leaves, uncompiled
from .quantizers import Quantizer, Stage
from .quantizers.following import move_thresholds
from .ranks import all_reduce
from .step import set_stage


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None = None) -> int:
    """Replace running averages by those of some batches: means and variances of BN, thresholds that follow.

    The weights stay, and so does BN that training leaves alone (`norm_eval`) or that no batch reaches. All processes
    find the same.

    Args:
        batches: each is used once.
        predict: runs one batch in training mode; None: `model(batch)`.

    Returns:
        Number of batches; with 0 nothing changes.
    """
    predict = predict or model
    frozen = [m for m in model.modules() if isinstance(m, Quantizer) and m.stage == Stage.FREEZE]
    thresholds = [quantizer.threshold.clone() for quantizer in frozen]
    with uncompiled(), modes_kept(model):
        model.train()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
        momenta = [(norm, norm.momentum) for norm in norms]
        before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
        mute_leaves(model)
        if frozen:
            set_stage(model, Stage.QUANTIZE)
        following = moving_quantizers(model).values()
        for quantizer in following:
            quantizer.sums.zero_()
        largest = {quantizer: quantizer.sums.clone() for quantizer in following if quantizer.largest}
        count, done = 0, False
        try:
            for batch in batches:
                if count == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.training, norm.momentum = True, None  # an average of all batches alike
                predict(batch)
                count += 1
                for quantizer, total in largest.items():  # the mean of the batches' largest values, not that of all
                    total += quantizer.sums
                    quantizer.sums.zero_()
            for quantizer, total in largest.items():
                quantizer.sums.copy_(total)
            if _most(count):
                if not count:  # a process without a batch adds nothing to the others
                    for norm in norms:
                        norm.reset_running_stats()
                _average(norms, before)
                move_thresholds(following, momentum=1.0)
                done = True
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum
            for quantizer in following:
                quantizer.sums.zero_()
            if frozen:
                set_stage(model, Stage.FREEZE)
            if not done:
                for each, threshold in zip(frozen, thresholds):
                    each.threshold.copy_(threshold)
    return count


def _most(count: int) -> int:
    """The largest count of a process."""
    found = torch.tensor(count)
    all_reduce(found, 'max')
    return int(found)


def _average(norms: list[Any], before: list[list[Tensor]]) -> None:
    """The mean over the processes with a batch that reached the BN; without one what was there before."""
    for norm, buffers in zip(norms, before):
        reached = (norm.num_batches_tracked > 0).to(norm.running_mean.dtype)
        found = torch.cat([norm.running_mean * reached, norm.running_var * reached, reached.view(1)])
        all_reduce(found, 'sum')
        if float(found[-1]) == 0:
            for buffer, value in zip(norm.buffers(recurse=False), buffers):
                buffer.copy_(value)
        else:
            mean, variance = (found[:-1] / found[-1]).chunk(2)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
