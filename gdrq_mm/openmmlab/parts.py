"""Which parts of a model are exported, and how a runtime takes their place when the model predicts.

Classification, segmentation and one-stage detection are one graph from the image to the raw outputs of the head. A
two-stage detector is one up to the outputs of the RPN and one for the box head (and one for the mask head); decoding,
NMS and RoIAlign stay in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.pyramid import start_pyramid

Run = Callable[..., Sequence[Tensor]]


@dataclass
class Part:
    """One graph."""

    name: str
    module: _Traced
    """Takes a tensor; `forward` returns a flat tuple of tensors and keeps how they nest."""
    feed: Callable[[Any], Any]
    """model -> the module whose calls have the graph's inputs as arguments; None stands for the images."""
    replace: Callable[[Any, Run], None]
    """Puts a runtime in the place of the part in a model."""
    any_size: bool
    """Whether the inputs are pictures whose sizes may differ; those of a classifier are cropped."""


def parts_of(model: Any, task: str) -> list[Part]:
    """The parts of a model for 'cls', 'det' or 'seg', in the order in which they run.

    Raises:
        UserError: the model is of a kind that is not exported; says why.
    """
    kind = type(model).__name__
    if task == 'cls' and hasattr(model, 'head') and hasattr(model, 'extract_feat'):
        return [_part('model', _ClassScores(model), _replace_head(lambda m: m.head))]
    if task == 'seg' and not isinstance(getattr(model, 'decode_head', None), (nn.ModuleList, type(None))):
        return [_part('model', _Logits(model), _replace_head(lambda m: m.decode_head), any_size=True)]
    if hasattr(model, 'roi_head') and hasattr(model, 'rpn_head'):
        return _two_stage(model)
    dense = getattr(model, 'bbox_head', None) is not None and getattr(model, 'mask_head', None) is None
    if task == 'det' and dense and not hasattr(model, 'encoder'):
        return [_part('model', _Dense(model), _replace_head(lambda m: m.bbox_head), any_size=True)]
    raise UserError(f'{kind} cannot be exported: it is no classifier, no segmentor with one head, no detector with one')


class _Traced(nn.Module):
    """A part of a model with a tensor as input and tensors as outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.structure: Any = None
        """How the outputs of the last `forward` nest."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs of `raw`."""
        start_pyramid(self.model)  # whose own forward does not run
        flat: list[Tensor] = []
        self.structure = _flatten(self.raw(x), flat)
        return tuple(flat)

    def raw(self, x: Tensor) -> Any:
        """What the model computes, nested as it likes."""
        raise NotImplementedError


class _ClassScores(_Traced):
    def raw(self, x: Tensor) -> Any:
        return self.model.head(self.model.extract_feat(x))  # type: ignore[union-attr, operator]


class _Logits(_Traced):
    def raw(self, x: Tensor) -> Any:
        return self.model.decode_head(self.model.extract_feat(x))  # type: ignore[union-attr, operator]


class _Dense(_Traced):
    def raw(self, x: Tensor) -> Any:
        return self.model.bbox_head(self.model.extract_feat(x))  # type: ignore[union-attr, operator]


class _Proposals(_Traced):
    def raw(self, x: Tensor) -> Any:
        features = self.model.extract_feat(x)  # type: ignore[operator]
        return features, self.model.rpn_head(features)  # type: ignore[union-attr, operator]


class _Head(_Traced):
    """A head of a two-stage detector by its place below the model."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__(model)
        self.path = path

    def raw(self, x: Tensor) -> Any:
        return self.model.get_submodule(self.path)(x)


def _part(
    name: str,
    module: _Traced,
    replace: Callable[[Any, Run], None],
    feed: str | None = None,
    any_size: bool = False,
) -> Part:
    return Part(name, module, lambda m: m.get_submodule(feed) if feed else None, replace, any_size)


def _replace_head(head_of: Callable[[Any], Any]) -> Callable[[Any, Run], None]:
    def replace(model: Any, run: Run) -> None:
        # Feature extraction gives what the graph gives, and the head passes it on to its own decoding.
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
        _part('proposals', _Proposals(model), replace_dense, any_size=True),
        *(_part(path.split('.')[1], _Head(model, path), replace_head(path), path) for path in heads),
    ]


def _flatten(value: Any, flat: list[Tensor]) -> Any:
    """Append the tensors of a nested value to `flat`; returns the nest with their positions."""
    if isinstance(value, Tensor):
        flat.append(value)
        return len(flat) - 1
    if isinstance(value, (tuple, list)):
        return [_flatten(v, flat) for v in value]
    raise UserError(f'the model cannot be exported: its head returns {type(value).__name__}')


def check_nest(structure: Any) -> None:
    """Raise ValueError unless the structure is a nest of positions."""
    if isinstance(structure, list):
        for inner in structure:
            check_nest(inner)
    elif not isinstance(structure, int):
        raise ValueError(f'structure {structure!r}')


def nest(structure: Any, flat: Sequence[Tensor]) -> Any:
    """The inverse: tensors put back where their positions stand; a list becomes a tuple."""
    return flat[structure] if isinstance(structure, int) else tuple(nest(s, flat) for s in structure)
