"""A model, or a part of one, as a function from tensors to a flat tuple of tensors, which is what a graph is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.pyramid import start_pyramid


class Flat(nn.Module):
    """Takes tensors, returns a flat tuple of tensors, and keeps how they nest.

    Args:
        model: the whole model; names of its modules are those in the graph.
        run: (model, *inputs) -> a tensor, or tuples and lists of tensors, nested as they like. None: the model's
            forward.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.structure: Any = None
        """How the outputs of the last `forward` nest, see :func:`nest`."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, one after the other.

        Raises:
            UserError: one of them is no tensor.
        """
        start_pyramid(self.model)  # a part runs without the forward of its model, which would do this
        flat: list[Tensor] = []
        self.structure = _flatten(self.model(*inputs) if self.run is None else self.run(self.model, *inputs), flat)
        return tuple(flat)


def _flatten(value: Any, flat: list[Tensor]) -> Any:
    """Append the tensors of a nested value to `flat`; returns the nest with their positions."""
    if isinstance(value, Tensor):
        flat.append(value)
        return len(flat) - 1
    if isinstance(value, (tuple, list)):
        return [_flatten(v, flat) for v in value]
    raise UserError(f'the model cannot be exported: its head returns {type(value).__name__}')


def check_nest(structure: Any) -> None:
    """Raise ValueError unless the structure is a nest of positions."""
    if isinstance(structure, list):
        for inner in structure:
            check_nest(inner)
    elif not isinstance(structure, int):
        raise ValueError(f'structure {structure!r}')


def nest(structure: Any, flat: Sequence[Tensor]) -> Any:
    """The tensors put back where their positions stand, in lists, which mmdet's SOLOv2 writes to."""
    return flat[structure] if isinstance(structure, int) else [nest(s, flat) for s in structure]
