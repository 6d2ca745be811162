"""From a trained quantized model to what runtimes read: merged, exported, verified, written whole or not at all."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn as nn
from torch import Tensor

from ..core.compat import check_export
from ..core.deployable import activated_outputs, float_output
from ..core.errors import UserError
from ..core.files import whole_folder, write_whole
from ..core.modules import detached_copy, quant_layers
from ..core.quantizers import Quantizer, Stage
from ..core.quantizers.base import uncalibrated
from ..core.topology import Plan
from .flat import Flat
from .merge import IntegerLayer, merge_model
from .names import layer_of
from .onnx_export import export_onnx, size_axes
from .packed import write_packed
from .runtime import RuntimeFailed, float_layers, installed_backends, integer_layers, open_runtime
from .verify import compare, first_difference, too_many
from .verify_onnx import Piece, aliases, record_codes, verify_onnx

LARGEST_BATCH = 16
"""Examples that an export is traced and verified with, at most."""
PADDING = {(2, 3): (0, 64, 0, 32), (1,): (0, 7)}
"""How much larger inputs are that an open size is verified with; pictures by multiples of 32, for detectors."""
ODD = {**PADDING, (2, 3): (0, 35, 0, 21)}
"""The same with other remainders: a graph has only one way where a model pads or cuts by what is left of the size."""

log = logging.getLogger(__name__)


@dataclass
class ExportedPart:
    """One graph and how it compares with the trained model."""

    name: str
    graph: onnx.ModelProto
    """:func:`properties` reads what is noted in it."""
    pieces: dict[str, list[Piece]]
    """What each installed runtime makes of each piece of the graph."""
    wrong: str
    """What is wrong with it, '' if all is well."""
    ran: set[str]
    """Names of the layers and quantizers that ran."""


@dataclass
class ExportReport:
    """What was written and how it compares with the trained model."""

    parts: list[ExportedPart]
    unread: list[str] = field(default_factory=list)
    """Layers that are in no graph, as nothing reads what they make."""

    def __str__(self) -> str:
        """One line a fact: how many layers are integers, how many codes differ in each runtime."""
        fused, whole = self.layers
        lines = [f'ONNX Runtime computes {fused} of {whole} layers with integers'] if whole else []
        if self.unread:
            lines.append(f'not exported, as nothing reads what they make: {", ".join(self.unread)}')
        for backend, differing in self.differing.items():
            lines.append(f'{backend}: {differing} of {self.codes} codes differ, at rounding ties')
        return '\n'.join(lines)

    def ends(self, backend: str) -> Iterable[Piece]:
        """The pieces of one runtime that end with codes."""
        return (piece for part in self.parts for piece in part.pieces[backend] if piece.step)

    @property
    def codes(self) -> int:
        """How many codes were compared in each runtime."""
        return sum(piece.values for piece in self.ends(next(iter(self.parts[0].pieces))))

    @property
    def differing(self) -> dict[str, int]:
        """In each runtime how many of them are not those of the trained model, by the rounding of ties and biases."""
        return {backend: sum(piece.differing for piece in self.ends(backend)) for backend in self.parts[0].pieces}

    @property
    def wrong(self) -> int:
        """Values that are further off, in all runtimes; an export with any is not written."""
        return sum(piece.wrong for part in self.parts for pieces in part.pieces.values() for piece in pieces)

    @functools.cached_property
    def layers(self) -> tuple[int, int]:
        """How many layers ONNX Runtime computes with integers, and how many there are; (0, 0) without ONNX Runtime."""
        if 'onnxruntime' not in self.parts[0].pieces:
            return 0, 0
        counts = [integer_layers(part.graph) for part in self.parts]
        return sum(fused for fused, _ in counts), sum(whole for _, whole in counts)

    @functools.cached_property
    def float_layers(self) -> list[str]:
        """Names of those that ONNX Runtime computes in float, most of them because their output is not quantized."""
        if 'onnxruntime' not in self.parts[0].pieces:
            return []
        return [name for part in self.parts for name in float_layers(part.graph)]


def export(model: nn.Module, plan: Plan, example: Tensor, out: str | Path, target: str = 'both') -> ExportReport:
    """Write model.onnx and model.safetensors (see packed.py) into a new folder, whole or not at all.

    The graph takes any number of examples, and pictures of any size, (N, C, H, W), or sequences of any length,
    (N, L, C) or token ids (N, L), if the model allows it. It is verified at another size too, with other remainders
    when divided, where the model takes such.

    Args:
        model: quantized and trained; its forward takes one tensor and returns tensors, nested as they like. It is not
            changed.
        plan: of this model, see gdrq_mm/core/topology.py.
        example: a batch of inputs to trace and to compare with.
        out: the folder; it must not exist.
        target: 'onnxruntime' or 'openvino' verifies and writes for that one, see :func:`for_openvino`.

    Raises:
        UserError: torch is older than 2.8, the model is not calibrated, it or the example is not finite or not float32,
            the model does not take the example, a layer cannot be merged or exported, no runtime is installed, or one
            disagrees; names the first layer.
    """
    check_export()
    if target not in ('both', *installed_backends()):
        raise UserError(f'export: target={target!r} is neither both nor installed: {", ".join(installed_backends())}')
    _check_values(model, example)
    out = Path(out)
    if out.exists():
        raise UserError(f'{out} exists')
    trained, x = detached_copy(model).cpu().eval(), example_batch(example.cpu())
    if refused := _refusal(trained, (x,)):
        raise UserError(f'the model does not take the example, {tuple(x.shape)} of {x.dtype}: {refused}')
    if target == 'openvino':
        trained, _ = for_openvino(trained, plan)
    merged = merge_model(trained, plan)
    difference = first_difference(compare(trained, merged, plan, lambda m: m(x)))
    if difference:
        raise UserError(f'{difference}; nothing was written')
    any_size = x.dim() > 2 or not x.is_floating_point()
    part = export_part('model', Flat(trained), Flat(merged), x, any_size, target)
    if part.wrong:
        raise UserError(f'{part.wrong}; nothing was written')
    unread = check_complete(merged, [part])
    with whole_folder(out) as folder:
        write_whole(folder / 'model.onnx', part.graph.SerializeToString())
        write_packed(merged, folder / 'model.safetensors')
    return ExportReport([part], unread)


def _check_values(model: nn.Module, example: Tensor) -> None:
    """Refuse a model without thresholds, of another precision or not finite, and an example that is not finite."""
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer) and not quantizer.calibrated and quantizer.stage != Stage.FLOAT:
            raise UserError(uncalibrated(quantizer.name))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise UserError(f'{name} is {tensor.dtype}: export takes a float32 model, as model.float() makes it')
        broken = tensor.isnan() if not isinstance(tensor, nn.Parameter) else ~tensor.isfinite()  # a mask may be -inf
        if bool(broken.any()):
            raise UserError(f'{name} has NaN or infinite values: its training diverged; nothing was written')
    if example.is_floating_point() and not bool(example.isfinite().all()):
        raise UserError('the example has NaN or infinite values: there is nothing to compare with')


def _refusal(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> str:
    """Why a model does not take these inputs; '' if it does."""
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:  # a model says in many ways that it takes no other size
        return _first_line(error)
    return ''


def _other_size(trained: Flat, inputs: tuple[Tensor, ...], multiple: int) -> tuple[tuple[Tensor, ...], str]:
    """Inputs of another size, which has other remainders if sizes need not be a multiple and the model takes it.

    Also why the model does not take them; '' if it does.
    """

    def larger(x: Tensor, padding: dict[tuple[int, ...], tuple[int, ...]]) -> Tensor:
        axes = size_axes(x)
        return nn.functional.pad(x, (0, 0) * (x.dim() - 1 - axes[-1]) + padding[axes])

    odd, padded = (tuple(larger(x, padding) for x in inputs) for padding in (ODD, PADDING))
    if multiple == 1 and not _refusal(trained, odd):
        return odd, ''
    return padded, _refusal(trained, padded)


def example_batch(x: Tensor) -> Tensor:
    """At least 2 examples, as an open batch needs them, and at most LARGEST_BATCH."""
    return (torch.cat([x, x.flip(-1)]) if len(x) == 1 else x)[:LARGEST_BATCH].detach().contiguous()


def for_openvino(model: nn.Module, plan: Plan) -> tuple[nn.Module, list[str]]:
    """A copy without the 8-bit quantizers in front of activation functions such as SiLU, and where they stood.

    Only ONNX Runtime needs them. OpenVINO computes the function and the next quantizer inside of the integer
    convolution if nothing stands between. The copy does not round there, so its values are not quite the model's.
    """
    model = copy.deepcopy(model)
    names = activated_outputs(model, plan)
    for name in names:
        float_output(model.get_submodule(name))
    return model, names


def export_part(
    name: str,
    trained: Flat,
    merged: Flat,
    x: Tensor | Sequence[Tensor],
    any_size: bool = False,
    target: str = 'both',
    multiple: int = 1,
) -> ExportedPart:
    """Export a part of a model and verify it in every installed runtime, or in one.

    Args:
        trained: the part of the trained model, in evaluation mode.
        merged: the same part of the merged model.
        x: a batch of at least 2 of its input, or of each of its inputs.
        any_size: try a graph that takes pictures of any size, or sequences of any length, and verify it at another size
            than that of its trace. If it fails there, the size is fixed, and a warning says why.
        target: the runtime that it is for, which is noted in the graph; 'both'.
        multiple: of which sizes always are, 32 for most detectors.

    Raises:
        UserError: it cannot be exported or run, or no runtime is installed.
    """
    inputs = (x,) if isinstance(x, Tensor) else tuple(x)
    if any_size:
        part = None
        other, reason = _other_size(trained, inputs, multiple)
        try:
            if not reason:
                part = _exported(name, trained, merged, inputs, other, target)
                reason = part.wrong
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:  # of torch, its exporter, the runtimes, and models
            reason = _first_line(error)  # that refuse a size
        if part is not None and not reason:
            return part
        log.warning('part %s takes the traced size only: %s', name, reason)
    try:
        return _exported(name, trained, merged, inputs, None, target)
    except (torch.onnx.errors.OnnxExporterError, RuntimeFailed) as error:
        raise UserError(f'part {name} cannot be exported: {_first_line(error)}') from error


def _exported(
    name: str,
    trained: Flat,
    merged: Flat,
    x: tuple[Tensor, ...],
    other: tuple[Tensor, ...] | None,
    target: str,
) -> ExportedPart:
    """Trace with x; verify with x, or with inputs of another size."""
    any_size, shown = other is not None, x if other is None else other
    seen, outputs = record_codes(trained.model, functools.partial(trained, *shown))
    graph = export_onnx(merged, x, [f'y{i}' for i in range(len(outputs))], any_size)
    given, arrays = ([each.numpy() for each in tensors] for tensors in (shown, outputs))
    pieces = {}
    for backend in installed_backends() if target == 'both' else [target]:
        try:
            pieces[backend] = verify_onnx(graph, seen, given, arrays, functools.partial(open_runtime, backend))
        except RuntimeFailed as error:
            raise RuntimeFailed(f'{backend}: {error}') from error
    about = {'structure': trained.structure, 'shape': list(x[0].shape[1:]), 'any_size': any_size, 'for': target}
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in about.items()})
    whole_biases = any(layer.deployable for layer in quant_layers(trained.model).values())
    return ExportedPart(name, graph, pieces, first_wrong(pieces, whole_biases), {site.quantizer for site in seen})


def _first_line(error: BaseException) -> str:
    """What an error says; of the exporter's, which tell how far it came, what they were raised from."""
    while isinstance(error, torch.onnx.errors.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    said = '' if isinstance(error, KeyError) else str(error).strip()  # a KeyError says the key alone
    text, *others = (said or repr(error)).splitlines()
    while text.endswith(':') and others:
        text = f'{text} {others.pop(0).strip()}'.strip()
    return text


def properties(graph: onnx.ModelProto) -> dict[str, Any]:
    """What is noted in a graph: how its outputs nest, the shape of its first input, whether any size will do."""
    return {prop.key: json.loads(prop.value) for prop in graph.metadata_props}


def first_wrong(found: dict[str, list[Piece]], whole_biases: bool) -> str:
    """Names the first piece that is wrong in a runtime, or says how many codes differ; '' if all is well.

    With `whole_biases` nothing but rounding ties may make codes differ, and few of these are not ties to the last place
    of float32. Else a rounded bias does: how many codes that are depends on the model, and what counts is that none of
    them is further off than its bias.
    """
    for name, pieces in found.items():
        for piece in pieces:
            if piece.wrong:
                return (
                    f'{name} differs from the trained model, first at {piece.name}: {piece.wrong} of '
                    f'{piece.values} values'
                )
        if not whole_biases:
            continue
        ends = [piece for piece in pieces if piece.step]
        differing = sum(piece.differing - piece.undecided for piece in ends)
        codes = sum(piece.values for piece in ends)
        if too_many(differing, codes):
            first = next(piece.name for piece in ends if piece.differing > piece.undecided)
            return (
                f'{name} differs from the trained model in {differing} of {codes} codes, more than rounding ties '
                f'explain, first at {first}'
            )
    return ''


def check_complete(merged: nn.Module, parts: Sequence[ExportedPart]) -> list[str]:
    """Names of the merged layers that are in none of the graphs because nothing reads what they make.

    Raises:
        UserError: a merged layer did not run in any part.
    """
    ran, names = set[str]().union(*(part.ran for part in parts)), aliases(merged)
    layers = {name: layer for name, layer in merged.named_modules() if isinstance(layer, IntegerLayer)}
    for name in layers:
        if ran.isdisjoint(names[name]):
            raise UserError(f'{type(merged).__name__} cannot be exported: layer {name} is in none of its graphs')
    exported = {layer_of(node.name) for part in parts for node in part.graph.graph.node}
    codes = {id(layer.codes) for name, layer in layers.items() if not exported.isdisjoint(names[name])}
    return [name for name, layer in layers.items() if id(layer.codes) not in codes]  # pyramid levels share theirs
