"""Where values that are not finite come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..core.compat import total_norm
from ..core.modules import hooked


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors with values that are not finite; one norm over all of them if there are none."""
    named = {name: tensor.detach() for name, tensor in tensors if tensor is not None}
    if bool(total_norm(list(named.values())).isfinite()):
        return []
    return [name for name, tensor in named.items() if not bool(tensor.isfinite().all())]  # squares can overflow


@torch.no_grad()
def origin(model: nn.Module, batch: Any) -> str:
    """Where values that are not finite come from, in the loss of a model on a batch; '' if there are none.

    The forward pass is run once more, in training mode: BN statistics move. Random layers draw anew, so what came by
    chance may not be found.
    """
    first: list[str] = []
    names = {module: name for name, module in model.named_modules() if name}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not first and not finite(output):
            first.append(f'the output of {names[module]} ({type(module).__name__}) is the first that is not finite')

    with hooked(module.register_forward_hook(look) for module in names):
        model(**model.data_preprocessor(batch, True), mode='loss')  # type: ignore[operator]
    weights = not_finite(model.named_parameters())
    if weights:
        return f'{weights[0]} has values that are not finite'
    if not finite(batch):
        return f'the input batch has values that are not finite{_files(batch)}'
    return first[0] if first else ''


def finite(value: Any) -> bool:
    """Whether no tensor of nested containers has an infinite or undefined value."""
    return all(bool(t.isfinite().all()) for t in tensors_in(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors with floats in nested containers, data samples among them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, BaseDataElement):
        yield from tensors_in(value.all_values())
    elif isinstance(value, Mapping):
        yield from tensors_in(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, 'tensor'):  # boxes of mmdet
        yield from tensors_in(value.tensor)


def _files(batch: Any) -> str:
    """Names the pictures whose values are not finite, if the batch knows them."""
    if not (isinstance(batch, Mapping) and isinstance(batch.get('data_samples'), (list, tuple))):
        return ''
    pairs = zip(batch.get('inputs', ()), batch['data_samples'])
    bad = [sample for picture, sample in pairs if not finite([picture, sample])]
    paths = [str(sample.img_path) for sample in bad if 'img_path' in sample]
    return f' ({", ".join(paths[:3])})' if paths else ''
