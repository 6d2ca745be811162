"""From the trained model to integers: merging batch normalization, packing weights, checking that nothing changed."""

from .merge import IntegerLayer, merge_model
from .packed import read_packed, write_packed
from .verify import compare

__all__ = ['IntegerLayer', 'compare', 'merge_model', 'read_packed', 'write_packed']
