"""How a graph names what belongs to a module of the model. What writes or reads graphs asks here.

    initializers  model.LAYER.codes, .scale, ...        of a merged layer
                  model.LAYER.codes.int4, .factor       its weight in 4 bits, and what the codes are multiplied by
                  model.LAYER.quantize.scale, ...       of the quantizer of its input
                  model.MODULE.output_quant.scale, ...  of a quantizer of an output
                  model.MODULE.product_quant.N.F.scale  of factor F of the N-th product in a module
    nodes         DequantizeLinear QUANTIZER:CALL       QUANTIZER is LAYER, MODULE.output_quant or that of a factor
                  DequantizeLinear LAYER.codes          of the weight

Initializers of equal value may be shared, so that only the name of a node tells which module it belongs to.
"""

from __future__ import annotations

from typing import NamedTuple

_ROOT, _CODES, _INPUT, _SCALE = 'model.', '.codes', '.quantize', '.scale'
"""Attributes: `model` of Flat; `codes` and `quantize` of OnnxLayer; `scale` of QuantizeDequantize."""


class Site(NamedTuple):
    """One call of a quantizer."""

    quantizer: str
    """The layer whose input it quantizes, MODULE.output_quant, or MODULE.product_quant.N.F."""
    call: int
    """From 0, during one run of the graph."""

    @staticmethod
    def parse(node: str) -> Site | None:
        """The inverse of `str()`: from the name of a DequantizeLinear; None for another name."""
        quantizer, _, call = node.rpartition(':')
        return Site(quantizer, int(call)) if quantizer and call.isdecimal() else None

    def __str__(self) -> str:
        return f'{self.quantizer}:{self.call}'


def codes_of(layer: str) -> str:
    """Initializer of the codes of a layer's weight."""
    return f'{_ROOT}{layer}{_CODES}'


def weight_node(codes: str) -> str:
    """Name of the DequantizeLinear that reads codes."""
    return codes.removeprefix(_ROOT)


def layer_of(node: str) -> str | None:
    """The layer whose weight a DequantizeLinear of this name gives; None for another node."""
    return node.removesuffix(_CODES) if node.endswith(_CODES) else None


def quantizer_of(scale: str) -> str:
    """The quantizer that an initializer is the scale of."""
    return scale.removeprefix(_ROOT).removesuffix(_SCALE).removesuffix(_INPUT)
