"""Which parts of a model are exported, one graph each, and how a runtime replaces them when the model predicts.

A classifier, a segmentor and a one-stage detector are one graph from the image to the raw outputs of the head. A
two-stage detector is one graph from the image to the outputs of the RPN, one for the box head, and one for the mask
head if there is one; of a cascade, one for the head of each stage. A semantic head, as HTC's, is in the graph of the
RPN. DETR is one graph to the features, one for the encoder, one for the decoder, and one for the head. Decoding, NMS
and RoIAlign stay in torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..deploy.flat import Flat

Run = Callable[..., Sequence[Tensor]]


HEADS = dict(cls=('head',), det=('bbox_head', 'mask_head'), seg=('decode_head',))
"""Task -> names of heads; of these a model of one part has one, or a cascade of it."""


@dataclass
class Part:
    """A part of a model that is exported as one graph."""

    name: str
    module: Flat
    feed: str
    """Name of the module that the graph's inputs are passed to."""
    takes: Callable[..., tuple[Tensor, ...]]
    """Its arguments -> the inputs of the graph."""
    replace: Callable[[Any, Run], None]
    """Lets a runtime compute this part of a model."""
    any_size: bool
    """Whether pictures of different sizes come in; those of a classifier are all cropped to one size."""


def parts_of(model: Any, task: str) -> list[Part]:
    """The parts of a model for 'cls', 'det' or 'seg', in the order in which they run.

    Raises:
        UserError: models of this kind cannot be exported.
    """
    heads = [name for name in HEADS[task] if heads_of(model, name)]
    reason = _reason(model, task, heads)
    if reason:
        raise UserError(f'{type(model).__name__} cannot be exported: {reason}')
    if hasattr(model, 'roi_head'):
        return _two_stage(model)
    if task == 'det' and hasattr(model, 'encoder'):
        return _transformer(model)
    return [_whole(model, heads[0], any_size=task != 'cls')]


def heads_of(owner: Any, name: str) -> dict[str, Any]:
    """Name -> head: one, those of a cascade in their order, or none."""
    head = getattr(owner, name, None)
    if isinstance(head, nn.ModuleList):
        return {f'{name}.{stage}': each for stage, each in enumerate(head)}
    return {} if head is None else {name: head}


def _reason(model: Any, task: str, heads: list[str]) -> str:
    """Why a model is not one of those that are exported; '' if it is."""
    if task == 'cls' and not (heads and hasattr(model, 'extract_feat')):
        return 'a classifier with extract_feat and a head is expected'
    if hasattr(model, 'roi_head'):
        if not hasattr(model, 'rpn_head'):
            return 'it has no rpn_head: its proposals come from elsewhere'
        boxes, masks = (heads_of(model.roi_head, kind).values() for kind in ('bbox_head', 'mask_head'))
        return _reads_more(model.rpn_head, *boxes, *masks) if boxes else 'it has no box head'
    if not heads:
        return f'it has no {HEADS[task][0]}'
    if task == 'det' and hasattr(model, 'encoder') and not _is_detr(model):
        return 'it runs its encoder and decoder in a way of its own; of transformers with both DETR alone is exported'
    if len(heads) > 1:
        return f'its {heads[1]} reads what its {heads[0]} has found, which is not exported'
    first, *others = heads_of(model, heads[0]).values()
    for later in others:
        if not _has_from('BaseCascadeDecodeHead', later, 'predict'):
            return f'{type(later).__name__}, a later head of its cascade, predicts in a way of its own'
    return _reads_more(first)


def _reads_more(*heads: Any) -> str:
    """Says which head needs other inputs than features, as those of queries do; '' if none does."""
    for head in heads:
        forward = type(head).forward
        given = inspect.signature(forward).parameters.values()
        needed = [each for each in given if each.kind == each.POSITIONAL_OR_KEYWORD and each.default is each.empty]
        if len(needed) > len(('self', 'features')) or forward is nn.Module.forward:
            return f'{type(head).__name__} does not read features alone'
    return ''


def _is_detr(model: Any) -> bool:
    """Whether a model runs encoder, decoder and head as DETR does; many that have them do not."""
    own = _has_from('DETR', model, 'pre_transformer', 'forward_encoder', 'pre_decoder', 'forward_decoder')
    same = _has_from('DetectionTransformer', model, 'predict', 'forward_transformer')
    return own and same and _has_from('DETRHead', model.bbox_head, 'predict', 'forward')


def _has_from(base: str, thing: Any, *names: str) -> bool:
    """Whether an object has these methods from a class of this name, whose library need not be imported for that."""
    found = (getattr(type(thing), name, None) for name in names)
    return all(getattr(method, '__qualname__', '').startswith(f'{base}.') for method in found)


