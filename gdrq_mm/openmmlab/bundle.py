"""A folder with the exported graphs of a model: written after they are verified, put to work in the model's place."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError, building
from ..core.files import file_digest, write_whole
from ..core.modules import quant_layers
from ..deploy.merge import IntegerLayer, shared_codes
from ..deploy.onnx_export import export_onnx
from ..deploy.runtime import installed_backends, open_runtime
from ..deploy.verify import too_many
from ..deploy.verify_onnx import Piece, aliases, record_codes, verify_onnx
from ..report.record import versions
from .parts import Part, check_nest, nest, parts_of
from .tasks import TASKS, task_of

VERSION = 1
"""Version of export.json."""
TURNS = ('to_rgb', '_channel_conversion')
"""Flags of data preprocessors that turn BGR into RGB: mmpretrain's, and mmengine's, which mmdet and mmseg use."""
LARGEST_BATCH = 16
"""Regions of interest that an export is traced and verified with, at most."""


def export_graphs(
    model: Any, merged: nn.Module, predict: Callable[[], Any], report: Callable[[str, dict[str, list[Piece]]], None]
) -> dict[str, onnx.ModelProto]:
    """Export each part of a model and verify it in every runtime that is installed.

    Args:
        model: the trained model, in evaluation mode; it is not changed.
        merged: of merge_model().
        predict: runs the model on one picture.
        report: is given the name of a part and the pieces by runtime.

    Returns:
        A graph by name; :func:`properties` reads what is noted in it.

    Raises:
        UserError: a part cannot be exported, no runtime is installed, or one disagrees; names the first layer.
    """
    backends = installed_backends()
    task = task_of(model.cfg)
    parts, graphs = parts_of(model, task), {}
    seen_inputs = example_inputs(model, parts, predict)
    for part, twin in zip(parts, parts_of(merged, task), strict=True):
        x = seen_inputs[part.name]
        graph, found, any_size, wrong = _export_part(model, part, twin.module, x, backends)
        report(part.name, found)
        if wrong:
            raise UserError(f'{part.name}: {wrong}; nothing was written')
        props = dict(structure=part.module.structure, shape=list(x.shape[1:]), any_size=any_size)
        onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in props.items()})
        graphs[part.name] = graph
    exported = {t.name.removesuffix('.int4') for graph in graphs.values() for t in graph.graph.initializer}
    shared, names = shared_codes(merged), aliases(merged)
    for name, layer in merged.named_modules():
        codes = {f'{other}.codes' for other in names[name]} | {shared.get(f'{name}.codes', '')}
        if isinstance(layer, IntegerLayer) and exported.isdisjoint(f'model.{each}' for each in codes):
            raise UserError(f'{type(model).__name__} cannot be exported: layer {name} is in none of its graphs')
    return graphs


def _export_part(
    model: Any, part: Part, merged: nn.Module, x: Tensor, backends: list[str]
) -> tuple[onnx.ModelProto, dict[str, list[Piece]], bool, str]:
    """The graph of a part, its pieces by runtime, whether it takes pictures of any size, and what is wrong with it.

    An open graph is verified at another size than that of its trace. If it fails there, the size is fixed.
    """
    for any_size in (True, False) if part.any_size else (False,):
        shown = nn.functional.pad(x, (0, 64, 0, 32)) if any_size else x  # multiples of 32, as detectors need them
        try:
            with building(f'the part {part.name} of the model', 'cannot be exported'):
                seen, outputs = record_codes(model, functools.partial(part.module, shown))
                graph = export_onnx(merged, x, [f'y{i}' for i in range(len(outputs))], any_size)
            arrays = [out.numpy() for out in outputs]
            with building(f'the part {part.name} of the model', 'cannot be verified'):
                found = {
                    name: verify_onnx(graph, seen, [shown.numpy()], arrays, functools.partial(open_runtime, name))
                    for name in backends
                }
        except Exception:  # the runtimes raise their own, for instance at an index that is fixed in the graph
            if not any_size:
                raise
            continue
        wrong = first_wrong(found, _has_whole_biases(model))
        if not wrong:
            break
    return graph, found, any_size, wrong


def _has_whole_biases(model: nn.Module) -> bool:
    """Whether the biases of the trained model are those that integer kernels round theirs to."""
    return any(layer.deployable for layer in quant_layers(model).values())


def first_wrong(found: dict[str, list[Piece]], whole_biases: bool) -> str:
    """Names the first piece that is wrong in a runtime, or says how many codes differ; '' if all is well.

    With `whole_biases` nothing but rounding ties may make codes differ. Else a rounded bias does: how many codes that
    are depends on the model, and what counts is that none of them is further off than its bias.
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
        differing, codes = sum(piece.differing for piece in ends), sum(piece.values for piece in ends)
        if too_many(differing, codes):
            first = next(piece.name for piece in ends if piece.differing)
            return (
                f'{name} differs from the trained model in {differing} of {codes} codes, more than rounding ties '
                f'explain, first at {first}'
            )
    return ''


def properties(graph: onnx.ModelProto) -> dict[str, Any]:
    """What export_graphs() notes in a graph: how its outputs nest, the shape of its input, whether any size will do."""
    return {prop.key: json.loads(prop.value) for prop in graph.metadata_props}


