"""What stands between the graphs of a two-stage detector: proposals, RoIAlign, detections and masks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import BBoxHead, FCNMaskHead, SingleRoIExtractor, StandardRoIHead
from torch import Tensor

from ...deploy.flat import nest
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
        methods = ('predict', 'predict_bbox', '_bbox_forward', 'predict_mask', '_mask_forward')
        if not keeps_methods(roi, StandardRoIHead, *methods) or roi.with_shared_head:
            raise NotCovered(f'{name_of(roi)} predicts in a way of its own')
        self.candidates, self.structure = Candidates(rpn, {**rpn.test_cfg, 'score_thr': 0}), structure
        self.suppression = Suppression(rpn.test_cfg.get('nms'), rpn.prior_generator.num_levels)
        self.count = rpn.test_cfg.max_per_img

    def forward(self, image: Tensor, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        _, (scores, boxes) = nest(self.structure, outputs)
        found, values, _, levels = self.candidates(tuple(image.shape[1:3]), scores, boxes)
        return detections(found, self.suppression(found, values, levels), levels, self.count)


class Classify(nn.Module):
    """(picture, regions, class scores, box deltas) -> detections, as many for each picture."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head, cfg = model.roi_head.bbox_head, model.roi_head.test_cfg
        if not keeps_methods(head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single') or not head.with_reg:
            raise NotCovered(f'{name_of(head)} decodes its outputs in a way of its own')
        if head.custom_cls_channels:
            raise NotCovered(f'its scores are those of {name_of(head.loss_cls)}')
        self.decode, self.classes = BoxDecoder(head.bbox_coder), head.num_classes
        self.threshold, self.count = cfg.score_thr, cfg.max_per_img
        self.suppression = Suppression(cfg.get('nms'), self.classes)

    def forward(self, image: Tensor, regions: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        n, number = regions.shape[:2]
        values = scores.softmax(-1)[:, :-1].reshape(n, number, self.classes)
        values = torch.where((regions[..., 4:] > 0) & (values > self.threshold), values, DROPPED)
        predicted = deltas.reshape(n, number, -1, 4)
        priors = regions[:, :, None, :4].expand(-1, -1, predicted.shape[2], -1)
        boxes = self.decode(priors, predicted, tuple(image.shape[1:3])).expand(-1, -1, self.classes, -1)
        values = self.suppression.of_classes(boxes, values).flatten(1)
        labels = torch.arange(self.classes).expand(n, number, -1).flatten(1)
        return detections(boxes.flatten(1, 2), values, labels, self.count)


class Cut(nn.Module):
    """(dets, labels, ...) without what no picture has."""

    def forward(self, dets: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(cut(each, dets[..., 4]) for each in (dets, *others))


class Masks(nn.Module):
    """(labels, mask logits of all classes) -> (N, M, size, size): in the box, how sure the head is of its class."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.roi_head.mask_head
        if not keeps_methods(head, FCNMaskHead, 'predict_by_feat', '_predict_by_feat_single'):
            raise NotCovered(f'{name_of(head)} makes masks in a way of its own')
        self.agnostic = head.class_agnostic

    def forward(self, labels: Tensor, logits: Tensor) -> Tensor:
        n, number = labels.shape
        masks = logits.reshape(n * number, -1, logits.shape[2] * logits.shape[3])
        channel = torch.zeros_like(labels) if self.agnostic else labels.clamp(min=0)
        mine = pick(masks, channel.reshape(-1, 1))
        found = mine.reshape(n, number, logits.shape[2], logits.shape[3]).sigmoid()
        return torch.where(labels[..., None, None] >= 0, found, 0.0)
