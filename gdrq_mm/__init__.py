"""GDRQ low-bit quantization: for OpenMMLab (gdrq_mm.openmmlab, the command gdrq, configs) and for a plain torch loop.

The functions below are the door for plain torch; docs/api.md explains them, examples/plain_torch.py uses most of them:

    import gdrq_mm as gq

    report = gq.quantize(model, 'w4a4', example=images)
    gq.calibrate(model, loader)
    optimizer = torch.optim.SGD(gq.parameter_groups(model, weight_decay=1e-4), lr=0.01)
    ...  # after each optimizer.step(): gq.after_step(model)
    gq.freeze(model)
    gq.export(model, example=images, out='exported')

Importing this package loads nothing else; each function loads what it needs when it is first asked for.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'
CONFIGS = Path(__file__).resolve().parent / '.mim' / 'configs'
"""The configs that the package brings: `gdrq_mm::PATH`."""

__all__ = [
    'after_step',
    'allocate',
    'calibrate',
    'checkpoint',
    'export',
    'freeze',
    'load',
    'parameter_groups',
    'quantize',
    'to_float',
]

if TYPE_CHECKING:
    from .plain import (
        after_step,
        allocate,
        calibrate,
        checkpoint,
        export,
        freeze,
        load,
        parameter_groups,
        quantize,
        to_float,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f'{__name__}.plain'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
