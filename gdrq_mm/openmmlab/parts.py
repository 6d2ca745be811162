"""Which parts of a model are exported, one graph each, and how a runtime replaces them when the model predicts.

A classifier, a segmentor and a one-stage detector are one graph from the image to the raw outputs of the head. A
two-stage detector is one graph from the image to the outputs of the RPN, one for the box head, and one for the mask
head if there is one. Decoding, NMS and RoIAlign stay in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..deploy.flat import Flat

Run = Callable[..., Sequence[Tensor]]


@dataclass
class Part:
    """A part of a model that is exported as one graph."""

    name: str
    module: Flat
    feed: Callable[[Any], Any]
    """model -> the module that the graph's input is passed to; None: the input is the image."""
    replace: Callable[[Any, Run], None]
    """Lets a runtime compute this part of a model."""
    any_size: bool
    """Whether pictures of different sizes come in; those of a classifier are all cropped to one size."""


def parts_of(model: Any, task: str) -> list[Part]:
    """The parts of a model for 'cls', 'det' or 'seg', in the order in which they run.

    Raises:
        UserError: models of this kind cannot be exported.
    """
    if task == 'cls' and hasattr(model, 'head') and hasattr(model, 'extract_feat'):
        return [_part('model', Flat(model, _class_scores), _replace_head(lambda m: m.head))]
    if task == 'seg' and not isinstance(getattr(model, 'decode_head', None), (nn.ModuleList, type(None))):
        return [_part('model', Flat(model, _logits), _replace_head(lambda m: m.decode_head), any_size=True)]
    if hasattr(model, 'roi_head') and hasattr(model, 'rpn_head'):
        return _two_stage(model)
    dense = getattr(model, 'bbox_head', None) is not None and getattr(model, 'mask_head', None) is None
    if task == 'det' and dense and not hasattr(model, 'encoder'):
        return [_part('model', Flat(model, _dense), _replace_head(lambda m: m.bbox_head), any_size=True)]
    raise UserError(f'{type(model).__name__} cannot be exported: {_reason(model, task)}')


def _reason(model: Any, task: str) -> str:
    """Why a model is not one of those that are exported."""
    if task == 'cls':
        return 'a classifier with extract_feat and a head is expected'
    if task == 'seg':
        cascade = getattr(model, 'decode_head', None)
        return 'it has no decode_head' if cascade is None else f'its decode_head is a cascade of {len(cascade)} heads'
    if hasattr(model, 'encoder'):
        return 'its encoder and decoder stand between the backbone and the head, and are not exported'
    if hasattr(model, 'roi_head'):
        return 'it has no rpn_head: its proposals come from elsewhere'
    if getattr(model, 'mask_head', None) is not None:
        return 'its mask_head makes masks without regions, which is not exported'
    return 'it has no bbox_head'


def _class_scores(model: Any, x: Tensor) -> Any:
    return model.head(model.extract_feat(x))


def _logits(model: Any, x: Tensor) -> Any:
    return model.decode_head(model.extract_feat(x))


def _dense(model: Any, x: Tensor) -> Any:
    return model.bbox_head(model.extract_feat(x))


def _proposals(model: Any, x: Tensor) -> Any:
    features = model.extract_feat(x)
    return features, model.rpn_head(features)


def _head(path: str) -> Callable[[Any, Tensor], Any]:
    """Runs a head of a two-stage detector, given its name in the model."""
    return lambda model, x: model.get_submodule(path)(x)


def _part(
    name: str,
    module: Flat,
    replace: Callable[[Any, Run], None],
    feed: str | None = None,
    any_size: bool = False,
) -> Part:
    return Part(name, module, lambda m: m.get_submodule(feed) if feed else None, replace, any_size)


def _replace_head(head_of: Callable[[Any], Any]) -> Callable[[Any, Run], None]:
    def replace(model: Any, run: Run) -> None:
        # The graph computes the head too: extract_feat returns its outputs, and the head passes them on to decoding.
        model.extract_feat = lambda x, *args, **kwargs: run(x)
        head_of(model).forward = lambda outputs, *args, **kwargs: outputs

    return replace


def _two_stage(model: Any) -> list[Part]:
    roi = model.roi_head
    if isinstance(getattr(roi, 'bbox_head', None), (nn.ModuleList, type(None))):
        raise UserError(f'{type(model).__name__} cannot be exported: its box head is a cascade or missing')

    def replace_dense(model: Any, run: Run) -> None:
        kept: list[Any] = []

        def extract(x: Tensor) -> Any:
            features, kept[:] = (outputs := run(x))[0], outputs[1:]
            return features

        model.extract_feat = extract
        model.rpn_head.forward = lambda features: kept[0]

    def replace_head(path: str) -> Callable[[Any, Run], None]:
        return lambda model, run: setattr(model.get_submodule(path), 'forward', lambda x: run(x))

    heads = [f'roi_head.{name}' for name in ('bbox_head', 'mask_head') if getattr(roi, name, None) is not None]
    return [
        _part('proposals', Flat(model, _proposals), replace_dense, any_size=True),
        *(_part(path.split('.')[1], Flat(model, _head(path)), replace_head(path), path) for path in heads),
    ]
