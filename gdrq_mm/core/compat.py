"""What older versions of torch lack, each with the version from which on it can go.

The oldest that is tested is torch 2.1; tests/core/test_compat.py compares what stands here with what torch has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from .errors import ONNX_SINCE, UserError


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, text.split('.')[:2]))


TORCH = version_of(torch.__version__)
EXPORTS = TORCH >= ONNX_SINCE
COMPILES = TORCH >= (2, 6)
"""Whether torch.compile traces quantized models; 2.1 does not, and set_stance is of 2.6."""


def check_export() -> None:
    """Refuse an export to ONNX before torch 2.8.

    Raises:
        UserError: says what to do instead.
    """
    if not EXPORTS:
        raise UserError(
            f'ONNX export needs torch 2.8 or newer, this is {torch.__version__}: export the checkpoint in a newer '
            'environment, it gives the same integers there; packed files can be written here'
        )


def _total_norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms] or [torch.zeros(())]))


total_norm: Callable[[Sequence[Tensor]], Tensor] = getattr(torch.nn.utils, 'get_total_norm', _total_norm)
"""The norm of all values of tensors; torch's own from 2.6 on."""

is_compiling: Callable[[], bool] = getattr(torch.compiler, 'is_compiling', torch._utils.is_compiling)
"""Whether torch.compile traces; public from 2.3 on."""


def autocast_to_half() -> bool:
    """Whether a CPU computes in float16 now; by torch.get_autocast_dtype from 2.4 on."""
    if not hasattr(torch, 'get_autocast_dtype'):
        return torch.is_autocast_cpu_enabled() and torch.get_autocast_cpu_dtype() == torch.float16
    return torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu') == torch.float16


def after_state_dict(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call a hook when a module has put itself into a state dict: register_state_dict_post_hook, public from 2.5 on."""
    getattr(module, 'register_state_dict_post_hook', module._register_state_dict_hook)(hook)


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile made runs as it is written, meanwhile."""
    if not COMPILES:
        yield
        return
    with torch.compiler.set_stance('force_eager'):
        yield


def compiler_flags() -> list[str]:
    """For C++ that is linked with torch: before torch 2.7 it was built with the older names of the standard library."""
    return [] if torch._C._GLIBCXX_USE_CXX11_ABI else ['-D_GLIBCXX_USE_CXX11_ABI=0']


def has_bfloat16() -> bool:
    """Whether this CPU computes with bfloat16; torch.cpu.get_capabilities tells it too, from 2.10 on."""
    info = Path('/proc/cpuinfo')
    return info.is_file() and 'avx512_bf16' in info.read_text()
