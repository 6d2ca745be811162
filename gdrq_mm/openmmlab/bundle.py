"""The folder with the exported graphs of a model: how it is written, and how a model predicts with its graphs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError, command
from ..core.files import file_digest, whole_folder, write_whole
from ..core.modules import hooked
from ..deploy.export import ExportedPart, ExportReport, check_complete, example_batch, export_part, properties
from ..deploy.flat import check_nest, nest
from ..deploy.onnx_export import size_axes
from ..deploy.runtime import open_runtime
from ..deploy.saturation import saturating_inputs
from ..report.provenance import versions
from ..report.recipe import flat
from ..report.record import plain
from .checkpoints import checkpoint_digest
from .deployed import TURNS, EndToEnd, let_graph_predict, takes_rgb
from .parts import Part, parts_of
from .pictures import input_rule
from .tasks import TASKS, task_of

VERSION = 2
"""Version of export.json."""
END2END = 'end2end.onnx'


def export_graphs(
    model: Any,
    merged: nn.Module,
    predict: Callable[[], Any],
    report: Callable[[ExportedPart], None],
    target: str = 'both',
) -> ExportReport:
    """Export each part of a model and verify it in every runtime that is installed, or in one.

    Args:
        model: the trained model, in evaluation mode; it is not changed.
        merged: what merge_model() returns.
        predict: runs the model on one picture.
        report: is called with each part, also with one that is wrong.
        target: the runtime that the graphs are for, or 'both'.

    Raises:
        UserError: a part cannot be exported, no runtime is installed, or one disagrees; names the first layer.
    """
    task = task_of(model.cfg)
    parts, exported = parts_of(model, task), []
    inputs = example_inputs(model, parts, predict)
    multiple = getattr(model.data_preprocessor, 'pad_size_divisor', 1)  # mmdet pads pictures to it
    for part, twin in zip(parts, parts_of(merged, task), strict=True):
        found = export_part(part.name, part.module, twin.module, inputs[part.name], part.any_size, target, multiple)
        report(found)
        if found.wrong:
            raise UserError(f'{part.name}: {found.wrong}; nothing was written')
        exported.append(found)
    return ExportReport(exported, check_complete(merged, exported))


def write_bundle(out: Path, model: Any, checkpoint: str, report: ExportReport, whole: EndToEnd | str) -> None:
    """Write graphs and export.json into a new folder, whole or not at all.

    Args:
        whole: the graph from pictures to predictions, or why there is none.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    with whole_folder(out) as folder:
        parts = {}
        for part in report.parts:
            file = folder / f'{part.name}.onnx'
            write_whole(file, part.graph.SerializeToString())
            parts[part.name] = dict(file=file.name, sha256=file_digest(str(file)), **properties(part.graph))
        if isinstance(whole, EndToEnd):
            write_whole(folder / END2END, whole.graph.SerializeToString())
        normalize = model.data_preprocessor
        about = dict(
            export_version=VERSION,
            task=task_of(model.cfg),
            checkpoint_sha256=checkpoint_digest(checkpoint),
            parts=parts,
            end2end=_entry(folder, model, whole),
            mean=_numbers(normalize, 'mean'),
            std=_numbers(normalize, 'std'),
            rgb=takes_rgb(model),
            classes=list(model.dataset_meta.get('classes') or []),
            versions=versions(),
        )
        write_whole(folder / 'export.json', (json.dumps(about, indent=1) + '\n').encode())


def _entry(folder: Path, model: Any, whole: EndToEnd | str) -> dict[str, Any]:
    """What export.json says of the graph from pictures to predictions."""
    if isinstance(whole, str):
        return dict(refused=whole)
    about = dict(size=whole.size, any_size=whole.any_size, channels=whole.channels, outputs=whole.outputs)
    about['saturating'] = saturating_inputs(whole.graph)  # for CPUs without VNNI
    about['settings'] = _settings_of(model)
    about['input'] = input_rule(model.cfg)
    return dict(file=END2END, sha256=file_digest(str(folder / END2END)), layout='NHWC', **about)


def _settings_of(model: Any) -> dict[str, Any]:
    """The settings of a model that end2end.onnx holds, as plain data: each `test_cfg`, how pictures are prepared."""
    found = {f'{name}.test_cfg'.lstrip('.'): getattr(each, 'test_cfg', None) for name, each in model.named_modules()}
    prepare = model.data_preprocessor
    for name in ('mean', 'std', 'pad_size_divisor', 'pad_value', *TURNS):
        found[f'data_preprocessor.{name}'] = getattr(prepare, name, None)
    return {name: plain(value) for name, value in found.items() if value is not None}


def _check_settings(model: Any, whole: dict[str, Any], folder: Path) -> None:
    """Refuse end2end.onnx where the config has other settings than it.

    Raises:
        UserError: names one, and both values.
    """
    if 'settings' not in whole:  # an older export
        return
    ours, theirs = flat(_settings_of(model)), flat(whole['settings'])
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f'{folder}/{END2END} was exported with {name}={theirs.get(name)}, the config has {ours.get(name)}: '
                'export the model again, or use --parts'
            )


