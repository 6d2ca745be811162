"""The merged model of a packed file: a float model whose layers are replaced by those of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core.attention import LINEAR, PROJECTIONS, WrittenOut, packed_attention, write_out
from ..core.config import Quantization
from ..core.deployable import quantize_output
from ..core.errors import UserError
from ..core.layers import QUANTIZED, QuantLayer
from ..core.modules import replace_modules
from ..core.products import attach
from ..core.pyramid import count_levels
from .merge import Absent, IntegerLayer, IntegerPyramid, OutputQuantizer, move_output
from .packed import PackedLayer, named_tensors, read_packed

_FACTOR = re.compile(r'(?:(.+)\.)?product_quant\.(\d{1,3})\.([01])')
"""Name of the quantizer of a factor: module, number of the product, which factor."""


def load_packed(model: Any, path: str | Path, config: Quantization | None = None) -> tuple[Any, dict[str, Any]]:
    """Turn a float model into the merged model of a packed file, in place and bit-exact.

    Args:
        model: float, as the config builds it.
        config: whose bits the layers must have; None: those of the file are right.

    Returns:
        The model, and what was known of its data set.

    Raises:
        UserError: the file cannot be read, or it is that of another model or of other bits; the model is left unusable.
    """
    packed = read_packed(path)
    write_out(model, [name for name in packed_attention(model) if f'{name}.{PROJECTIONS[0]}' in packed.layers])
    known: dict[str, Any] = dict(model.named_modules())
    heads, norms = ({getattr(each, key) for each in packed.layers.values()} - {None} for key in ('head', 'norm'))
    factors = {name: match for name in packed.outputs if (match := _FACTOR.fullmatch(name))}
    multiplying = {match[1] or '' for match in factors.values()}
    outputs = {name: ends for name, ends in packed.outputs.items() if name not in factors}
    for name in (*packed.layers, *heads, *norms, *packed.absent, *outputs, *multiplying):
        if name not in known:
            raise UserError(f'packed file {path} is that of another model: the config has no {name}')
    for name, layer in packed.layers.items():
        if type(known[name]) not in QUANTIZED and not isinstance(known[name], QuantLayer):
            raise UserError(f'packed file {path} is that of another model: {name} is a {type(known[name]).__name__}')
        if config is not None:
            _check_config(path, name, layer, config)
    device = _device_of(model)
    replaced: dict[nn.Module, nn.Module] = {
        known[name]: _empty(known[name], layer) for name, layer in packed.layers.items()
    }
    replaced.update({known[name]: nn.Identity() for name in norms})
    replaced.update({known[name]: Absent(name) for name in packed.absent})
    for old, new in replaced.items():
        move_output(old, new)
    replace_modules(model, replaced)
    for name, layer in packed.layers.items():
        if layer.head is not None:
            count_levels(known[layer.head], name, replaced[known[name]])
    for name, match in factors.items():
        pair = packed.outputs.get(f'{name[:-1]}0'), packed.outputs.get(f'{name[:-1]}1')
        if None in pair:
            raise UserError(f'packed file {path} is damaged: one factor of {name[:-2]} is missing')
        if match[3] == '0':
            step = torch.zeros((), device=device)
            quantizers: list[nn.Module] = [OutputQuantizer(step.clone(), *ends) for ends in pair]  # type: ignore[misc]
            attach(known[match[1] or ''], int(match[2]), quantizers)
    for module in model.modules():
        if isinstance(module, WrittenOut):
            module.forget_weights()
    for name, (lo, hi) in outputs.items():
        module = replaced.get(known[name], known[name])
        module.add_module('output_quant', OutputQuantizer(torch.zeros((), device=device), lo, hi))
        module.register_forward_hook(quantize_output)
    _fill(model, packed.state, path)
    return model.eval(), packed.meta


def _check_config(path: Any, name: str, layer: PackedLayer, config: Quantization) -> None:
    """Raise UserError if the config gives the layer other bits; which layers are first and last is not known here."""
    settings = [config.for_layer(name, edge) for edge in (False, True)]
    allowed = [(weight.bits, activation.bits) for weight, activation in settings]
    if config.skipped(name):
        raise UserError(f'packed file {path} has integers in layer {name}, which the config skips')
    if layer.bits not in allowed:
        found, expected = ('W{}A{}'.format(*bits) for bits in (layer.bits, allowed[0]))
        raise UserError(f'packed file {path} has {found} in layer {name}, the config {expected}')
    if layer.head is not None and not settings[0][1].per_level:
        raise UserError(
            f'packed file {path} has pyramid levels in layer {name}, the config has activation.per_level=False'
        )


def _empty(module: Any, layer: PackedLayer) -> IntegerLayer | IntegerPyramid:
    """The merged layer with zeros, in the place of a float one."""
    channels = module.out_features if isinstance(module, LINEAR) else module.out_channels
    levels = [
        IntegerLayer(
            module,
            codes=torch.zeros(module.weight.shape, dtype=torch.int8),
            step=torch.zeros(()),
            multiplier=torch.zeros(channels),
            bias=torch.zeros(channels),
            lo=lo,
            hi=hi,
            weight_bits=layer.weight_bits,
            input_bits=bits,
            spread=layer.spread,
        )
        for lo, hi, bits in layer.inputs
    ]
    for each in levels:
        each.norm = layer.norm
    merged = levels[0] if layer.head is None else IntegerPyramid(levels)
    return merged.to(_device_of(module))


def _device_of(module: Any) -> Any:
    """Where a module's Parameters are; the CPU for those without any, or without data."""
    device = next((p.device for p in module.parameters()), torch.device('cpu'))
    return torch.device('cpu') if device.type == 'meta' else device


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Any) -> None:
    """Load the state, a tensor of several names under all of them."""
    named = {id(tensor): name for name, tensor in named_tensors(model).items()}
    aliases = {name: named[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}
    every = {name: state[first] for name, first in aliases.items() if first in state}
    try:
        model.load_state_dict({**state, **every})
    except RuntimeError as error:  # keys or sizes
        raise UserError(f'packed file {path} does not fit the model: {str(error).splitlines()[-1].strip()}') from None