def write_bundle(out: Path, model: Any, checkpoint: str, graphs: dict[str, onnx.ModelProto]) -> None:
    """Write graphs and export.json into a new folder, whole or not at all.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    unfinished = out.with_name(f'.{out.name}.{os.getpid()}')
    try:
        unfinished.mkdir(parents=True)
        parts = {}
        for name, graph in graphs.items():
            file = unfinished / f'{name}.onnx'
            write_whole(file, graph.SerializeToString())
            parts[name] = dict(file=file.name, sha256=file_digest(str(file)), **properties(graph))
        normalize = model.data_preprocessor
        about = dict(
            export_version=VERSION,
            task=task_of(model.cfg),
            checkpoint_sha256=file_digest(checkpoint),
            parts=parts,
            mean=_numbers(normalize, 'mean'),
            std=_numbers(normalize, 'std'),
            rgb=any(getattr(normalize, name, False) for name in TURNS),
            classes=list(model.dataset_meta.get('classes') or []),
            versions=versions(),
        )
        write_whole(unfinished / 'export.json', (json.dumps(about, indent=1) + '\n').encode())
        unfinished.rename(out)
    except OSError as error:
        raise UserError(f'{out} cannot be written: {error.strerror}') from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def use_runtime(model: Any, folder: str | Path, backend: str, checkpoint: str, threads: int | None = None) -> None:
    """Let the exported graphs do the work of the model's network; what follows them stays in torch.

    Raises:
        UserError: the folder is no export of this checkpoint, a file was changed, the runtime is not installed.
    """
    folder, digest = Path(folder), file_digest(checkpoint)
    about = read_bundle(folder)
    if digest is None or about['checkpoint_sha256'] != digest:
        raise UserError(f'{folder} was exported from another checkpoint than {checkpoint}')
    parts = parts_of(model, about['task'])
    if [part.name for part in parts] != list(about['parts']):
        raise UserError(f'{folder} is the export of another model: it has {", ".join(about["parts"])}')
    for part in parts:
        entry = about['parts'][part.name]
        part.replace(model, _runner(open_runtime(backend, folder / entry['file'], threads), entry, part.name))


def read_bundle(folder: Path) -> dict[str, Any]:
    """export.json of a folder, after its graphs were compared with their checksums.

    Raises:
        UserError: it is missing or damaged, or a graph was changed.
    """
    path = folder / 'export.json'
    try:
        about = json.loads(path.read_text())
        if about['export_version'] != VERSION:
            raise UserError(f'{path} has version {about["export_version"]}, this is {VERSION}')
        if about['task'] not in TASKS.values():
            raise ValueError(f'task {about["task"]!r}')
        for name, entry in about['parts'].items():
            if entry['file'] != f'{Path(name).name}.onnx' or not isinstance(entry['sha256'], str):
                raise ValueError(f'part {name!r}')
            file = folder / entry['file']
            if not file.is_file():
                raise UserError(f'{file} is missing')
            if file_digest(str(file)) != entry['sha256']:
                raise UserError(f'{file} was changed after its export: its checksum does not fit')
            check_nest(entry['structure'])
            list(entry['shape'])
            if not isinstance(entry.get('any_size', False), bool):
                raise ValueError(f'any_size {entry["any_size"]!r}')
        about['checkpoint_sha256']
    except OSError as error:
        raise UserError(f'{error.filename} cannot be read: {error.strerror}; tools/export.py writes it') from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {type(error).__name__} {error}') from None
    return about


def _runner(runtime: Any, entry: dict[str, Any], name: str) -> Callable[[Tensor], Any]:
    fixed = entry['shape'][:1] if entry.get('any_size') else entry['shape']

    def run(x: Tensor) -> Any:
        shape = list(x.shape[1:])
        if shape[: len(fixed)] != fixed:
            expected, found = (' x '.join(map(str, sizes)) for sizes in (fixed, shape))
            raise UserError(f'{name} was exported for inputs of {expected}, this one is {found}')
        # Regions of interest are as many as there are: OpenVINO compiles a graph for each size of the batch.
        batch = torch.zeros(1 << max(len(x) - 1, 0).bit_length(), *shape)
        batch[: len(x)] = x.detach()
        outputs = [torch.from_numpy(y)[: len(x)].to(x.device) for y in runtime([batch.numpy()])]
        return nest(entry['structure'], outputs)

    return run


def example_inputs(model: Any, parts: list[Part], predict: Callable[[], Any]) -> dict[str, Tensor]:
    """An example for each part from one prediction: a batch of at least 2."""
    found: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, name: str) -> None:
        found.setdefault(name, args[0].detach().clone())

    handles = [
        (part.feed(model) or model.backbone).register_forward_pre_hook(functools.partial(keep, name=part.name))
        for part in parts
    ]
    try:
        with torch.no_grad():
            predict()
    finally:
        for handle in handles:
            handle.remove()
    for part in parts:
        x = found.get(part.name)
        if x is None or not len(x):
            raise UserError(f'{part.name} was not reached on this picture; give another one with --image')
        found[part.name] = (torch.cat([x, x.flip(-1)]) if len(x) == 1 else x)[:LARGEST_BATCH].contiguous()
    return found


def _numbers(module: Any, name: str) -> list[float] | None:
    value = getattr(module, name, None)
    return None if value is None else [float(v) for v in value.flatten()]
