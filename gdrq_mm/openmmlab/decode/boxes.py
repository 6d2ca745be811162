"""Boxes from what a head predicts, the best of them, and non-maximum suppression, for batches.

Where OpenMMLab drops a box, it stays here with a score that is not above 0: so all shapes are known beforehand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from .ops import suppress

DROPPED = -1.0
"""Score of a box that is none."""


class NotCovered(ValueError):
    """There is no decoding in ONNX for this model; the message says why, in one line."""


def keeps_methods(thing: Any, base: type, *names: str) -> bool:
    """Whether an object has these methods from `base`: what a subclass writes anew is not what is exported."""
    return isinstance(thing, base) and all(getattr(type(thing), name) is getattr(base, name) for name in names)


def name_of(thing: Any) -> str:
    """The class of an object, for a message."""
    return type(thing).__name__


class BoxDecoder(nn.Module):
    """Boxes from priors and predictions, as a box coder of mmdet decodes them.

    Raises:
        NotCovered: another coder than DeltaXYWHBBoxCoder and DistancePointBBoxCoder.
    """

    means: Tensor
    stds: Tensor

    def __init__(self, coder: Any) -> None:
        super().__init__()
        if name_of(coder) not in ('DeltaXYWHBBoxCoder', 'DistancePointBBoxCoder'):
            raise NotCovered(f'its boxes are coded by {name_of(coder)}')
        self.coder = coder
        self.deltas = name_of(coder) == 'DeltaXYWHBBoxCoder'
        if self.deltas:
            self.register_buffer('means', torch.tensor(coder.means, dtype=torch.float32))
            self.register_buffer('stds', torch.tensor(coder.stds, dtype=torch.float32))

    def forward(self, priors: Tensor, predicted: Tensor, size: tuple[int, int]) -> Tensor:
        """(..., K, 4) predictions for (..., K, 4) boxes or (..., K, 2) points, clipped to a picture of (height, width).

        Returns:
            (..., K, 4) as x1, y1, x2, y2.
        """
        if self.deltas:
            low, high = self._from_deltas(priors, predicted)
        else:
            low, high = priors - predicted[..., :2], priors + predicted[..., 2:]
        boxes = torch.cat([low, high], -1)
        return clip(boxes, size) if self.coder.clip_border else boxes

    def _from_deltas(self, priors: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        coder, ratio = self.coder, abs(float(np.log(16 / 1000)))  # the default of mmdet's decode()
        moves, scales = (predicted * self.stds + self.means).split(2, -1)
        sizes = priors[..., 2:] - priors[..., :2]
        moves = sizes * moves
        if coder.add_ctr_clamp:
            moves, scales = moves.clamp(-coder.ctr_clamp, coder.ctr_clamp), scales.clamp(max=ratio)
        else:
            scales = scales.clamp(-ratio, ratio)
        centers = (priors[..., :2] + priors[..., 2:]) * 0.5 + moves
        halves = sizes * scales.exp() * 0.5
        return centers - halves, centers + halves


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) clipped to a picture of (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of (N, K) scores, in order, and where they are: (N, count), or (N, K) with count <= 0.

    Where K is smaller than count, the rest is DROPPED.
    """
    if count <= 0:
        return scores.sort(1, descending=True)
    number = scores.shape[1]
    padded = nn.functional.pad(scores, (0, count), value=DROPPED)
    values, places = padded.topk(count, 1)
    return values, places.clamp(max=number - 1)


def pick(values: Tensor, places: Tensor) -> Tensor:
    """(N, K, D) values at (N, M) places: (N, M, D)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def check_smallest(cfg: Any) -> None:
    """Refuse a `min_bbox_size` of final boxes: mmdet takes it in pixels of the original picture.

    Raises:
        NotCovered: it is above 0.
    """
    if cfg.get('min_bbox_size', -1) > 0:
        raise NotCovered('its test_cfg has min_bbox_size, in pixels of a picture that the graph does not see')


def filtered(scores: Tensor, boxes: Tensor, cfg: Any) -> Tensor:
    """(N, K) scores; those of boxes that are not larger than `min_bbox_size` are DROPPED."""
    smallest = cfg.get('min_bbox_size', -1)
    if smallest < 0:
        return scores
    large = ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1)
    return torch.where(large, scores, DROPPED)


class Suppression(nn.Module):
    """mmcv's batched_nms() for a batch of pictures.

    Args:
        cfg: the `nms` of a test_cfg.

    Raises:
        NotCovered: another kind than 'nms', or options that it does not have in ONNX.
    """

    def __init__(self, cfg: Any, classes: int) -> None:
        super().__init__()
        options = dict(cfg or {})
        kind = options.pop('type', 'nms')
        if not cfg or kind != 'nms':
            raise NotCovered(f'its test_cfg has nms={kind if cfg else None}')
        self.threshold = float(options.pop('iou_threshold', options.pop('iou_thr', 0)))
        self.classes = 1 if options.pop('class_agnostic', False) else classes
        options.pop('split_thr', None)  # how mmcv computes it for many boxes
        if options.pop('offset', 0) or options:
            raise NotCovered(f'its nms has {", ".join(dict(cfg))}')

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Scores (N, K) of boxes (N, K, 4) with labels (N, K); not above 0 where a box is suppressed."""
        if self.classes == 1:
            return suppress(boxes, scores[:, None], self.threshold)[:, 0]
        mine = labels[:, None] == torch.arange(self.classes)[:, None]
        return suppress(boxes, torch.where(mine, scores[:, None], DROPPED), self.threshold).amax(1)

    def of_classes(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Scores (N, K, C) where each of K has a box (N, K, C, 4) for each class; as in `forward`."""
        n, number, classes = scores.shape
        if self.classes == 1:
            return suppress(boxes.flatten(1, 2), scores.flatten(1)[:, None], self.threshold).reshape(n, number, classes)
        mine = boxes.transpose(1, 2).reshape(n * classes, number, 4)
        values = scores.transpose(1, 2).reshape(n * classes, 1, number)
        return suppress(mine, values, self.threshold).reshape(n, classes, number).transpose(1, 2)


def detections(boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of (N, K) boxes.

    Args:
        count: as for :func:`best`.

    Returns:
        (N, M, 5) as x1, y1, x2, y2, score, and (N, M) labels. What is no box has zeros and the label -1.
    """
    scores, places = best(scores, count)
    there = scores > 0
    dets = torch.cat([pick(boxes, places), scores[..., None]], -1)
    return torch.where(there[..., None], dets, 0.0), torch.where(there, labels.gather(1, places), -1)
