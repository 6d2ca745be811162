"""Count oscillating weights in a training, and freeze them."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.modules import quant_layers
from ...core.oscillation import Oscillations
from ..models import bare_model

KEY = 'oscillations'
"""Of a checkpoint: the state, see Oscillations.state_dict."""


@HOOKS.register_module()
class OscillationHook(Hook):
    """Freezes weights that jump to and fro between two codes (docs/method.md, section 8).

    It needs a method with even steps, and does nothing where no weight is quantized, as in a control. The log gets the
    share of weights that oscillate (frequency above 0.005) and of those that are frozen.

    Args:
        limits: frequency from which a weight is frozen, at the beginning and at the end; None only counts.
        momentum: of the running averages.

    Example:
        custom_hooks = [dict(type='OscillationHook', limits=(0.1, 0.01))]
    """

    priority = 45  # type: ignore[assignment]  # behind ThresholdHook, before EMAHook

    def __init__(self, limits: tuple[float, float] | None = (0.1, 0.01), momentum: float = 0.01) -> None:
        self.limits, self.momentum = limits, momentum
        self.oscillations: Oscillations | None = None
        self._saved: dict[str, Any] = {}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._saved = checkpoint.get(KEY, {}) if runner._resume else {}

    def before_train(self, runner: Runner) -> None:
        model = bare_model(runner.model)
        if all(layer.weight_quant is None for layer in quant_layers(model).values()):  # a control, or 32 bits
            runner.logger.warning('OscillationHook watches nothing: no weight is quantized.')
            return
        self.oscillations = Oscillations(model, self.limits, self.momentum)
        self.oscillations.load_state_dict(self._saved)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        if self.oscillations is None or not runner.optim_wrapper.should_update():
            return
        self.oscillations.step((runner.iter + 1) / runner.max_iters)
        if self.every_n_train_iters(runner, 50) or self.is_last_train_iter(runner):
            moving, frozen = self.oscillations.shares()
            runner.message_hub.update_scalars({'train/oscillating': moving, 'train/frozen': frozen})

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.oscillations is not None and self.oscillations.states:
            checkpoint[KEY] = self.oscillations.state_dict()
