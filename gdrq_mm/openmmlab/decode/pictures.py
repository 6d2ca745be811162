"""From pixels to what a network reads, and from its scores to what they mean, for classifiers and segmentors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.models import DetDataPreprocessor
from mmpretrain.models import ClsDataPreprocessor, ClsHead
from mmseg.models import SegDataPreProcessor
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor

from ..parts import heads_of
from .boxes import NotCovered, keeps_methods, name_of

BEST = 5
"""Classes that a classifier names for a picture, at most (ours)."""


class Prepare(nn.Module):
    """uint8 pictures (N, H, W, 3), channels as the network wants them -> float (N, 3, H', W'), normalized and padded.

    Args:
        size: height and width that the network takes; None: any.

    Raises:
        NotCovered: the data preprocessor is none of the three that are known.
    """

    table: Tensor
    """(3 * 256,): what a byte of each channel becomes. Looked up, it is the same to the last bit in any runtime; one
    that multiplies by 1 / std turns rounding ties of the first layer."""

    def __init__(self, preprocessor: Any, size: Sequence[int] | None) -> None:
        super().__init__()
        if type(preprocessor) not in (ClsDataPreprocessor, DetDataPreprocessor, SegDataPreProcessor):
            raise NotCovered(f'{name_of(preprocessor)} prepares its pictures in a way of its own')
        values = torch.arange(256.0).expand(3, 1, -1)
        if getattr(preprocessor, 'mean', None) is not None:
            values = (values - preprocessor.mean) / preprocessor.std
        self.register_buffer('table', values.flatten().detach().clone())
        self.size = size
        if isinstance(preprocessor, SegDataPreProcessor):
            options = preprocessor.test_cfg or {}
            self.divisor, self.value = options.get('size_divisor') or 1, preprocessor.pad_val
            if size is None and options.get('size') is not None:
                raise NotCovered(f'it pads pictures to at least {options["size"]}')
        else:
            self.divisor, self.value = preprocessor.pad_size_divisor, preprocessor.pad_value

    def forward(self, image: Tensor) -> Tensor:
        first = 256 * torch.arange(3, dtype=torch.int32)[:, None, None]
        places = image.permute(0, 3, 1, 2).int() + first
        x = self.table.index_select(0, places.flatten()).reshape(places.shape)
        height, width = x.shape[2:]
        if self.size == [height, width] or (self.size is None and self.divisor == 1):
            return x
        down, right = -height % self.divisor, -width % self.divisor
        if self.size is not None:
            down, right = self.size[0] - height, self.size[1] - width
        return F.pad(x, (0, right, 0, down), value=float(self.value))


class Scores(nn.Module):
    """(N, classes) class scores of a network -> their softmax, and the best of them with their labels."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        if not keeps_methods(head, ClsHead, 'predict', '_get_predictions'):
            raise NotCovered(f'{name_of(head)} predicts in a way of its own')

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.softmax(1)
        return scores, *scores.topk(min(BEST, logits.shape[1]), 1)


class LabelMap(nn.Module):
    """(picture, logits of a decode head, the last of a cascade) -> (N, H, W) labels at the picture's size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        *earlier, head = heads_of(model, 'decode_head').values()
        if not keeps_methods(model, EncoderDecoder, 'predict', 'inference', 'postprocess_result'):
            raise NotCovered(f'{name_of(model)} predicts in a way of its own')
        predicts = keeps_methods(head, BaseCascadeDecodeHead if earlier else BaseDecodeHead, 'predict')
        if not predicts or not keeps_methods(head, BaseDecodeHead, 'predict_by_feat'):
            raise NotCovered(f'{name_of(head)} predicts in a way of its own')
        if model.test_cfg.mode != 'whole':
            raise NotCovered(f'its test_cfg has mode={model.test_cfg.mode}')
        self.align, self.threshold = model.align_corners, head.threshold if head.out_channels == 1 else None

    def forward(self, image: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        height, width = image.shape[1:3]
        logits = F.interpolate(logits, x.shape[2:], mode='bilinear', align_corners=self.align)[..., :height, :width]
        if self.threshold is None:
            return logits.argmax(1)
        return (logits.sigmoid() > self.threshold)[:, 0].long()
