"""Everything that uses OpenMMLab: the runner, the hooks, checkpoints, data loading, tasks."""

from . import layers  # noqa: F401  registers the layers by name
from .apis import draw, infer, init_model
from .runner import QuantRunner

__all__ = ['QuantRunner', 'draw', 'infer', 'init_model']
