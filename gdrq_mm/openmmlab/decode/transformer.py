"""What stands between the graphs of DETR and behind them: positions of its features, and detections of its queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from mmdet.models.dense_heads import DETRHead
from mmdet.models.layers import SinePositionalEncoding
from torch import Tensor

from .boxes import NotCovered, clip, detections, keeps_methods, name_of
from .ops import cut


class Positions(nn.Module):
    """Features, the last of them (N, C, H, W) -> as (N, H * W, C), their positional encoding, and a mask (N, H * W).

    Pictures of a batch have one size, so that no feature is padding and the mask adds 0 everywhere.

    Raises:
        NotCovered: pictures are padded, or positions are encoded in another way.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if type(model.positional_encoding) is not SinePositionalEncoding:
            raise NotCovered(f'its positions are encoded by {name_of(model.positional_encoding)}')
        if model.data_preprocessor.pad_size_divisor > 1:
            raise NotCovered(f'it pads pictures to multiples of {model.data_preprocessor.pad_size_divisor}')
        self.encoding = model.positional_encoding

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = features[-1]
        tokens, positions = (each.flatten(2).transpose(1, 2) for each in (x, self.encoding(None, input=x)))
        return tokens, positions, tokens.new_zeros(tokens.shape[:2])


class Queries(nn.Module):
    """(picture, class scores (N, Q, C), boxes (N, Q, 4) as center and size from 0 to 1) -> dets, labels."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        if not keeps_methods(head, DETRHead, 'predict', 'predict_by_feat', '_predict_by_feat_single'):
            raise NotCovered(f'{name_of(head)} decodes its outputs in a way of its own')
        self.sigmoid, self.classes = head.loss_cls.use_sigmoid, head.num_classes
        self.count = head.test_cfg.get('max_per_img', 0)

    def forward(self, image: Tensor, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[1:3]
        centers, sizes = boxes.split(2, -1)
        low, high = centers - 0.5 * sizes, centers + 0.5 * sizes
        sides = [low[..., 0] * width, low[..., 1] * height, high[..., 0] * width, high[..., 1] * height]
        found = clip(torch.stack(sides, -1), (height, width))
        if self.sigmoid:  # a query may have several classes
            values = scores.sigmoid().flatten(1)
            labels = torch.arange(self.classes).expand(*scores.shape[:2], -1).flatten(1)
            found = found[:, :, None].expand(-1, -1, self.classes, -1).flatten(1, 2)
        else:
            values, labels = scores.softmax(-1)[..., :-1].max(-1)
        dets, labels = detections(found, values, labels, self.count or scores.shape[1])
        return cut(dets, dets[..., 4]), cut(labels, dets[..., 4])
