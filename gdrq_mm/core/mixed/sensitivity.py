"""The cheap sensitivity: by how much bits raise the loss of the task, from its gradients in the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..modules import hooked, modes_kept, mute_leaves, only
from ..quantizers.base import in_backward
from .choices import Candidates, Place


def loss_sensitivity(
    candidates: Candidates, batches: Iterable[Any], loss: Callable[[Any], Tensor], pictures: Callable[[Any], int]
) -> dict[str, dict[int, float]]:
    """For each choice and its bits the expected rise of the loss, to second order.

    It is the mean over pictures of 1/2 sum(g^2 (q - x)^2), where g is the gradient of one picture's loss by what is
    quantized, x, and q what x is quantized to. The curvature is taken for the square of the gradient, and the errors
    for independent of each other. A batch of B pictures gives the mean of their gradients; the mean of their squares is
    taken for B times the square of that.

    Args:
        candidates: calibrated.
        loss: the mean over the pictures of a batch, with a gradient; modules without children are in evaluation mode.
        pictures: how many a batch has, B.

    Raises:
        UserError: the loss of a batch is not finite, or no number with a gradient.
    """
    model = candidates.model
    found = {choice.name: dict.fromkeys(choice.bits, 0.0) for choice in candidates.choices}
    weights = {choice: candidates.places_of(choice)[0] for choice in candidates.choices if choice.side == 'weight'}
    squares = {choice: torch.zeros_like(place.layer.weight, dtype=torch.float32) for choice, place in weights.items()}
    count = 0
    with only(model, []), modes_kept(model), _learning([place.layer.held[0] for place in weights.values()]):
        mute_leaves(model.train())
        for batch in batches:
            size, count = pictures(batch), count + 1
            with hooked(_watch(candidates, size, found)):
                with torch.enable_grad():
                    value = loss(batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise UserError(f'the loss of a batch is {_called(value)}, not a number with a gradient')
                if not bool(torch.isfinite(value)):
                    raise UserError(f'the loss of a calibration batch is {float(value)}')
                value.backward()
            for choice, place in weights.items():
                parameter, rows = place.layer.held
                if parameter.grad is not None:
                    squares[choice] += size * parameter.grad[rows].float().square()
            model.zero_grad(set_to_none=True)
    for choice, place in weights.items():
        layer = place.layer
        for b, other in place.others.items():
            with torch.no_grad():
                error = (layer.set_filters(other(layer.filters())) - layer.weight).float()
                found[choice.name][b] += 0.5 * float((squares[choice] * error.square()).sum())
    return {name: {b: value / max(count, 1) for b, value in options.items()} for name, options in found.items()}


def _called(value: Any) -> str:
    """A value in a message."""
    if not isinstance(value, Tensor):
        return f'a {type(value).__name__}'
    return f'a tensor of shape {tuple(value.shape)}' if value.numel() != 1 else 'a number without a gradient'


@contextmanager
def _learning(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let frozen parameters have a gradient meanwhile."""
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    try:
        for parameter in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _watch(candidates: Candidates, size: int, found: dict[str, dict[int, float]]) -> Iterator[Any]:
    """Hooks on the quantizers of inputs that add up what the gradients of one batch say."""
    for choice in candidates.choices:
        if choice.side == 'activation':
            views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
            for place in candidates.places_of(choice):
                yield place.own.register_forward_hook(_viewer(place, views, 0.5 * size, found[choice.name]))


def _viewer(place: Place, views: dict, factor: float, sums: dict[int, float]) -> Any:
    """A hook that gives all readers of a tensor one view of it, whose gradient is the sum of theirs."""

    def see(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        x = args[0]
        if in_backward() or not torch.is_grad_enabled() or not x.numel():
            return None
        key = id(x), x._version
        if key not in views:
            view = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

            def add(gradient: Tensor) -> None:
                with torch.no_grad():
                    for b, other in place.others.items():
                        error = other(x.detach()) - x.detach()
                        sums[b] += factor * float((gradient.float() * error.float()).square().sum())

            view.register_hook(add)
            views[key] = x, view  # x too, so that no other tensor takes its id meanwhile
        return views[key][1]

    return see
