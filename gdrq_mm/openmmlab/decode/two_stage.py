"""What stands between the graphs of a two-stage detector: proposals, RoIAlign, detections and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import BBoxHead, CascadeRoIHead, FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from torch import Tensor

from ...deploy.flat import nest
from ..parts import heads_of
from .boxes import (
    DROPPED,
    BoxDecoder,
    NotCovered,
    Suppression,
    detections,
    keeps_methods,
    name_of,
    pick,
)
from .dense import DECODES, Candidates
from .ops import cut, pool_regions

SMALLEST = 1e-3
"""Side in pixels that a region is pooled with, at least: OpenVINO (2026.4) gives nan where it has no area (ours)."""

METHODS = ('predict', 'predict_bbox', '_bbox_forward', 'predict_mask', '_mask_forward')
ROI_HEADS: dict[type, Sequence[str]] = {StandardRoIHead: METHODS, CascadeRoIHead: (*METHODS, '_refine_roi')}
"""What runs the heads of regions -> its methods that are done here."""


class Pool(nn.Module):
    """RoIAlign as SingleRoIExtractor calls it: a region is pooled from the level of its size.

    Raises:
        NotCovered: the regions are pooled in another way.
    """

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        if not keeps_methods(extractor, SingleRoIExtractor, 'forward', 'map_roi_levels'):
            raise NotCovered(f'its regions are pooled by {name_of(extractor)}')
        self.layer, self.finest, self.strides = (
            extractor.roi_layers[0],
            extractor.finest_scale,
            list(extractor.featmap_strides),
        )
        size = self.layer.output_size
        if type(self.layer) is not RoIAlign or self.layer.pool_mode != 'avg' or size[0] != size[1]:
            raise NotCovered(f'its regions are pooled by {self.layer}')

    def forward(self, dets: Tensor, *levels_of: Tensor) -> Tensor:
        """What is in (N, M, 5) detections: (N * M, C, size, size), from the levels of the features of N pictures."""
        features = list(levels_of[: len(self.strides)])
        number, flat = dets.shape[1], dets[..., :4].reshape(-1, 4)
        pictures = torch.arange(dets.shape[0])[:, None].expand(-1, number).reshape(-1)
        scale = ((flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1])).sqrt()
        levels = (scale / self.finest + 1e-6).log2().floor().clamp(0, len(features) - 1).long()
        flat = torch.cat([flat[:, :2], torch.maximum(flat[:, 2:], flat[:, :2] + SMALLEST)], 1)
        size, ratio, aligned = self.layer.output_size[0], self.layer.sampling_ratio, self.layer.aligned
        return pool_regions(features, flat, pictures, levels, self.strides, size, ratio, aligned)


class Propose(nn.Module):
    """(picture, *features and outputs of the RPN) -> regions as detections, and the levels that they are from."""

    def __init__(self, model: Any, structure: Any) -> None:
        super().__init__()
        rpn, roi = model.rpn_head, model.roi_head
        if not keeps_methods(rpn, RPNHead, *DECODES):
            raise NotCovered(f'{name_of(rpn)} decodes its outputs in a way of its own')
        known = any(keeps_methods(roi, base, *methods) for base, methods in ROI_HEADS.items())
        if not known or roi.with_shared_head:
            raise NotCovered(f'{name_of(roi)} predicts in a way of its own')
        self.candidates, self.structure = Candidates(rpn, {**rpn.test_cfg, 'score_thr': 0}), structure
        self.suppression = Suppression(rpn.test_cfg.get('nms'), rpn.prior_generator.num_levels)
        self.count = rpn.test_cfg.max_per_img

    def forward(self, image: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        _, (scores, boxes) = nest(self.structure, outputs)
        found, values, _, levels = self.candidates(tuple(image.shape[1:3]), scores, boxes)
        return detections(found, self.suppression(found, values, levels), levels, self.count)


class Regress(nn.Module):
    """(picture, regions, scores and deltas of a box head) -> the regions, moved by the deltas of their best class.

    Raises:
        NotCovered: the head decodes in another way.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        methods = ('predict_by_feat', '_predict_by_feat_single', 'regress_by_class')
        if not keeps_methods(head, BBoxHead, *methods) or not head.with_reg:
            raise NotCovered(f'{name_of(head)} decodes its outputs in a way of its own')
        if head.custom_cls_channels or head.custom_activation:
            raise NotCovered(f'its scores are those of {name_of(head.loss_cls)}')
        self.decoder, self.classes = BoxDecoder(head.bbox_coder), head.num_classes

    def decode(self, image: Tensor, regions: Tensor, deltas: Tensor) -> Tensor:
        """(N, M, 5) regions and (N * M, 4 * K) deltas to (N, M, K, 4) boxes, K = 1 without deltas for each class."""
        predicted = deltas.reshape(*regions.shape[:2], -1, 4)
        priors = regions[:, :, None, :4].expand(-1, -1, predicted.shape[2], -1)
        return self.decoder(priors, predicted, tuple(image.shape[1:3]))

    def forward(self, image: Tensor, regions: Tensor, scores: Tensor, deltas: Tensor) -> Tensor:
        """(N, M, 5), of which the last is what it was."""
        boxes = self.decode(image, regions, deltas)
        if boxes.shape[2] > 1:
            label = scores[:, :-1].argmax(1).reshape(*regions.shape[:2], 1, 1)
            boxes = boxes.gather(2, label.expand(-1, -1, 1, 4))
        return torch.cat([boxes[:, :, 0], regions[..., 4:]], -1)