def _first(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The first argument is the only input."""
    return (x,)


def _whole(model: Any, name: str, any_size: bool) -> Part:
    """From the image to the outputs of the head `name`, of the last one of a cascade."""

    def run(model: Any, x: Tensor) -> Any:
        features = model.extract_feat(x)
        first, *others = heads_of(model, name).values()
        out = first(features)
        for head in others:
            out = head(features, out)
        return out

    def replace(model: Any, run: Run) -> None:
        # The graph computes the heads too: extract_feat returns its outputs, and the heads pass them on to decoding.
        model.extract_feat = lambda x, *args, **kwargs: run(x)
        for head in heads_of(model, name).values():
            head.forward = lambda outputs, *args, **kwargs: outputs

    return Part('model', Flat(model, run), 'backbone', _first, replace, any_size)


def _inner(
    model: Any,
    name: str,
    path: str,
    run: Callable[..., Any] | None = None,
    takes: Callable[..., tuple[Tensor, ...]] = _first,
    gives: Callable[[Any], Any] = lambda outputs: outputs,
    any_size: bool = False,
) -> Part:
    """A module of the model.

    Args:
        run: (model, inputs of the graph) -> outputs of the graph; by default the module.
        gives: outputs of the graph -> what the module returns.
    """

    def replace(model: Any, run: Run) -> None:
        model.get_submodule(path).forward = lambda *args, **kwargs: gives(run(*takes(*args, **kwargs)))

    flat = Flat(model, run or (lambda model, *inputs: model.get_submodule(path)(*inputs)))
    return Part(name, flat, path, takes, replace, any_size)


def _two_stage(model: Any) -> list[Part]:
    """Proposals and heads; HTC's semantic head stands beside the RPN, and its mask heads read the one before."""
    semantic = bool(heads_of(model.roi_head, 'semantic_head'))

    def proposals(model: Any, x: Tensor) -> Any:
        features = model.extract_feat(x)
        found = features, model.rpn_head(features)
        return (*found, model.roi_head.semantic_head(features)) if semantic else found

    def replace(model: Any, run: Run) -> None:
        kept: list[Any] = []

        def extract(x: Tensor) -> Any:
            features, kept[:] = (outputs := run(x))[0], outputs[1:]
            return features

        model.extract_feat = extract
        model.rpn_head.forward = lambda features: kept[0]
        if semantic:
            model.roi_head.semantic_head.forward = lambda features: kept[1]

    def given(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(each for each in inputs if each is not None)

    heads = [name for kind in ('bbox_head', 'mask_head') for name in heads_of(model.roi_head, kind)]
    return [
        Part('proposals', Flat(model, proposals), 'backbone', _first, replace, True),
        *(_inner(model, name, f'roi_head.{name}', takes=given) for name in heads),
    ]


def _transformer(model: Any) -> list[Part]:
    """Features, encoder, decoder and head of DETR. What tells positions, and which are padding, is made in torch."""

    def replace(model: Any, run: Run) -> None:
        model.extract_feat = lambda x: run(x)

    def encode(model: Any, features: Tensor, positions: Tensor, mask: Tensor) -> Any:
        return model.forward_encoder(feat=features, feat_mask=mask, feat_pos=positions)['memory']

    def decode(model: Any, memory: Tensor, positions: Tensor, mask: Tensor) -> Any:
        queries, _ = model.pre_decoder(memory)
        return model.forward_decoder(**queries, memory_mask=mask, memory_pos=positions)['hidden_states'][-1]

    def predict(model: Any, states: Tensor) -> Any:
        return [each[0] for each in model.bbox_head(states[None])]

    def of_encoder(query: Tensor, query_pos: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, ...]:
        return query, query_pos, _added(key_padding_mask, query)

    def of_decoder(key: Tensor, key_pos: Tensor, key_padding_mask: Tensor | None, **_: Any) -> tuple[Tensor, ...]:
        return key, key_pos, _added(key_padding_mask, key)

    return [
        Part('features', Flat(model, lambda model, x: model.extract_feat(x)), 'backbone', _first, replace, True),
        _inner(model, 'encoder', 'encoder', encode, of_encoder, any_size=True),
        # The states of the last layer of the decoder alone are read, and layers come in front of the batch.
        _inner(model, 'decoder', 'decoder', decode, of_decoder, lambda states: states[None], any_size=True),
        _inner(
            model,
            'bbox_head',
            'bbox_head',
            predict,
            lambda states: (states[-1],),
            lambda outputs: [each[None] for each in outputs],
        ),
    ]


def _added(mask: Tensor | None, x: Tensor) -> Tensor:
    """What a mask of (N, L), True where x of (N, L, C) is padding, adds to the products of attention."""
    zeros = x.new_zeros(x.shape[:2])
    return zeros if mask is None else zeros.masked_fill(mask, -torch.inf)
