"""The graphs of an exported folder, inputs for them, and what they cost: time in turns, memory in a fresh process.

Neither torch nor OpenMMLab is imported: whoever deploys has neither.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from ..core.errors import UserError, command
from .runtime import open_runtime

WARM_UP = 2
"""Rounds before those that count."""
PAUSE = 0.05
"""Seconds before each contestant: the threads of the runtime before it spin for a while, on cores that it needs."""
CHANNELS = (1, 3, 4)
"""Channels that a picture may have; the dimension that has them tells (N, C, H, W) from (N, H, W, C)."""

Key = TypeVar('Key', bound=Hashable)


@dataclass
class ExportedGraph:
    """One graph of an exported folder."""

    name: str
    path: Path
    model: onnx.ModelProto
    part: bool
    """One of the parts that run one after the other in a prediction; else it is a prediction alone."""
    inside: bool
    """Its inputs come from another part, regions of a picture or a sequence, instead of pictures."""

    @property
    def regions(self) -> bool:
        """Whether its inputs are regions of a picture, as those of a box head."""
        return self.inside and len(self.model.graph.input[0].type.tensor_type.shape.dim) == 4


def graphs_of(folder: Path) -> list[ExportedGraph]:
    """The graphs that export.json lists, its parts first; without one, the .onnx files of the folder.

    Raises:
        UserError: there is no such folder, no graph in it, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f'{folder} is no folder; {command("export")} writes one')
    parts, others = _listed(folder) if (folder / 'export.json').is_file() else ([], [])
    names = [*parts, *others] or sorted(path.name for path in folder.glob('*.onnx'))
    if not names:
        raise UserError(f'{folder} has no ONNX graph; {command("export")} writes them')
    return [
        ExportedGraph(Path(name).stem, folder / name, load_graph(folder / name), name in parts, name in parts[1:])
        for name in names
    ]


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """File names of the parts, in the order in which they run, and of the other graphs of export.json."""
    path = folder / 'export.json'
    try:
        about = json.loads(path.read_text())
        parts = list(_files(about.pop('parts')))
        others = list(_files(about))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged: {type(error).__name__} {error}') from None
    for name in (*parts, *others):
        if Path(name).name != name:
            raise UserError(f'{path} is damaged: {name!r} is no name of a file')
    return parts, others


