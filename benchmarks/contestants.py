"""The contestants of train_step.py and scaling.py: models of configs, quantized by this package and by others."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import Tensor

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.kernels import native
from gdrq_mm.core.modules import quant_layers, replace_modules
from gdrq_mm.core.step import after_step
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.models import record_plan

BREVITAS = 'uv pip install --no-deps brevitas==0.13.4 dependencies==2.0.1 unfoldNd==0.2.3'
"""Leaves torch, numpy and setuptools as they are. Brevitas 0.12.1 asks for a setuptools that torch 2.13 refuses."""

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
ROOT = Path(__file__).resolve().parents[1]
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
PRECISIONS = {'float32': None, 'bf16': torch.bfloat16}
"""Name -> the type of autocast."""
MODELS = {
    'ResNet-18': ('configs/cls/resnet18_gdrq_w4a4.py', 16, 224),
    'ResNet-50': ('configs/cls/resnet50_gdrq_w4a4.py', 8, 224),
    'CIFAR ResNet-18': ('configs/cls/resnet18_width16_gdrq_w4a4_cifar10.py', 128, 32),
    'YOLOX': ('configs/det/yolox_nano_gdrq_w4a4_digits.py', 8, None),
    'Faster R-CNN': ('configs/det/faster_rcnn_r18_gdrq_w4a4_digits.py', 8, None),
    'PSPNet': ('configs/seg/pspnet_r18_gdrq_w4a4_digits.py', 8, None),
}
"""Title -> config, pictures a step, and pixels of pictures of noise; None: pictures of the digits."""


@dataclass
class Contestant:
    """A model with its batch, optimizer and what is to be done after an optimizer step."""

    model: Any
    parse_losses: Callable[[Any], Any]
    batch: dict[str, Any]
    precision: str
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]
    kernels: bool = True

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch."""
        dtype = PRECISIONS[self.precision]
        with torch.autocast(DEVICE.type, dtype) if dtype else nullcontext():
            return self.parse_losses(self.model(**batch, mode='loss'))[0]

    def step(self) -> float:
        """One training step; its seconds."""
        batch = copy.deepcopy(self.batch)  # detectors write into their samples
        operators = native.operators
        if not self.kernels:
            native.operators = lambda: None
        _wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()
        self.after_step()
        _wait()
        seconds = time.perf_counter() - start
        native.operators = operators
        return seconds


def _wait() -> None:
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()


# ---- the contestants ----------------------------------------------------------------------------------------------


def settings(deployable: bool) -> Quantization:
    """The quantization of gdrq_w4a4.py."""
    return Quantization.from_dict(
        dict(
            weight=dict(method='gdrq', bits=4, groups=4), activation=dict(method='gdrq', bits=4), deployable=deployable
        )
    )


def use_float(model: Any, batch: dict[str, Any]) -> None:
    """Leave the model as it is."""


def use_gdrq(model: Any, batch: dict[str, Any], deployable: bool = False) -> None:
    """Quantize with gdrq_mm and calibrate, as QuantRunner does."""
    batch = copy.deepcopy(batch)
    one = batch['inputs'][:1], batch['data_samples'][:1]
    model.eval()
    quantize_model(model, settings(deployable), record_plan(model, lambda: model(*one, mode='predict')))
    model.train()
    calibrate(model, [batch], lambda batch: model(**batch, mode='loss'))


def use_deployable(model: Any, batch: dict[str, Any]) -> None:
    """The same with shared inputs and quantized additions."""
    use_gdrq(model, batch, deployable=True)


def placement(model: Any, batch: dict[str, Any]) -> dict[nn.Module, tuple[int, int, bool]]:
    """Layer -> bits of the weight and of the input, and whether the input is signed, as gdrq has them."""
    other = copy.deepcopy(model)
    use_gdrq(other, batch)
    modules = dict(model.named_modules())
    return {modules[name]: (*layer.bits, layer.input_quant.lo < 0) for name, layer in quant_layers(other).items()}


