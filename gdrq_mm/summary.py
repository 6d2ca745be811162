"""The table of layers: bits, groups, range, or why a layer stayed float; and the totals."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch.nn as nn
from rich.console import Console
from rich.table import Table

from .convert import Report, quant_layers
from .layers import QuantLayer
from .quantizers import ActivationQuantizer

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Totals:
    """Sizes of a model."""

    parameters: int
    quantized: int
    """Parameters stored with few bits."""
    float_bytes: int
    """All parameters and BN statistics as float32."""
    bytes: int
    """Quantized weights at their bits, a float32 step per group and per input, the rest as float32."""
    bit_operations: int
    """MACs x weight bits x input bits of all layers, for one image; 32 bits for float; 0 if MACs are not known."""


def totals(model: nn.Module, report: Report) -> Totals:
    """Compute the totals of a quantized model."""
    ours = {id(p) for m in model.modules() if isinstance(m, ActivationQuantizer) for p in m.parameters()}
    layers = quant_layers(model)
    for layer in layers.values():
        if layer.weight_quant is not None:
            ours |= {id(p) for p in layer.weight_quant.parameters()}
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in ours)
    statistics = sum(
        b.numel() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for b in m.buffers(False)
    )
    quantized = saved = 0.0
    for layer in layers.values():
        if layer.weight_quant is not None and layer.reached:
            quantized += layer.weight.numel()
            saved += layer.weight.numel() * (FLOAT_BYTES - layer.weight_quant.bits / 8)
            saved -= layer.weight_quant.groups * FLOAT_BYTES
    float_bytes = (parameters + statistics) * FLOAT_BYTES
    operations = sum(
        row.macs * _bits(layers.get(row.name))[0] * _bits(layers.get(row.name))[1] for row in report.layers
    )
    return Totals(parameters, int(quantized), float_bytes, int(float_bytes - saved), operations)


def _bits(layer: QuantLayer | None) -> tuple[int, int]:
    weight = 32 if layer is None or layer.weight_quant is None else layer.weight_quant.bits
    return weight, 32 if layer is None or layer.input_quant is None else layer.input_quant.bits


def layer_table(model: nn.Module, report: Report) -> str:
    """The table as text."""
    table = Table(box=None, pad_edge=False)
    for column in ('layer', 'kind', 'weights', 'W', 'groups', 'A', 'range', 'note'):
        table.add_column(column, justify='right' if column in ('weights', 'W', 'groups', 'A') else 'left')
    layers = quant_layers(model)
    for row in report.layers:
        layer = layers.get(row.name)
        note = row.note
        if layer is None:
            table.add_row(row.name, row.kind, f'{row.weights:,}', '32', '', '32', '', note)
            continue
        weight, activation = layer.weight_quant, layer.input_quant
        if not layer.reached:
            note = ', '.join(filter(None, [note, 'not reached']))
        table.add_row(
            row.name,
            row.kind,
            f'{row.weights:,}',
            str(_bits(layer)[0]),
            str(weight.groups) if weight else '',
            str(_bits(layer)[1]),
            activation.kind if activation else '',
            note,
        )
    for place, what in report.additions:
        quant = getattr(dict(model.named_modules()).get(place), 'output_quant', None)
        kind = quant.kind if quant is not None else ''
        table.add_row(place, 'addition', '', '', '', '8' if quant is not None else '32', kind, what)
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    text = '\n'.join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    total = totals(model, report)
    return (
        f'{text}\n{total.quantized:,} of {total.parameters:,} parameters quantized; '
        f'{total.float_bytes / 1e6:.2f} MB float, {total.bytes / 1e6:.2f} MB quantized '
        f'(1/{total.float_bytes / max(total.bytes, 1):.1f}); {total.bit_operations / 1e9:.2f} G bit operations an image'
    )