def _files(value: Any) -> Iterator[str]:
    """Names of graphs at any depth of what was read from JSON."""
    if isinstance(value, dict):
        file = value.get('file')
        if isinstance(file, str) and file.endswith('.onnx'):
            yield file
        for inner in value.values():
            yield from _files(inner)


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        UserError: it is missing or no ONNX graph.
    """
    try:
        model = onnx.load(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    except DecodeError:
        raise UserError(f'{path} is no ONNX graph') from None
    if not model.graph.node:
        raise UserError(f'{path} is no ONNX graph: it has no nodes')
    return model


def traced_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """Height and width of the picture that a part was exported with, as noted in it; None if nothing is noted."""
    noted = _noted_shape(model)
    return (noted[1], noted[2]) if len(noted) == 3 else None


def _noted_shape(model: onnx.ModelProto) -> list[int]:
    """The shape of one example of the first input that a part was exported with; [] if nothing is noted."""
    noted = next((prop.value for prop in model.metadata_props if prop.key == 'shape'), None)
    try:
        return [int(size) for size in json.loads(noted or '')]
    except (ValueError, TypeError):
        return []


def inputs_for(
    graph: ExportedGraph, batch: int, size: tuple[int, int] | None, usual: tuple[int, int] | None
) -> list[np.ndarray]:
    """Noise for each input of a graph.

    Args:
        graph: its inputs are (N, C, H, W) or (N, H, W, C), uint8 or float32; regions may have any shape, and sequences
            (N, L, ...) are as long as the one that it was exported with.
        batch: pictures or regions.
        size: height and width of pictures; None: those that the graph fixes, else the usual ones.
        usual: None: not known.

    Raises:
        UserError: the graph takes another batch or another size only, or its inputs are of no such form.
    """
    stored = {tensor.name for tensor in graph.model.graph.initializer}
    noise = np.random.default_rng(0)
    found = []
    for value in graph.model.graph.input:
        if value.name not in stored:
            kind = value.type.tensor_type
            dims = [dim.dim_value if dim.HasField('dim_value') else None for dim in kind.shape.dim]
            shape = _shape(graph, dims, batch, None if graph.inside else size, usual)
            if kind.elem_type == TensorProto.UINT8:
                found.append(noise.integers(0, 256, shape, np.uint8))
            elif kind.elem_type == TensorProto.FLOAT:
                found.append(noise.standard_normal(shape, np.float32))
            else:
                name = helper.tensor_dtype_to_string(kind.elem_type)
                raise UserError(f'{graph.path}: input {value.name} is {name}, not uint8 or float32')
    return found


def _shape(
    graph: ExportedGraph,
    dims: list[int | None],
    batch: int,
    size: tuple[int, int] | None,
    usual: tuple[int, int] | None,
) -> list[int]:
    """The shape of an input whose dimensions are these; None: open."""
    if not dims or dims[0] not in (None, batch):
        raise UserError(f'{graph.path} takes batches of {dims[0] if dims else 0} only, not {batch}')
    shape: list[int | None] = [batch, *dims[1:]]
    if len(dims) == 4 and not graph.inside:
        first = 1 if dims[3] in CHANNELS and dims[1] not in CHANNELS else 2
        fixed = dims[first : first + 2]
        if size and any(dim not in (None, given) for dim, given in zip(fixed, size)):
            only, given = (' x '.join('any' if n is None else str(n) for n in each) for each in (fixed, size))
            raise UserError(f'{graph.path} takes pictures of {only} only, not {given}')
        wanted = size or usual or (None, None)
        shape[first : first + 2] = [given if dim is None else dim for dim, given in zip(fixed, wanted)]
    elif len(dims) < 4 and None in shape:
        shape[1:] = [noted if dim is None else dim for dim, noted in zip(shape[1:], _noted_shape(graph.model))]
    elif size:
        raise UserError(f'{graph.path} takes no pictures, so that --size means nothing')
    if None in shape:
        raise UserError(f'{graph.path} takes pictures of any size and notes none; give one with --size')
    return shape  # type: ignore[return-value]


# ---- time -----------------------------------------------------------------------------------------------------------


def timed_rounds(runs: Mapping[Key, Callable[[], Any]], rounds: int) -> Iterator[dict[Key, float]]:
    """Seconds of each contestant, round after round.

    Every round runs each contestant, once untimed and once timed, in an order drawn anew: what else the machine does
    falls on all alike.
    """
    shuffle = random.Random(0).shuffle
    for number in range(WARM_UP + rounds):
        keys, seconds = list(runs), dict[Key, float]()
        shuffle(keys)
        for key in keys:
            time.sleep(PAUSE)
            runs[key]()  # after a pause caches are cold and cores are slow
            start = time.perf_counter()
            runs[key]()
            seconds[key] = time.perf_counter() - start
        if number >= WARM_UP:
            yield seconds


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_of_process() -> int:
    """The most resident memory of this process so far, in bytes.

    The same counter as getrusage's ru_maxrss, but that one starts from the memory of the parent process.
    """
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024


def peak_memory(
    backend: str, files: Sequence[Path], inputs: Sequence[Sequence[np.ndarray]], threads: int | None
) -> int:
    """Bytes that loading graphs and one call of each adds to a fresh process, at its peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(_peak_here, backend, files, inputs, threads).result()


def _peak_here(backend: str, files: Sequence[Path], inputs: Sequence[Sequence[np.ndarray]], threads: int | None) -> int:
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew: that of the imports is higher
    before = peak_of_process()
    opened = [open_runtime(backend, file, threads) for file in files]
    for runtime, given in zip(opened, inputs, strict=True):
        runtime(given)
    return peak_of_process() - before
