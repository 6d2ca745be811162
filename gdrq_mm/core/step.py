"""What happens to the quantizers of a model after an optimizer step and between two stages of training."""

from __future__ import annotations

import torch
import torch.nn as nn

from .layers import QuantLayer
from .modules import every_module, follow, moves, quant_layers
from .quantizers import ActivationQuantizer, Quantizer, Stage
from .quantizers.following import move_thresholds


@torch.no_grad()
def after_step(model: nn.Module, step: int | None = None, progress: float | None = None) -> None:
    """Call once after each optimizer step, before an average of the weights: project weights, then move thresholds.

    Statistics of all forwards since the last call and of all processes are added up, in one collective, in two where a
    method takes largest values. `step` is the number of the optimizer step, from 0; None counts the calls. `progress`,
    the part of the training that is done, is for methods that go by it (inq, tsq).
    """
    if step is None:
        step = model.steps_taken = getattr(model, 'steps_taken', -1) + 1  # type: ignore[assignment]
    modules = every_module(model)
    follow(model, modules)
    for module in modules:
        if isinstance(module, Quantizer) and module.stage == Stage.FREEZE:
            module.hold()
    for layer in modules:
        if isinstance(layer, QuantLayer) and layer.weight_quant is not None and layer.weight_quant.calibrated:
            layer.weight_quant.progress = progress
            projected = layer.weight_quant.after_step(layer.filters(), step)
            if projected is not None and layer.learns:  # a frozen weight would shrink, step by step
                layer.weight.copy_(layer.set_filters(projected))
    activations = [module for module in modules if isinstance(module, ActivationQuantizer)]
    move_thresholds([quantizer for quantizer in activations if moves(quantizer)])  # type: ignore[misc]
    for quantizer in activations:
        quantizer.after_step(step)


@torch.no_grad()
def set_stage(model: nn.Module, stage: Stage) -> Stage | None:
    """Set the stage of every quantizer that is in use; freezing keeps the thresholds of this moment.

    Returns:
        The stage before; None if the model has no quantizer.
    """
    follow(model, every_module(model))
    filters = {layer.weight_quant: layer.filters for layer in quant_layers(model).values()}
    before = None
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer) and quantizer.stage != Stage.FLOAT:
            before = quantizer.stage
            if stage == Stage.FREEZE:
                quantizer.freeze(*([filters[quantizer]()] if quantizer in filters else []))
            else:
                quantizer.set_state(stage=stage)
    return before
