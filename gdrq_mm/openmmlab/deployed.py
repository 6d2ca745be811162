"""What end2end.onnx is to a program, and a model whose predictions are its. Nothing here needs to export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from ..core.errors import UserError
from .parts import heads_of

TURNS = ('to_rgb', '_channel_conversion', 'channel_conversion')
"""Flags of data preprocessors that turn BGR into RGB: mmpretrain's, mmengine's, and that of OpenMMLab's own mmseg."""


@dataclass
class EndToEnd:
    """The whole graph and what a program needs to know of it."""

    graph: onnx.ModelProto
    size: list[int]
    """Height and width of the pictures."""
    any_size: bool
    """Whether others will do; then `size` is that of the picture that was given."""
    channels: str
    """'RGB' or 'BGR'."""
    outputs: list[str]


def takes_rgb(model: Any) -> bool:
    """Whether the network of a model reads RGB."""
    return any(getattr(model.data_preprocessor, name, False) for name in TURNS)


def to_graph(model: Any, pixels: Tensor) -> Tensor:
    """A picture (C, H, W) of the test pipeline as (H, W, C), channels as the network wants them."""
    return (pixels.flip(0) if takes_rgb(model) else pixels).permute(1, 2, 0)


def let_graph_predict(model: Any, about: dict[str, Any], runtime: Callable[[Sequence[np.ndarray]], Any]) -> None:
    """Replace test_step of a model: a runtime predicts, and the results become data samples of the library.

    Args:
        about: the content of export.json.
        runtime: runs end2end.onnx.
    """
    whole, put = about['end2end'], dict(cls=_put_class, det=_put_boxes, seg=_put_labels)[about['task']]

    def run(pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        image = np.stack([to_graph(model, each).numpy() for each in pictures])
        check_pictures(image, whole)
        outputs = [torch.from_numpy(y) for y in runtime([image])]
        return [dict(zip(whole['outputs'], values, strict=True)) for values in zip(*outputs, strict=True)]

    def test_step(data: Any) -> Any:
        pictures = list(data['inputs'])
        samples = model.data_preprocessor(data, False)['data_samples']
        alike = len({each.shape for each in pictures}) == 1
        found = run(pictures) if alike else [run([each])[0] for each in pictures]
        for sample, values in zip(samples, found, strict=True):
            put(model, sample, values)
        return samples

    model.test_step = test_step


def check_pictures(image: np.ndarray, whole: dict[str, Any]) -> None:
    """Refuse pictures that end2end.onnx does not take.

    Args:
        image: a batch of them.
        whole: the entry of export.json.

    Raises:
        UserError: says what it takes and what came.
    """
    if image.dtype != np.uint8:
        raise UserError(f'end2end.onnx takes uint8 pictures, these are {image.dtype}; --parts tests without it')
    if not len(image):
        raise UserError('end2end.onnx was given a batch of 0 pictures')
    if image.ndim != 4 or image.shape[3] != 3:
        raise UserError(f'end2end.onnx takes pictures of shape (N, H, W, 3), these have {image.shape}')
    size = list(image.shape[1:3])
    if not whole['any_size'] and size != whole['size']:
        expected, found = (' x '.join(map(str, each)) for each in (whole['size'], size))
        raise UserError(f'end2end.onnx takes pictures of {expected}, this one is {found} (height x width)')


def _put_class(model: Any, sample: Any, values: dict[str, Tensor]) -> None:
    sample.set_pred_score(values['scores']).set_pred_label(values['topk_labels'][:1])


def _put_labels(model: Any, sample: Any, values: dict[str, Tensor]) -> None:
    labels = values['labels'][None]
    if labels.shape[1:] != sample.ori_shape:
        labels = F.interpolate(labels[None].float(), sample.ori_shape, mode='nearest-exact')[0].long()
    sample.set_data(dict(pred_sem_seg=PixelData(data=labels)))


def _put_boxes(model: Any, sample: Any, values: dict[str, Tensor]) -> None:
    there = values['labels'] >= 0
    dets, labels = values['dets'][there], values['labels'][there]
    found = InstanceData(bboxes=dets[:, :4], scores=dets[:, 4], labels=labels)
    if 'masks' in values:
        # The last mask head pastes masks into pictures, and moves the boxes to the original size.
        *_, head = heads_of(model.roi_head, 'mask_head').values()
        logits = (
            values['masks'][there].logit()[:, None].expand(-1, 1 if head.class_agnostic else head.num_classes, -1, -1)
        )
        options = dict(rcnn_test_cfg=model.roi_head.test_cfg, rescale=True)
        (found,) = head.predict_by_feat((logits,), [found], [sample.metainfo], **options)
    else:
        found.bboxes = found.bboxes / found.bboxes.new_tensor(sample.get('scale_factor', (1.0, 1.0))).repeat(2)
    sample.pred_instances = found