class Classify(nn.Module):
    """(picture, regions, their box deltas, class scores of each stage) -> detections, as many for each picture."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        *_, head = heads_of(model.roi_head, 'bbox_head').values()
        cfg = model.roi_head.test_cfg
        self.regress, self.classes = Regress(head), head.num_classes
        self.threshold, self.count = cfg.score_thr, cfg.max_per_img
        self.suppression = Suppression(cfg.get('nms'), self.classes)

    def forward(self, image: Tensor, regions: Tensor, deltas: Tensor, *stages: Tensor) -> tuple[Tensor, Tensor]:
        n, number = regions.shape[:2]
        values = mean(stages).softmax(-1)[:, :-1].reshape(n, number, self.classes)
        values = torch.where((regions[..., 4:] > 0) & (values > self.threshold), values, DROPPED)
        boxes = self.regress.decode(image, regions, deltas).expand(-1, -1, self.classes, -1)
        values = self.suppression.of_classes(boxes, values).flatten(1)
        labels = torch.arange(self.classes).expand(n, number, -1).flatten(1)
        return detections(boxes.flatten(1, 2), values, labels, self.count)


def mean(stages: Sequence[Tensor]) -> Tensor:
    """The mean of what each stage of a cascade makes; of one stage, what it makes."""
    return sum(stages[1:], stages[0]) / len(stages) if len(stages) > 1 else stages[0]


class Cut(nn.Module):
    """(dets, labels, ...) without what no picture has."""

    def forward(self, dets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(cut(each, dets[..., 4]) for each in (dets, *others))


class Masks(nn.Module):
    """(labels, mask logits of all classes of each stage) -> (N, M, size, size): how sure it is of the label's class."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        *_, head = heads_of(model.roi_head, 'mask_head').values()
        if not keeps_methods(head, FCNMaskHead, 'predict_by_feat', '_predict_by_feat_single'):
            raise NotCovered(f'{name_of(head)} makes masks in a way of its own')
        self.agnostic = head.class_agnostic

    def forward(self, labels: Tensor, *stages: Tensor) -> Tensor:
        n, number = labels.shape
        size = stages[0].shape[2:]
        channel = torch.zeros_like(labels) if self.agnostic else labels.clamp(min=0)
        mine = [pick(each.flatten(2), channel.reshape(-1, 1)).reshape(n, number, *size).sigmoid() for each in stages]
        return torch.where(labels[..., None, None] >= 0, mean(mine), 0.0)