class AoConv2d(nn.Conv2d):
    """nn.Conv2d with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.fake_input(x), self.fake_weight(self.weight), self.bias)


class AoLinear(nn.Linear):
    """nn.Linear with torch.ao's FakeQuantize on input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fake_input(x), self.fake_weight(self.weight), self.bias)


def use_torch_ao(model: Any, batch: dict[str, Any]) -> None:
    """torch.ao's FakeQuantize: symmetric weights, affine inputs, a MovingAverageMinMaxObserver for each."""
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    for layer, (weight_bits, input_bits, _) in placement(model, batch).items():
        top = 2 ** (weight_bits - 1) - 1
        common = dict(observer=MovingAverageMinMaxObserver, reduce_range=False)
        layer.fake_weight = FakeQuantize(
            quant_min=-top, quant_max=top, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **common
        )
        layer.fake_input = FakeQuantize(
            quant_min=0, quant_max=2**input_bits - 1, dtype=torch.quint8, qscheme=torch.per_tensor_affine, **common
        )
        layer.__class__ = AoConv2d if isinstance(layer, nn.Conv2d) else AoLinear


def use_brevitas(model: Any, batch: dict[str, Any]) -> None:
    """Brevitas's quantized layers: weights scaled by their largest value, inputs by a scale that learns."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    replaced = {}
    for layer, (weight_bits, input_bits, signed) in placement(model, batch).items():
        options: dict[str, Any] = dict(
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=weight_bits,
            input_quant=Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            input_bit_width=input_bits,
            # It first scales by a percentile, which is slow, for 300 steps by default. What follows is timed.
            input_collect_stats_steps=1,
            bias=layer.bias is not None,
        )
        if isinstance(layer, nn.Conv2d):
            sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
            options |= dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
            new = qnn.QuantConv2d(*sizes, **options)
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        replaced[layer] = new
    replace_modules(model, replaced)


CONTESTANTS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    'float': use_float,
    'gdrq': use_gdrq,
    'gdrq-deployable': use_deployable,
    'gdrq-torch-code': use_gdrq,
    'torch.ao': use_torch_ao,
    'brevitas': use_brevitas,
    'float-compiled': use_float,
    'gdrq-compiled': use_gdrq,
}
COMPILED = ('float-compiled', 'gdrq-compiled')
"""By torch.compile, which takes a minute or more for each of them: measured where they are asked for."""


def batch_of(cfg: Any, model: Any, count: int, size: int | None) -> dict[str, Any]:
    """Inputs and samples of a training step, on DEVICE."""
    if size is not None:
        samples = [DataSample().set_gt_label(i % 10).to(DEVICE) for i in range(count)]
        return dict(inputs=torch.randn(count, 3, size, size, device=DEVICE), data_samples=samples)
    with tempfile.TemporaryDirectory() as folder:
        digits.build(folder)
        loader = cfg.train_dataloader
        loader.update(num_workers=0, persistent_workers=False, batch_size=count)
        loader.dataset.data_root = str(Path(folder) / Path(loader.dataset.data_root).name)
        return model.data_preprocessor(next(iter(Runner.build_dataloader(loader, seed=0))), True)


def build(
    name: str, layout: str, precision: str, title: str, batch: int | None = None, size: int | None = None
) -> Contestant:
    """A contestant that is ready for its first training step; `batch` and `size` are those of MODELS by default."""
    torch.manual_seed(0)
    config, usual_batch, usual_size = MODELS[title]
    cfg = read_config(ROOT / config)
    cfg.pop('quantization')
    model = init_model(cfg, None, DEVICE.type).train()
    data = batch_of(cfg, model, batch or usual_batch, usual_size and (size or usual_size))
    data['inputs'] = data['inputs'].contiguous(memory_format=FORMATS[layout])
    model.to(memory_format=FORMATS[layout])
    CONTESTANTS[name](model, data)
    model.to(DEVICE, memory_format=FORMATS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    after = partial(after_step, model) if quant_layers(model) else lambda: None
    parse_losses = model.parse_losses
    model = torch.compile(model) if name in COMPILED else model
    return Contestant(model, parse_losses, data, precision, optimizer, after, name != 'gdrq-torch-code')
