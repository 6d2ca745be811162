"""Mixed precision on a CPU: mmengine's AmpOptimWrapper refuses to work without an accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Forward passes under bfloat16 autocast; bfloat16 needs no loss scaling. `--amp` takes it where no GPU is."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and mmengine's gradient accumulation."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield
