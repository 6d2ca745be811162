"""Bits that are learned: a differentiable choice between the widths of each layer, while the weights train.

Wu et al., "Mixed Precision Quantization of ConvNets via Differentiable Neural Architecture Search", arXiv:1812.00090
(DNAS): each choice is a Gumbel softmax over its widths. As in EdMIPS (Cai and Vasconcelos, CVPR 2020,
arXiv:2004.05795) the widths share one weight and one convolution: what goes into it is the mean of what the widths make
of it, weighted by the softmax.
Ours: weights and logits learn from the same batches; the penalty is a hinge on the expected cost; and in the end the
integer program takes -log of the softmax for sensitivities, so that the answer fits the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..quantizers import Stage
from .budgets import Budget
from .choices import Candidates

LEARNING_RATE = 0.05
"""Of the logits, by Adam (ours)."""
STRENGTH = 5.0
"""Of the penalty: what exceeding a budget by its whole limit adds to the loss (ours)."""
HOT, COLD = 2.0, 0.2
"""Temperature of the softmax at the start and at the end (ours)."""


class BitSearch:
    """Mixes the widths of each choice by what is learned. Call :meth:`step` after each backward pass.

    Args:
        candidates: calibrated. The quantizers of their places are float from now on, and mixtures take their place
            until :meth:`stop`.
        layers: layer -> the choices of its weight and of its input.
        given: choice -> bits, of those that are not open.
        budgets: for the penalty.
    """

    def __init__(
        self,
        candidates: Candidates,
        layers: Mapping[str, tuple[str, str]],
        given: Mapping[str, int],
        budgets: Sequence[Budget],
    ) -> None:
        self.layers, self.given, self.budgets = layers, given, budgets
        self.bits = {choice.name: choice.bits for choice in candidates.choices}
        device = next(candidates.model.parameters()).device
        self.logits = {n: nn.Parameter(torch.zeros(len(bits), device=device)) for n, bits in self.bits.items()}
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=LEARNING_RATE, betas=(0.5, 0.999))
        self.temperature = HOT
        self._noise: dict[str, Tensor] = {}
        self._draw()
        self._handles = []
        for place in candidates.places:
            place.own.set_state(stage=Stage.FLOAT)
            self._handles.append(place.own.register_forward_hook(self._mixer(place)))

    def _mixer(self, place: Any) -> Any:
        def mix(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            shares = self.shares(place.choice.name, module.training)
            return sum(share * other(args[0]) for share, other in zip(shares, place.others.values()))  # type: ignore[return-value]

        return mix

    def _draw(self) -> None:
        """New noise of Gumbel's distribution, the same in all forwards until the next step."""
        for name, logits in self.logits.items():
            self._noise[name] = -torch.empty_like(logits).exponential_().log()

    def shares(self, choice: str, noisy: bool = False) -> Tensor:
        """The softmax over the widths of a choice, (B,)."""
        logits = self.logits[choice] + (self._noise[choice] if noisy else 0)
        return torch.softmax(logits / self.temperature, 0)

    def penalty(self) -> Tensor:
        """A scalar: what the expected costs are beyond the budgets, as shares of their limits."""
        shares = {name: self.shares(name) for name in self.logits}
        total = next(iter(shares.values())).new_zeros(())
        for budget in self.budgets:
            used: Any = budget.fixed
            for layer, costs in budget.costs.items():
                weight, input = (self._expected(choice, shares) for choice in self.layers[layer])
                table = [[costs[w, a] for a in input[0]] for w in weight[0]]  # type: ignore[index]
                used = used + weight[1] @ weight[1].new_tensor(table) @ input[1]
            total = total + torch.relu(used / budget.limit - 1)
        return STRENGTH * total

    def _expected(self, choice: str, shares: Mapping[str, Tensor]) -> tuple[Sequence[int], Tensor]:
        if choice in shares:
            return self.bits[choice], shares[choice]
        return (self.given[choice],), next(iter(shares.values())).new_ones(1)

    def step(self, progress: float, scale: float = 1.0) -> None:
        """Move the logits by the gradients that they have, with those of the penalty; draw new noise.

        Gradients that are not finite, as float16 has them now and then, move nothing.

        Args:
            progress: fraction of the search that is done; the temperature falls with it.
            scale: by which the loss was multiplied, as for float16.
        """
        gradients = [logits.grad for logits in self.logits.values() if logits.grad is not None]
        for gradient in gradients:
            gradient.div_(scale)
        if all(gradient.isfinite().all() for gradient in gradients):
            self.penalty().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.temperature = HOT * (COLD / HOT) ** progress
        self._draw()

    def sensitivities(self) -> dict[str, dict[int, float]]:
        """Choice -> bits -> -log of the share at temperature 1."""
        found = {name: -torch.log_softmax(logits.detach(), 0) for name, logits in self.logits.items()}
        return {name: dict(zip(self.bits[name], values.tolist())) for name, values in found.items()}

    def stop(self) -> None:
        """Mix no more. The quantizers stay float."""
        for handle in self._handles:
            handle.remove()
