"""What a checkpoint between two optimizer steps holds of gradient accumulation, so that a resumed run goes on exactly.

Gradients are not yet averaged over processes then, nor are the sums that move thresholds. So those of each process are
saved, in the order of their ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, get_rank, get_world_size
from torch import Tensor

from ..core.errors import UserError
from ..core.modules import moving_quantizers
from ..core.quantizers import Quantizer

Accumulated = list[dict[str, Any]]


def is_between_steps(optim_wrapper: Any) -> bool:
    """Whether gradients wait for the next optimizer step."""
    count = getattr(optim_wrapper, '_inner_count', 0)
    return count > 0 and not optim_wrapper.should_update()


def accumulated(model: nn.Module) -> Accumulated:
    """Gradients, sums and what is pending of a bare model, for each process. All processes call it."""
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    sums = {name: q.sums.tolist() for name, q in moving_quantizers(model).items()}
    pending = {name: q.pending.cpu() for name, q in _quantizers(model).items() if q.pending is not None}
    return all_gather_object(dict(gradients=gradients, sums=sums, pending=pending))


def _quantizers(model: nn.Module) -> dict[str, Quantizer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def is_accumulated(model: nn.Module, saved: Any) -> bool:
    """Whether a value is what :func:`accumulated` returns for this model."""
    parameters, moving, quantizers = dict(model.named_parameters()), moving_quantizers(model), _quantizers(model)

    def is_gradient(name: Any, value: Any) -> bool:
        return name in parameters and isinstance(value, Tensor) and value.shape == parameters[name].shape

    def is_sum(name: Any, value: Any) -> bool:
        return name in moving and isinstance(value, (tuple, list)) and [type(each) for each in value] == [float, float]

    def is_pending(name: Any, value: Any) -> bool:
        shape = getattr(quantizers.get(name), 'shape', None)
        return isinstance(value, Tensor) and tuple(value.shape) == shape

    return isinstance(saved, list) and all(
        isinstance(each, dict)
        and set(each) | {'pending'} == {'gradients', 'sums', 'pending'}  # without it before loss_aware had something
        and all(isinstance(part, dict) for part in each.values())
        and all(is_gradient(*item) for item in each['gradients'].items())
        and all(is_sum(*item) for item in each['sums'].items())
        and all(is_pending(*item) for item in each.get('pending', {}).items())
        for each in saved
    )


def restore(model: nn.Module, saved: Accumulated) -> None:
    """Give a bare model back what was accumulated in this process.

    Raises:
        UserError: another number of processes goes on.
    """
    if len(saved) != get_world_size():
        raise UserError(
            f'the checkpoint was saved between two optimizer steps of {len(saved)} processes and cannot be resumed '
            f'with {get_world_size()}'
        )
    ours = saved[get_rank()]
    parameters, moving = dict(model.named_parameters()), moving_quantizers(model)
    for name, gradient in ours['gradients'].items():
        parameter = parameters[name]
        parameter.grad = gradient.to(parameter)
    for name, (total, count) in ours['sums'].items():
        if moving[name].largest and count:  # older checkpoints have the sum of the largest values
            total, count = total / count, 1
        moving[name].sums.copy_(torch.tensor([total, count]))
    quantizers = _quantizers(model)
    for name, value in ours.get('pending', {}).items():
        quantizers[name].pending = value.to(quantizers[name].threshold.device)
