"""The table of layers: bits, groups and range of each layer, or why it stayed float; and the totals of a model."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch.nn as nn
from rich.console import Console
from rich.table import Table

from ..core.convert import Report
from ..core.modules import quant_layers
from ..core.products import factor_bits, factor_quantizers
from ..core.pyramid import InputQuant
from ..core.quantizers import learned_parameters
from ..core.typed import FLOAT_BITS

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Totals:
    """Sizes of the deployed model: without auxiliary heads."""

    parameters: int
    quantized: int
    """How many of the parameters are stored with few bits."""
    float_bytes: int
    """Size with all parameters and BN statistics in float32."""
    bytes: int
    """Size with quantized weights at their bits, one float32 step for each group, and the rest in float32."""
    bit_operations: int
    """Sum over the layers of MACs x weight bits x input bits for one image; float counts as 32 bits."""


def totals(model: nn.Module, report: Report) -> Totals:
    """Compute the totals of a model."""
    learned, deployed = learned_parameters(model), report.plan.deployed
    layers = quant_layers(model)
    parameters = sum(p.numel() for n, p in model.named_parameters() if n not in learned and deployed(n))
    statistics = sum(
        b.numel()
        for module, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and deployed(module)
        for name, b in m.named_buffers(recurse=False)
        if name != 'num_batches_tracked'
    )
    quantized, saved = 0, 0.0
    counted: set[tuple[int, int]] = set()  # a weight that two layers share counts once
    for place, layer in layers.items():
        if deployed(place) and layer.bits[0] != FLOAT_BITS and layer.weight_key not in counted:
            counted.add(layer.weight_key)
            quantized += layer.weight.numel()
            saved += layer.weight.numel() * (FLOAT_BYTES - layer.bits[0] / 8)
            saved -= layer.weight_quant.scale_count * FLOAT_BYTES
    float_bytes = (parameters + statistics) * FLOAT_BYTES
    operations = 0
    for row in report.layers:
        weight, activation = layers[row.name].bits if row.name in layers else (FLOAT_BITS, FLOAT_BITS)
        operations += row.macs * weight * activation
    for row in report.products:
        one, other = factor_bits(model, row.name)
        operations += row.macs * one * other
    return Totals(parameters, quantized, float_bytes, int(float_bytes - saved), operations)


def layer_table(model: nn.Module, report: Report) -> str:
    """The table as text."""
    table = Table(box=None, pad_edge=False)
    for column in ('layer', 'kind', 'weights', 'W', 'groups', 'A', 'range', 'note'):
        table.add_column(column, justify='right' if column in ('weights', 'W', 'groups', 'A') else 'left')
    layers = quant_layers(model)
    for row in report.layers:
        layer = layers.get(row.name)
        if layer is None:
            table.add_row(row.name, row.kind, f'{row.weights:,}', '32', '', '32', '', row.note)
            continue
        weight, activation = layer.bits
        note = row.note
        quantizers = [q for q in (layer.weight_quant, layer.input_quant) if q is not None]
        if any(q.bits_in_use == FLOAT_BITS for q in quantizers):
            note = ', '.join(filter(None, [note, 'float: not reached by calibration']))
        groups = str(layer.weight_quant.groups) if weight != FLOAT_BITS else ''
        table.add_row(
            row.name,
            row.kind,
            f'{row.weights:,}',
            str(weight),
            groups,
            str(activation),
            _range(layer.input_quant),
            note,
        )
    for row in report.products:
        one, other = (str(bits) for bits in factor_bits(model, row.name))
        ranges = ', '.join(dict.fromkeys(filter(None, map(_range, factor_quantizers(model, row.name)))))
        note = ', '.join(filter(None, [row.note, f'{row.macs:,} operations']))
        table.add_row(row.name, row.kind, '', one, '', other, ranges, note)
    modules = dict(model.named_modules())
    for output in report.outputs:
        quant = getattr(modules.get(output.name), 'output_quant', None)
        bits = str(quant.bits_in_use) if quant is not None else str(FLOAT_BITS)
        table.add_row(output.name, output.before, '', '', '', bits, _range(quant), output.note)
    console = Console(file=io.StringIO(), width=240, markup=False)
    console.print(table)
    text = '\n'.join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
    total = totals(model, report)
    return (
        f'{text}\n{total.quantized:,} of {total.parameters:,} parameters quantized; '
        f'{total.float_bytes / 1e6:.2f} MB float, {total.bytes / 1e6:.2f} MB quantized '
        f'(1/{total.float_bytes / max(total.bytes, 1):.1f}); {total.bit_operations / 1e9:.2f} G bit operations an image'
    )


def _range(quantizer: InputQuant | None) -> str:
    if quantizer is None or quantizer.bits_in_use == FLOAT_BITS:
        return ''
    return quantizer.kind if quantizer.calibrated else 'undecided'
