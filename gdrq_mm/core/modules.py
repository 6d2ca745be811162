"""Find, replace and watch modules of a model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor

from . import compat
from .layers import QuantLayer
from .quantizers import ActivationQuantizer, FollowingQuantizer, ModeOfModel, Quantizer, Stage


def every_module(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, in any order: what nn.Module.modules gives, at a tenth of its time."""
    found, waiting = dict.fromkeys([model]), [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def quant_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> quantized layer, each layer once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Name -> activation quantizer, each once: inputs of layers, and outputs that `deployable` quantizes."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


def moving_quantizers(model: nn.Module) -> dict[str, FollowingQuantizer]:
    """Name -> activation quantizer whose threshold follows its inputs and is not frozen."""
    return {n: q for n, q in activation_quantizers(model).items() if moves(q)}  # type: ignore[misc]


def moves(quantizer: ActivationQuantizer) -> bool:
    """Whether its threshold follows its inputs and is not frozen."""
    return isinstance(quantizer, FollowingQuantizer) and quantizer.stage < Stage.FREEZE


def replace_modules(model: nn.Module, replaced: Mapping[Any, nn.Module]) -> None:
    """Replace modules by others, old -> new, under every name that an old module has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                parent._modules[name] = replaced[child]


def settle_in(model: nn.Module) -> None:
    """Tell the quantizers of a model where they are: the name of their layer, the model, and whether the layer learns.

    What the quantizers of a layer learn stands still if its weight does, as in `frozen_stages`. The model is not
    wrapped yet: DistributedDataParallel waits for the gradient of each Parameter that wants one then.
    """
    for module in model.modules():
        if isinstance(module, ModeOfModel):
            module.root = (model,)
    for name, quantizer in activation_quantizers(model).items():
        quantizer.name = name.replace('.own_input_quant', '')
    for name, layer in quant_layers(model).items():
        if layer.weight_quant is not None:
            layer.weight_quant.name = name
        for quantizer in (layer.weight_quant, layer.own_input_quant):
            if quantizer is not None and not layer.learns:
                quantizer.requires_grad_(False)


def follow(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Let quantizers of another model go by the mode of this one: a quantized backbone becomes a part of a new model.

    Where that model is a part of this one, or this one of that, they stay as they are.

    Args:
        modules: all modules of the model.
    """
    roots = {each.root[0] for each in modules if isinstance(each, ModeOfModel) and each.root} - {model}
    strange = {root for root in roots.difference(modules) if model not in every_module(root)} if roots else set()
    for each in modules if strange else ():
        if isinstance(each, ModeOfModel) and strange.intersection(each.root):
            each.root = (model,)


def detached_copy(model: nn.Module) -> Any:
    """A deep copy, also right after a training step, when weights that a hook makes are part of a graph."""
    made = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf]
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in made})


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens. `handles` may be a generator that registers them."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only(model: nn.Module, active: Iterable[Quantizer]) -> Iterator[None]:
    """Let only the `active` quantizers of a model quantize; the others return their input unchanged.

    Afterwards every quantizer is in the stage that it was in before. Nothing that a checkpoint saves changes.
    """
    kept, stages = set(active), {m: m.stage for m in model.modules() if isinstance(m, Quantizer)}
    for quantizer in stages:
        if quantizer not in kept:
            quantizer.stage = Stage.FLOAT
    try:
        yield
    finally:
        for quantizer, stage in stages.items():
            quantizer.stage = stage


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile made runs as it is written, meanwhile: hooks and calibration would make it compile again."""
    if 'torch._dynamo' not in sys.modules:  # nothing is compiled, and the import would take seconds
        yield
        return
    with compat.uncompiled():
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module at the end."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def mute_leaves(model: nn.Module) -> None:
    """Set the modules without children, such as BN and dropout, to evaluation mode; the others keep their mode.

    So a model still computes a loss that it computes in training mode only (Deformable DETR, PIDNet). Quantizers do not
    count as children: a BN whose output is quantized has one.
    """
    for module in model.modules():
        if all(isinstance(child, Quantizer) for child in module.children()):
            module.eval()
