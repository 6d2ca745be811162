"""Distillation: a model in training is pulled towards the outputs of its float model, the teacher.

Mishra and Marr, "Apprentice", ICLR 2018, arXiv:1711.05852; temperatures: Hinton et al., 2015, arXiv:1503.02531;
feature maps: Cao et al., "PKD", NeurIPS 2022, arXiv:2207.02039. All distances are computed in float32; they are 0 for
equal outputs, and have the gradient of `ours` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax, logsigmoid, mse_loss

from .errors import UserError
from .quantizers.base import in_backward
from .typed import Bounds

Distance = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Distill:
    """Distillation from the float model (the dict `quantization.distill`), for all methods."""

    weight: Annotated[float, Bounds(0, 1000)] = 1.0
    """Of the distance to the teacher's outputs, beside the loss of the task."""
    temperature: Annotated[float, Bounds(0, 100)] = 2.0
    """Divides the logits of both."""
    teacher: str | None = None
    """Checkpoint of the float model; None: that of `load_from`."""


def of_classes(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL divergence of classes that exclude each other, (N, C, ...): softmax over C, mean over all else, times t^2."""
    one, other = (log_softmax(x.float() / temperature, 1) for x in (ours, theirs))
    return kl_div(one, other, log_target=True, reduction='none').sum(1).mean() * temperature**2


def of_probabilities(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL divergence of independent sigmoids, any shape: summed over dimension 1, mean over all else, times t^2."""
    one, other = ours.float() / temperature, theirs.float() / temperature
    likely = other.sigmoid()
    own = -(likely * logsigmoid(other) + (1 - likely) * logsigmoid(-other))
    each = binary_cross_entropy_with_logits(one, likely, reduction='none') - own
    return each.sum(1).mean() * temperature**2


def of_features(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Half of the mean squared difference of feature maps (N, C, H, W), each channel with mean 0 and deviation 1."""
    return mse_loss(_normalized(ours), _normalized(theirs)) / 2


def _normalized(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0, keepdim=True)
    return (x.float() - mean) * torch.rsqrt(variance + 1e-6)


class Distillation:
    """What the outputs of a model differ from those of its teacher, as a loss.

    Call it after each training forward of the model, with the arguments of that forward.

    Args:
        model: in training; its forwards are watched from now on, until :meth:`stop`.
        teacher: the float model. It is set to evaluation, and its parameters take no gradient.
        distances: name of a module that both have -> the distance of its outputs: :func:`of_classes`,
            :func:`of_probabilities`, :func:`of_features`. A module may return one tensor or several.
        weight: of the loss.
        temperature: divides logits.
        predict: runs the teacher; None: `teacher(...)`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        distances: Mapping[str, Distance],
        weight: float = 1.0,
        temperature: float = 1.0,
        predict: Callable[..., Any] | None = None,
    ) -> None:
        self.teacher, self.distances = teacher.eval().requires_grad_(False), dict(distances)
        self.weight, self.temperature, self.predict = weight, temperature, predict or teacher
        self._ours: dict[str, list[Tensor]] = {}
        self._theirs: dict[str, list[Tensor]] = {}
        self._handles = [
            other.get_submodule(name).register_forward_hook(self._collector(name, outputs))
            for other, outputs in ((model, self._ours), (teacher, self._theirs))
            for name in self.distances
        ]

    def _collector(self, name: str, outputs: dict[str, list[Tensor]]) -> Callable[..., None]:
        ours = outputs is self._ours

        def collect(module: nn.Module, args: Any, out: Any) -> None:
            if ours and (in_backward() or not torch.is_grad_enabled()):
                return  # a checkpointed segment that runs again, or a prediction
            outputs.setdefault(name, []).extend(out if isinstance(out, (tuple, list)) else [out])

        return collect

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the forwards since the last call, a scalar.

        Raises:
            UserError: a layer was not called as often as the teacher's, or its outputs have other shapes.
        """
        with torch.no_grad():
            self.predict(*args, **kwargs)
        ours, theirs = dict(self._ours), dict(self._theirs)
        self.forget()
        losses = []
        for name, distance in self.distances.items():
            pairs = ours.get(name, []), theirs.get(name, [])
            shapes = [[tuple(x.shape) for x in each] for each in pairs]
            if shapes[0] != shapes[1] or not shapes[0]:
                raise UserError(f'distillation: {name} returned shapes {shapes[0]}, that of the teacher {shapes[1]}')
            with torch.autocast(pairs[0][0].device.type, enabled=False):
                losses += [distance(*pair, self.temperature) / len(shapes[0]) for pair in zip(*pairs)]
        return self.weight * torch.stack(losses).sum()

    def forget(self) -> None:
        """Drop what was collected since the last call."""
        self._ours.clear()
        self._theirs.clear()

    def stop(self) -> None:
        """Watch no more."""
        self.forget()
        for handle in self._handles:
            handle.remove()
