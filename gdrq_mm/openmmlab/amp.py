"""Mixed precision, on a GPU by mmengine's AmpOptimWrapper, which refuses to work without one, and on a CPU by ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from ..core.errors import UserError
from .tasks import task_of


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast; bfloat16 needs no loss scaling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            message = 'this CPU has no instructions for bfloat16: mixed precision is many times slower than float32'
            print_log(message, logger='current', level=logging.WARNING)

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
