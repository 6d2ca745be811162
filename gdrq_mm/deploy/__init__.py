"""From the trained model to integers: merging, packing, ONNX, runtimes, and the proof that nothing changed."""

from .bundle import export_graphs, use_runtime, write_bundle
from .merge import IntegerLayer, merge_model
from .packed import read_packed, write_packed
from .verify import compare

__all__ = [
    'IntegerLayer',
    'compare',
    'export_graphs',
    'merge_model',
    'read_packed',
    'use_runtime',
    'write_bundle',
    'write_packed',
]
