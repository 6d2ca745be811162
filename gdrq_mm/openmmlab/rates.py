"""Learning rate and weight decay of what quantizers learn: those of the layer, times the multiples of the method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from mmengine.optim import OptimWrapper

from ..core.quantizers import Quantizer, learned_parameters


def set_rates(optim_wrapper: Any, model: nn.Module, custom_keys: Iterable[str] = ()) -> None:
    """Give each learned Parameter the settings of its layer's weight, with the multiples of its method.

    It is done behind the constructor of the optimizer, so it holds for each of them: `paramwise_cfg.custom_keys`,
    `norm_decay_mult`, a rate that decays from layer to layer, and `lr_mult=0`. A custom key that fits the Parameter's
    name and not that of the weight, such as 'learned_step', has the last word.

    Args:
        optim_wrapper: one that was just built.
        model: bare.
        custom_keys: those of `paramwise_cfg`.
    """
    learned = {id(p): (q, w) for p, q, w in _learned(model, sorted(sorted(custom_keys), key=len, reverse=True))}
    if not learned or not isinstance(optim_wrapper, OptimWrapper):
        return
    optimizer = optim_wrapper.optimizer
    settings = {id(p): group for group in optimizer.param_groups for p in group['params']}
    optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in _split(group, learned, settings)]
    if optim_wrapper.base_param_settings is None and len(optimizer.param_groups) > 1:
        # What mmengine does where the constructor makes several groups: the log shows the rate that has no multiple
        optim_wrapper.base_param_settings = dict(params=torch.tensor([0.0]), **optimizer.defaults)


def _learned(model: nn.Module, keys: list[str]) -> list[tuple[nn.Parameter, Quantizer, nn.Parameter | None]]:
    """Each learned Parameter, its quantizer, and the weight of the module whose weight, input or output it quantizes.

    The weight is None where the module has none, as an nn.Identity. Left out are those with a custom key of their own.

    Args:
        keys: custom keys, in the order in which mmengine looks for one that fits.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    found = []
    for name, quantizer in learned_parameters(model).items():
        holder = name.rpartition('.')[0]
        while isinstance(modules[holder], (Quantizer, nn.ModuleList)):  # one for each pyramid level stands in a list
            holder = holder.rpartition('.')[0]
        if next((key not in f'{holder}.weight' for key in keys if key in name), False):
            continue
        weight = getattr(modules[holder], 'weight', None)
        found.append((parameters[name], quantizer, weight if isinstance(weight, nn.Parameter) else None))
    return found


def _split(group: dict[str, Any], learned: dict[int, Any], settings: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """A parameter group in parts, in the same order: a part for each learned Parameter, with settings of its own."""
    parts: list[dict[str, Any]] = []
    names = group.get('param_names') or [None] * len(group['params'])
    joined = False
    for parameter, name in zip(group['params'], names):
        if id(parameter) in learned:
            quantizer, weight = learned[id(parameter)]
            own = settings.get(id(weight), group)
            part = {**own, 'lr': own['lr'] * quantizer.lr_mult}
            if 'weight_decay' in own:
                part['weight_decay'] = own['weight_decay'] * quantizer.decay_mult
            parts.append({**part, 'params': [], 'param_names': []})
            joined = False
        elif not joined:
            parts.append({**group, 'params': [], 'param_names': []})
            joined = True
        parts[-1]['params'].append(parameter)
        parts[-1]['param_names'].append(name)
    if 'param_names' not in group:
        for part in parts:
            del part['param_names']
    return parts
