"""Which kernels compute with a tensor: C++ on a CPU, Triton on CUDA; None is the torch code."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..compat import is_compiling
from . import native


def kernels_of(*tensors: Tensor) -> Any:
    """The C++ operators, if they compute with these tensors; else None."""
    if _is_traced():
        return None
    for x in tensors:
        if not (x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and _is_plain(x)):
            return None
    return native.operators()


def triton_of(x: Tensor, step: Tensor) -> Any:
    """The module of the Triton kernels, if they compute with this tensor and step; else None."""
    if x.device.type != 'cuda' or _is_traced() or not _is_plain(x):
        return None
    gpu = _gpu()
    return gpu if gpu is not None and gpu.takes(x, step) else None


def _is_traced() -> bool:
    return is_compiling() or torch.jit.is_tracing()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


@functools.cache
def _gpu() -> Any:
    """gpu.py, or None where it is switched off or Triton is missing or cannot compile."""
    if native.switch() == 'off':
        return None
    try:
        from . import gpu

        x = torch.ones(1, device='cuda')
        gpu.FakeQuantize.apply(x, x[0], 0, 1, False, None, False, 1)
    except Exception as error:  # Triton's have no class in common
        warnings.warn(f'the torch code runs in place of the Triton kernels: {error}', stacklevel=2)
        return None
    return gpu
