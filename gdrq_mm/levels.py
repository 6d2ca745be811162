"""A quantizer for each pyramid level in layers that a head shares between its levels (Chen et al., AQD, CVPR 2021).

Which level it is, a layer counts by its calls; the head starts the count anew and checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from .errors import UserError
from .layers import QuantLayer
from .topology import Topology


def split_levels(model: nn.Module, layers: Mapping[str, QuantLayer], topology: Topology) -> None:
    """Give the layers that ask for it a quantizer for each call during one forward of the head that calls them."""
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        calls = topology.calls.get(name, 0)
        if layer.input_quant is None or not layer.activation_settings.per_level or calls < 2:
            continue
        parts = name.split('.')
        above = ('.'.join(parts[:length]) for length in reversed(range(len(parts))))
        around = next((each for each in above if topology.calls.get(each) == 1), None)
        if around is None:
            raise UserError(f'activation.per_level: no module around layer {name} is called once a prediction')
        head = modules[around]
        layer.split_levels(calls)
        if not hasattr(head, 'level_layers'):
            head.level_layers = ()
            head.register_forward_pre_hook(start_levels)
            head.register_forward_hook(_check_levels)
        head.level_layers += ((name, layer),)  # type: ignore[operator]


def move_levels(model: nn.Module, replaced: Mapping[Any, Any]) -> None:
    """Let the heads of a model count for what took the place of their layers: old module -> new one."""
    for head in model.modules():
        if hasattr(head, 'level_layers'):
            counted: Any = head.level_layers
            head.level_layers = tuple((name, replaced.get(layer, layer)) for name, layer in counted)  # type: ignore[assignment]


def start_levels(head: Any, args: Any = ()) -> None:
    """Count anew what this module counts, if it does; a hook in front of its forward."""
    for _, layer in getattr(head, 'level_layers', ()):
        layer.level = 0


def _check_levels(head: nn.Module, args: Any, out: Any) -> None:
    for name, layer in head.level_layers:  # type: ignore[union-attr]
        if layer.level not in (0, layer.levels):
            raise UserError(
                f'layer {name} has thresholds for {layer.levels} levels, but was called {layer.level} times '
                'in one forward of its head; activation.per_level does not fit this model'
            )
