"""What the benchmarks of time and memory share; the tests build their models with it too."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from rich.console import Console

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.files import write_whole
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.report.provenance import provenance


def write_figure(path: Path, found: dict[str, Any], console: Console | None = None) -> None:
    """Write what was found, with when, with what and on what; say so on the console, if there is one."""
    about = provenance()
    about['versions'].update(found.pop('versions', {}))
    write_whole(path, (json.dumps({**found, **about}, indent=1) + '\n').encode())
    if console is not None:
        console.print(f'wrote {path}', soft_wrap=True)


def calibrated(config: Any, picture: Any, options: dict[str, Any] | None = None, bias: float = 0.0) -> nn.Module:
    """A quantized model with random weights, calibrated on a picture, in evaluation mode.

    Args:
        config: its path, or a Config.
        options: settings of the config.
        bias: standard deviation of the biases of batch normalizations.
    """
    torch.manual_seed(0)
    model = init_model(config, None, 'cpu', options)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            # Else calibration normalizes by the statistics of the batch: one pooled picture has none.
            norm.running_mean.fill_(1e-6)
            nn.init.normal_(norm.bias, std=bias)
    calibrate(model, [picture], lambda picture: infer(model, picture), trains_next=False)
    return model.eval()
