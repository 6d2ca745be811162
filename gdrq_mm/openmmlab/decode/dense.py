"""The raw outputs of dense heads as detections: heads that decode as mmdet's BaseDenseHead does, YOLOX and YOLOv3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.dense_heads import RPNHead, YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor

from ...deploy.flat import nest
from .boxes import (
    DROPPED,
    BoxDecoder,
    NotCovered,
    Suppression,
    best,
    check_smallest,
    detections,
    filtered,
    keeps_methods,
    name_of,
    pick,
)
from .ops import cut

DECODES = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
"""Methods of a dense head that make detections of its outputs."""


def rows(x: Tensor, length: int) -> Tensor:
    """(N, A * length, H, W) as (N, H * W * A, length)."""
    n, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, height * width * (channels // length), length)


def grid(head: Any, levels: list[Tensor], **options: Any) -> list[Tensor]:
    """Priors of each level."""
    priors = head.prior_generator.grid_priors([x.shape[-2:] for x in levels], device='cpu', **options)
    if not isinstance(priors[0], Tensor):
        raise NotCovered(f'its priors are {name_of(priors[0])}')
    return priors


class Candidates(nn.Module):
    """Of each level the best `nms_pre` boxes, as BaseDenseHead and RPNHead choose them.

    Raises:
        NotCovered: the head has other scores or another box coder.
    """

    def __init__(self, head: Any, cfg: Any) -> None:
        super().__init__()
        loss = getattr(head, 'loss_cls', None)  # SSDHead has none
        if getattr(loss, 'custom_cls_channels', False):
            raise NotCovered(f'its scores are those of {name_of(loss)}')
        self.head, self.cfg, self.decode = head, cfg, BoxDecoder(head.bbox_coder)
        self.classes = head.cls_out_channels - (not head.use_sigmoid_cls)

    def forward(
        self, size: tuple[int, int], scores: list[Tensor], boxes: list[Tensor], factors: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From the outputs of the head, (N, channels, H, W) for each level.

        Args:
            size: (height, width) of the pictures.

        Returns:
            Boxes (N, K, 4), their scores, labels and levels (N, K); a score is not above 0 where there is no box.
        """
        found = []
        for level, priors in enumerate(grid(self.head, scores)):
            logits = rows(scores[level], self.head.cls_out_channels)
            values = logits.sigmoid() if self.head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
            values = torch.where(values > self.cfg.get('score_thr', 0), values, DROPPED)
            chosen, places = best(values.flatten(1), self.cfg.get('nms_pre', -1))
            places, labels = places // self.classes, places % self.classes
            if factors is not None:
                chosen = chosen * rows(factors[level], 1).sigmoid()[..., 0].gather(1, places)
            predicted = pick(rows(boxes[level], 4), places)
            decoded = self.decode(priors[places], predicted, size)
            found.append((decoded, chosen, labels, torch.full_like(labels, level)))
        decoded, chosen, labels, levels = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return decoded, filtered(chosen, decoded, self.cfg), labels, levels


class DenseDetections(nn.Module):
    """Detections of a head that decodes as BaseDenseHead does."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        check_smallest(head.test_cfg)
        self.candidates = Candidates(head, head.test_cfg)
        self.suppression = Suppression(head.test_cfg.get('nms'), self.candidates.classes)
        self.count = head.test_cfg.get('max_per_img', -1)

    def forward(self, size: tuple[int, int], *outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, scores, labels, _ = self.candidates(size, *outputs)
        return detections(boxes, self.suppression(boxes, scores, labels), labels, self.count)


class YOLOXDetections(nn.Module):
    """Detections of YOLOXHead: of each cell the best class, all that are left by non-maximum suppression."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        self.suppression = Suppression(head.test_cfg.get('nms'), head.num_classes)

    def forward(
        self, size: tuple[int, int], scores: list[Tensor], boxes: list[Tensor], objects: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        points, strides = torch.cat(grid(self.head, scores, with_stride=True)).split(2, -1)
        values, labels = torch.cat([rows(x, self.head.cls_out_channels) for x in scores], 1).sigmoid().max(-1)
        values = values * torch.cat([rows(x, 1) for x in objects], 1).sigmoid()[..., 0]
        values = torch.where(values >= self.head.test_cfg.score_thr, values, DROPPED)
        moves, scales = torch.cat([rows(x, 4) for x in boxes], 1).split(2, -1)
        centers, halves = moves * strides + points, scales.exp() * strides / 2
        found = torch.cat([centers - halves, centers + halves], -1)
        return detections(found, self.suppression(found, values, labels), labels, -1)


class YOLOv3Detections(nn.Module):
    """Detections of YOLOV3Head: scores are filtered, the best chosen, and then multiplied by the objectness."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        if name_of(head.bbox_coder) != 'YOLOBBoxCoder':
            raise NotCovered(f'its boxes are coded by {name_of(head.bbox_coder)}')
        check_smallest(head.test_cfg)
        self.head, self.cfg = head, head.test_cfg
        self.suppression = Suppression(head.test_cfg.get('nms'), head.num_classes)

    def forward(self, size: tuple[int, int], maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        cfg, classes = self.cfg, self.head.num_classes
        boxes, objects, scores = [], [], []
        for x, priors, stride in zip(maps, grid(self.head, maps), self.head.featmap_strides, strict=True):
            row = rows(x, self.head.num_attrib)
            centers = (priors[:, :2] + priors[:, 2:]) * 0.5 + (row[..., :2].sigmoid() - 0.5) * stride
            halves = (priors[:, 2:] - priors[:, :2]) * 0.5 * row[..., 2:4].exp()
            boxes.append(torch.cat([centers - halves, centers + halves], -1))
            objects.append(row[..., 4].sigmoid())
            scores.append(row[..., 5:].sigmoid())
        found, there, values = torch.cat(boxes, 1), torch.cat(objects, 1), torch.cat(scores, 1)
        wanted = values > cfg.get('score_thr', 0)
        if cfg.get('conf_thr', -1) > 0:
            wanted = wanted & (there >= cfg.conf_thr)[..., None]
        chosen, places = best(torch.where(wanted, values, DROPPED).flatten(1), cfg.get('nms_pre', -1))
        places, labels = places // classes, places % classes
        found, chosen = pick(found, places), chosen * there.gather(1, places)
        chosen = filtered(chosen, found, cfg)
        return detections(found, self.suppression(found, chosen, labels), labels, cfg.get('max_per_img', -1))


def detections_of(head: Any) -> nn.Module:
    """The module (size, *outputs as the head nests them) -> dets, labels, for a dense head.

    Raises:
        NotCovered: the head decodes in another way.
    """
    kinds: dict[type, Callable[[Any], nn.Module]] = {
        YOLOXHead: YOLOXDetections,
        YOLOV3Head: YOLOv3Detections,
        BaseDenseHead: DenseDetections,
    }
    for base, make in kinds.items():
        if keeps_methods(head, base, *DECODES) and not isinstance(head, RPNHead):
            return make(head)
    raise NotCovered(f'{name_of(head)} decodes its outputs in a way of its own')


class Detect(nn.Module):
    """The last step of a one-stage detector: (picture, *raw outputs) -> dets, labels.

    Args:
        structure: how the outputs nest, see gdrq_mm.deploy.flat.nest.
    """

    def __init__(self, head: Any, structure: Any) -> None:
        super().__init__()
        self.detections, self.structure = detections_of(head), structure

    def forward(self, image: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        dets, labels = self.detections(tuple(image.shape[1:3]), *nest(self.structure, outputs))
        return cut(dets, dets[..., 4]), cut(labels, dets[..., 4])