def use_runtime(
    model: Any, folder: str | Path, backend: str, checkpoint: str, threads: int | None = None, parts: bool = False
) -> None:
    """Let exported graphs predict: end2end.onnx where there is one, else the parts, with decoding and NMS in torch.

    Args:
        parts: run the parts in any case.

    Raises:
        UserError: the folder is no export of this checkpoint, a file was changed, end2end.onnx has other settings than
            the config, or the runtime is not installed.
    """
    folder, digest = Path(folder), checkpoint_digest(checkpoint)
    about = read_bundle(folder)
    if digest is None or about['checkpoint_sha256'] != digest:
        raise UserError(f'{folder} was exported from another checkpoint than {checkpoint}')
    found = parts_of(model, about['task'])
    if [part.name for part in found] != list(about['parts']):
        raise UserError(f'{folder} is the export of another model: it has {", ".join(about["parts"])}')
    if 'file' in about['end2end'] and not parts:
        _check_settings(model, about['end2end'], folder)
        let_graph_predict(model, about, open_runtime(backend, folder / about['end2end']['file'], threads))
        return
    for part in found:
        entry = about['parts'][part.name]
        part.replace(model, _runner(open_runtime(backend, folder / entry['file'], threads), entry, part.name))


def read_bundle(folder: Path) -> dict[str, Any]:
    """The content of export.json, after comparing the graphs of the folder with their checksums.

    Raises:
        UserError: it is missing or damaged, or a graph was changed.
    """
    path = folder / 'export.json'
    try:
        about = json.loads(path.read_text())
        if about['export_version'] != VERSION:
            raise UserError(f'{path} has version {about["export_version"]}, this is {VERSION}: export the model again')
        if about['task'] not in TASKS.values():
            raise ValueError(f'task {about["task"]!r}')
        whole = about['end2end']
        graphs = {**about['parts'], **({'end2end': whole} if 'file' in whole else {})}
        for name, entry in graphs.items():
            if entry['file'] != f'{Path(name).name}.onnx' or not isinstance(entry['sha256'], str):
                raise ValueError(f'part {name!r}')
            file = folder / entry['file']
            if not file.is_file():
                raise UserError(f'{file} is missing')
            if file_digest(str(file)) != entry['sha256']:
                raise UserError(f'{file} was changed after its export: its checksum does not fit')
            if not isinstance(entry.get('any_size', False), bool):
                raise ValueError(f'any_size {entry["any_size"]!r}')
        for entry in about['parts'].values():
            check_nest(entry['structure'])
            list(entry['shape'])
        if 'file' in whole:
            str(whole['channels']), list(whole['outputs']), list(whole['size'])
        about['checkpoint_sha256']
    except OSError as error:
        raise UserError(f'{error.filename} cannot be read: {error.strerror}; {command("export")} writes it') from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {type(error).__name__} {error}') from None
    return about


def _runner(runtime: Any, entry: dict[str, Any], name: str) -> Callable[[Tensor], Any]:
    def run(*inputs: Tensor) -> Any:
        x, number = inputs[0], len(inputs[0])
        axes = size_axes(x) if entry.get('any_size') else ()
        expected = ['any' if axis in axes else size for axis, size in enumerate(entry['shape'], 1)]
        found = ['any' if axis in axes else size for axis, size in enumerate(x.shape[1:], 1)]
        if found != expected:
            needed, given = (' x '.join(map(str, sizes)) for sizes in (expected, x.shape[1:]))
            raise UserError(f'{name} was exported for inputs of {needed}, this one is {given}')
        # The number of regions changes, and OpenVINO compiles a graph for each batch size: fill up to a power of two.
        filled = 1 << max(number - 1, 0).bit_length()
        batch = [torch.zeros(filled, *each.shape[1:]) for each in inputs]
        for rows, each in zip(batch, inputs, strict=True):
            rows[:number] = each.detach()
        outputs = [torch.from_numpy(y)[:number].to(x.device) for y in runtime([rows.numpy() for rows in batch])]
        return nest(entry['structure'], outputs)

    return run


def example_inputs(model: Any, parts: list[Part], predict: Callable[[], Any]) -> dict[str, tuple[Tensor, ...]]:
    """The inputs of each part in one prediction: batches of at least 2."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def keep(module: Any, args: Any, kwargs: Any, part: Part) -> None:
        found.setdefault(part.name, tuple(each.detach().clone() for each in part.takes(*args, **kwargs)))

    handles = [
        model.get_submodule(part.feed).register_forward_pre_hook(functools.partial(keep, part=part), with_kwargs=True)
        for part in parts
    ]
    with hooked(handles), torch.no_grad():
        predict()
    for part in parts:
        inputs = found.get(part.name)
        if inputs is None or not len(inputs[0]):
            raise UserError(f'{part.name} was not reached on this picture; give another one with --image')
        found[part.name] = tuple(map(example_batch, inputs))
    return found


def _numbers(module: Any, name: str) -> list[float] | None:
    value = getattr(module, name, None)
    return None if value is None else [float(v) for v in value.flatten()]
