"""Mixed precision, on a GPU by mmengine's AmpOptimWrapper, which refuses to work without one, and on a CPU by ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from ..core.errors import UserError
from .tasks import task_of


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast; bfloat16 needs no loss scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and mmengine's gradient accumulation."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def use_amp(cfg: Config) -> None:
    """Let a config train in mixed precision: float16 on a GPU, bfloat16 without one.

    Raises:
        UserError: a detector without a GPU, or no optimizer.
    """
    if not isinstance(cfg.get('optim_wrapper'), dict):
        raise UserError(f'--amp: optim_wrapper={cfg.get("optim_wrapper")!r} of the config is not a dict')
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    elif task_of(cfg) == 'det':
        raise UserError("--amp needs a GPU for detection: mmcv's NMS on a CPU knows float32 only")
    else:
        cfg.optim_wrapper.type = 'gdrq_mm.openmmlab.amp.CPUAmpOptimWrapper'
