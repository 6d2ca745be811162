"""Three operators that torch traces as one step each: what they do inside has shapes that depend on the values.

In torch two of them run mmcv's functions, in ONNX the standard operators NonMaxSuppression and RoiAlign.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from mmcv.ops import nms, roi_align
from onnxscript import opset21
from torch import Tensor

from ...core.compat import check_export

check_export()  # torch.library.custom_op is of 2.4
op: Any = opset21
_ALL = 2**62
"""More boxes than there are."""


@torch.library.custom_op('gdrq_mm::suppress', mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression in each class of each picture.

    Args:
        boxes: (N, K, 4) as x1, y1, x2, y2.
        scores: (N, C, K); boxes whose score is not above 0 do not take part.

    Returns:
        The scores, 0 where a box was suppressed or did not take part.
    """
    kept = torch.zeros_like(scores)
    for picture in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            (candidates,) = torch.where(scores[picture, label] > 0)
            if len(candidates):
                mine = scores[picture, label, candidates]
                chosen = candidates[nms(boxes[picture, candidates], mine, iou_threshold)[1]]
                kept[picture, label, chosen] = scores[picture, label, chosen]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _onnx_suppress(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    limits = [op.Constant(value_int=_ALL), op.Constant(value_float=iou_threshold), op.Constant(value_float=0.0)]
    chosen = op.NonMaxSuppression(boxes, scores, *limits)
    nothing = op.Mul(scores, op.Constant(value_float=0.0))
    return op.ScatterND(nothing, chosen, op.GatherND(scores, chosen))


@torch.library.custom_op('gdrq_mm::pool_regions', mutates_args=())
def pool_regions(
    features: list[Tensor],
    regions: Tensor,
    pictures: Tensor,
    levels: Tensor,
    strides: list[int],
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign, each region from one level of a pyramid.

    Args:
        features: (N, C, H, W) of each level.
        regions: (M, 4) as x1, y1, x2, y2 in pixels of the picture.
        pictures, levels: (M,) whole numbers, where to find a region.
        strides: pixels of the picture for each cell of a level.

    Returns:
        (M, C, size, size).
    """
    pooled = features[0].new_zeros(len(regions), features[0].shape[1], size, size)
    rois = torch.cat([pictures[:, None].to(regions), regions], 1)
    for level, (x, stride) in enumerate(zip(features, strides, strict=True)):
        (mine,) = torch.where(levels == level)
        if len(mine):
            x = x.contiguous()  # mmcv's operator reads the memory as if it were
            pooled[mine] = roi_align(x, rois[mine], (size, size), 1 / stride, sampling_ratio, 'avg', aligned)
    return pooled


@pool_regions.register_fake
def _(
    features: list[Tensor], regions: Tensor, pictures: Tensor, levels: Tensor, strides: Any, size: int, *_: Any
) -> Tensor:
    return features[0].new_empty(regions.shape[0], features[0].shape[1], size, size)


def _onnx_pool_regions(
    features: Any, regions: Any, pictures: Any, levels: Any, strides: Any, size: int, sampling_ratio: int, aligned: bool
) -> Any:
    """The regions of each level, pooled, one level after the other, then back in their order."""
    mode = 'half_pixel' if aligned else 'output_half_pixel'
    last = op.Constant(value_ints=[-1])
    orders, pooled = [], []
    for level, (x, stride) in enumerate(zip(features, strides, strict=True)):
        mine = op.Reshape(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), last)
        found = op.RoiAlign(
            x,
            op.Gather(regions, mine),
            op.Gather(pictures, mine),
            coordinate_transformation_mode=mode,
            mode='avg',
            output_height=size,
            output_width=size,
            sampling_ratio=sampling_ratio,
            spatial_scale=1 / stride,
        )
        orders.append(mine)
        pooled.append(found)
    order = op.Unsqueeze(op.Concat(*orders, axis=0), op.Constant(value_ints=[1]))
    values = op.Concat(*pooled, axis=0)
    return op.ScatterND(op.Mul(values, op.Constant(value_float=0.0)), order, values)


@torch.library.custom_op('gdrq_mm::cut', mutates_args=())
def cut(values: Tensor, scores: Tensor) -> Tensor:
    """(N, K, ...) values without what is behind the last score (N, K) above 0 of any picture: (N, M, ...).

    Scores are in order, so M is the number of boxes of the picture that has most of them.
    """
    return values[:, : int((scores > 0).sum(1).max())].clone()


@cut.register_fake
def _(values: Tensor, scores: Tensor) -> Tensor:
    number = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty(values.shape[0], number, *values.shape[2:])


def _onnx_cut(values: Any, scores: Any) -> Any:
    first, second = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    there = op.Cast(op.Greater(scores, op.Constant(value_float=0.0)), to=onnx.TensorProto.INT64)
    most = op.ReduceMax(op.ReduceSum(there, second, keepdims=0))
    return op.Slice(values, first, op.Reshape(most, second), second)


TRANSLATIONS = {
    torch.ops.gdrq_mm.cut.default: _onnx_cut,
    torch.ops.gdrq_mm.suppress.default: _onnx_suppress,
    torch.ops.gdrq_mm.pool_regions.default: _onnx_pool_regions,
}
"""What :func:`gdrq_mm.deploy.chain.export_step` needs to know of them."""
