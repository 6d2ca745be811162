"""Mixed precision, on a GPU by mmengine's AmpOptimWrapper, which refuses to work without one, and on a CPU by ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from ..core.errors import UserError
from .mistakes import registered
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


def check_amp(kind: Any) -> None:
    """Raise UserError for an AmpOptimWrapper without an accelerator, which mmengine only asserts.

    Args:
        kind: the `type` of an `optim_wrapper`.
    """
    found = registered(kind, OPTIM_WRAPPERS)
    if isinstance(found, type) and issubclass(found, AmpOptimWrapper) and get_device() == 'cpu':
        raise UserError(f'optim_wrapper.type={found.__name__!r} needs a GPU; --amp trains in bfloat16 without one')


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
        for key in ('loss_scale', 'dtype', 'use_fsdp'):  # of AmpOptimWrapper alone
            cfg.optim_wrapper.pop(key, None)
