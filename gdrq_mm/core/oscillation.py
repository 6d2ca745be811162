"""Weights that jump to and fro between two codes: count them, and freeze them.

Nagel, Fournarakis, Bondarenko, Blankevoort, "Overcoming Oscillations in Quantization-Aware Training", ICML 2022,
arXiv:2203.11086. The straight-through estimator moves a weight that lies near the edge of two cells over it and back
for as long as the learning rate allows. In layers of few weights a filter, such as depth-wise ones, that spoils the
statistics of batch normalization and the end of the training.

A change of a weight's code is an oscillation if the change before it went the other way. Its frequency f is the running
average of that, f <- m * (0 or 1) + (1 - m) * f. A weight whose f exceeds a limit stays, from then on, at the code that
it had on average (Algorithm 1). The limit falls by a cosine over the training, so that few weights are frozen early.
Ours: with thresholds that follow the weights a frozen weight keeps its code, not its value.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .errors import UserError
from .kernels import nearest_codes
from .modules import quant_layers
from .quantizers import Stage


class _State(NamedTuple):
    """What is known of the filters of a layer, tensors of their shape: 13 bytes a weight."""

    codes: Tensor
    """Codes after the last step, int8."""
    direction: Tensor
    """Sign of the last change of the code, int8; 0 before the first."""
    frequency: Tensor
    average: Tensor
    """Running average of the code."""
    frozen: Tensor
    """Whether the weight stays at its code; bool."""


class Oscillations:
    """Counts, and freezes, oscillating weights of a quantized model. Call :meth:`step` after each `after_step`.

    Args:
        model: a quantized model; of any method whose weights are codes times a step.
        limits: frequency from which a weight is frozen, at the beginning and at the end of training; None only counts.
        momentum: m of both running averages.

    Example:
        oscillations = Oscillations(model)
        ...
        optimizer.step()
        gdrq_mm.after_step(model)
        oscillations.step(progress=(iteration + 1) / iterations)

    Raises:
        UserError: a limit or the momentum is not in (0, 1], the model has no weights that it could watch, or limits are
            given and a method (dorefa, balanced) would move weights that are held to other codes.
    """

    def __init__(self, model: nn.Module, limits: tuple[float, float] | None = (0.1, 0.01), momentum: float = 0.01):
        if limits is not None and not (isinstance(limits, (list, tuple)) and len(limits) == 2):
            raise UserError(f'oscillation: limits={limits!r} is neither two numbers nor None')
        for name, value in [*(('limits', limit) for limit in limits or ()), ('momentum', momentum)]:
            if not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise UserError(f'oscillation: {name}={value!r} is not in (0, 1]')
        self.limits, self.momentum = limits, momentum
        self.layers = {
            name: layer
            for name, layer in quant_layers(model).items()
            if layer.weight_quant is not None and not layer.weight_quant.uneven and layer.learns
        }
        if not self.layers:
            raise UserError('oscillation: no layer has weights that are trained and rounded to even steps')
        moving = next((n for n, layer in self.layers.items() if not layer.weight_quant.keeps), None)
        if limits is not None and moving is not None:
            raise UserError(
                f'oscillation: the weights of layer {moving} cannot be held at their codes; limits=None counts alone'
            )
        self.states: dict[str, _State] = {}

    def limit(self, progress: float) -> float:
        """Frequency from which a weight is frozen at this part of the training."""
        if self.limits is None:
            return math.inf
        first, last = self.limits
        return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def step(self, progress: float = 1.0) -> None:
        """Compare the codes with those of the last step, freeze what oscillates, hold what is frozen.

        Args:
            progress: the part of the training that is done, 0 to 1.
        """
        limit = self.limit(progress)
        for name, layer in self.layers.items():
            quantizer = layer.weight_quant
            if not quantizer.calibrated or quantizer.stage not in (Stage.QUANTIZE, Stage.FREEZE):
                continue
            filters = layer.filters()
            step = quantizer.step(filters)
            codes = quantizer.round(filters, step).to(torch.int8)
            if name not in self.states:
                self.states[name] = _begun(codes)
                continue
            state = self.states[name] = _moved(self.states[name], codes, self.momentum)
            chosen = (state.frequency > limit) & ~state.frozen
            middle = nearest_codes(state.average, torch.ones(()), quantizer.lo, quantizer.hi, quantizer.apart)
            state.codes.copy_(torch.where(chosen, middle.to(torch.int8), state.codes))
            state.frozen.logical_or_(chosen)
            if state.frozen.any():
                held = torch.where(state.frozen, state.codes * step, filters)
                layer.weight.copy_(layer.set_filters(held.to(filters.dtype)))

    def shares(self, frequency: float = 0.005) -> tuple[float, float]:
        """Share of the weights that oscillate at more than a frequency and are not frozen, and share of the frozen."""
        states = self.states.values()
        count = sum(state.codes.numel() for state in states) or 1
        moving = sum(int(((state.frequency > frequency) & ~state.frozen).sum()) for state in states)
        return moving / count, sum(int(state.frozen.sum()) for state in states) / count

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: layer -> tensors."""
        return {name: state._asdict() for name, state in self.states.items()}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            UserError: it is of another model.
        """
        states = {}
        for name, each in found.items():
            if name not in self.layers or not _fits(each, self.layers[name].filters()):
                raise UserError(f'oscillation: the saved state of layer {name} is not one of this model')
            states[name] = _State(**{key: each[key].to(self.layers[name].weight.device) for key in _State._fields})
        self.states = states


def _fits(state: Any, filters: Tensor) -> bool:
    """Whether something read from a file is the state of these filters."""
    kinds = {**dict.fromkeys(_State._fields, torch.float32), 'frozen': torch.bool}
    kinds |= dict(codes=torch.int8, direction=torch.int8)
    return (
        isinstance(state, dict)
        and set(state) == set(kinds)
        and all(isinstance(state[key], Tensor) and state[key].dtype == kinds[key] for key in kinds)
        and all(tensor.shape == filters.shape for tensor in state.values())
    )


def _begun(codes: Tensor) -> _State:
    none = torch.zeros(codes.shape, device=codes.device)
    return _State(codes, torch.zeros_like(codes), none, codes.float(), torch.zeros_like(codes, dtype=torch.bool))


def _moved(state: _State, codes: Tensor, momentum: float) -> _State:
    """The state after a step: Algorithm 1 without freezing."""
    codes = torch.where(state.frozen, state.codes, codes)
    change = (codes.short() - state.codes).sign().char()
    oscillated = (change * state.direction) < 0
    return _State(
        codes=codes,
        direction=torch.where(change != 0, change, state.direction),
        frequency=state.frequency.lerp(oscillated.float(), momentum),
        average=state.average.lerp(codes.float(), momentum),
        frozen=state.frozen,
    )
