"""Registers quantized layers: for the layer classes of mmcv, and by name for model configs."""

from __future__ import annotations

import math

import torch.nn as nn
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from mmengine.registry import MODELS
from torch import Tensor

from ..core.layers import QUANTIZED, QuantConv2d, QuantConvTranspose2d, QuantLayer, QuantLinear


class QuantConv2dAdaptivePadding(QuantLayer, nn.Conv2d):
    """mmcv's convolution whose output is ceil(size / stride) pixels, as TensorFlow pads (EfficientNet)."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        pads: list[int] = []  # left, right, top, bottom
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (math.ceil(size / stride) - 1) * stride + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max(reach - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return self._conv_forward(nn.functional.pad(x, pads), weight, bias)


# mmcv's wrappers differ from torch's layers only for very old torch.
QUANTIZED.update(
    {
        wrappers.Conv2d: QuantConv2d,
        Conv2dAdaptivePadding: QuantConv2dAdaptivePadding,
        wrappers.ConvTranspose2d: QuantConvTranspose2d,
        wrappers.Linear: QuantLinear,
    }
)
MODELS.register_module(name='GDRQConv2d', module=QuantConv2d)
MODELS.register_module(name='GDRQConvTranspose2d', module=QuantConvTranspose2d)
MODELS.register_module(name='GDRQLinear', module=QuantLinear)
