"""Input quantizers for each level of a feature pyramid (`activation.per_level`; Chen et al., AQD, CVPR 2021).

A detection head calls its layers once for each pyramid level. Each such layer counts its calls to know the level. The
head resets the count before its forward and checks it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from .errors import UserError
from .quantizers import ActivationQuantizer

if TYPE_CHECKING:
    from .topology import Plan


class PyramidQuantizers(nn.ModuleList):
    """The input quantizers of a layer that a head calls once for each pyramid level."""

    @property
    def quantizers(self) -> list[Any]:
        """The quantizers of the pyramid levels, in the order of the calls."""
        return list(self)

    @property
    def bits_in_use(self) -> int:
        """Bits, the same for each pyramid level; 32 if calibration did not reach one of them."""
        return max(quant.bits_in_use for quant in self.quantizers)

    @property
    def calibrated(self) -> bool:
        """Whether every pyramid level has a threshold."""
        return all(quant.calibrated for quant in self.quantizers)

    @property
    def kind(self) -> str:
        """The ranges of the pyramid levels, without repetition, and how many levels there are."""
        return '/'.join(dict.fromkeys(quant.kind for quant in self.quantizers)) + f', {len(self)} pyramid levels'


InputQuant = ActivationQuantizer | PyramidQuantizers


def quantizers_of(quant: InputQuant | None) -> list[ActivationQuantizer]:
    """The quantizers of an input: none, one, or one for each pyramid level."""
    if quant is None:
        return []
    return quant.quantizers if isinstance(quant, PyramidQuantizers) else [quant]


def split_pyramid(model: nn.Module, layers: Mapping[str, Any], plan: Plan) -> None:
    """Give each layer with `per_level` as many input quantizers as one forward of its head calls it."""
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        calls = plan.calls.get(name, 0)
        if layer.input_quant is None or not layer.activation_settings.per_level or calls < 2:
            continue
        parts = name.split('.')
        above = ('.'.join(parts[:length]) for length in reversed(range(len(parts))))
        around = next((each for each in above if plan.calls.get(each) == 1), None)
        if around is None:
            raise UserError(f'activation.per_level: no module around layer {name} is called once a prediction')
        layer.split_pyramid(calls)
        count_levels(modules[around], name, layer)


def count_levels(head: Any, name: str, layer: nn.Module) -> None:
    """Let a head start the count of a layer's calls anew with each forward, and check it at the end."""
    if not hasattr(head, 'pyramid_layers'):
        head.pyramid_layers = ()
        head.register_forward_pre_hook(start_pyramid)
        head.register_forward_hook(check_pyramid)
    head.pyramid_layers += ((name, layer),)


def move_pyramid(model: nn.Module, replaced: Mapping[Any, Any]) -> None:
    """Let the heads of a model reset and check the new layers instead of the old ones, by `replaced`: old -> new."""
    for head in model.modules():
        if hasattr(head, 'pyramid_layers'):
            counted: Any = head.pyramid_layers
            head.pyramid_layers = tuple((name, replaced.get(layer, layer)) for name, layer in counted)  # type: ignore[assignment]


def start_pyramid(head: Any, args: Any = ()) -> None:
    """Reset the counts of the layers that this head calls once for each pyramid level; a hook before its forward."""
    for _, layer in getattr(head, 'pyramid_layers', ()):
        layer.pyramid_level = 0


def check_pyramid(head: nn.Module, args: Any, out: Any) -> None:
    """Check that each of them was called once for each pyramid level; a hook after its forward."""
    for name, layer in head.pyramid_layers:  # type: ignore[union-attr]
        if layer.pyramid_level not in (0, layer.pyramid_levels):
            raise UserError(
                f'layer {name} has thresholds for {layer.pyramid_levels} pyramid levels, but was called '
                f'{layer.pyramid_level} times in one forward of its head; activation.per_level does not fit this model'
            )
