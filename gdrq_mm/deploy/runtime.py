"""The runtimes that execute an exported graph: ONNX Runtime and OpenVINO, on a CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from ..core.errors import UserError
from .names import layer_of
from .saturation import LAYERS, has_vnni, saturating, share_weights, without_saturation


class RuntimeFailed(RuntimeError):
    """A runtime cannot load or run a graph."""


@contextmanager
def _failures_of_onnxruntime() -> Iterator[None]:
    """Its exceptions have no class in common, and are no RuntimeError, as those of OpenVINO are."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    ) as error:
        raise RuntimeFailed(str(error)) from error


def _read(model: str | Path | bytes) -> onnx.ModelProto:
    try:
        return onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    except DecodeError as error:
        raise RuntimeFailed(f'no ONNX model: {error}') from error


class OnnxRuntime:
    """A session of ONNX Runtime.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: of one operator; None: the runtime's choice.
        optimized: where to write the graph that runs, after fusion.
    """

    def __init__(self, model: str | Path | bytes, threads: int | None = None, optimized: Path | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        source = model if isinstance(model, bytes) else str(model)
        if not has_vnni() and saturating(graph := _read(model)):
            if share_weights(graph):  # onnxruntime 1.32 fails at them with the option
                source = without_saturation(graph).SerializeToString()
            else:
                options.add_session_config_entry('session.x64quantprecision', '1')  # exact, at some speed
        with _failures_of_onnxruntime():
            self.session = onnxruntime.InferenceSession(source, options, providers=['CPUExecutionProvider'])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for inputs in the order of the graph."""
        with _failures_of_onnxruntime():
            return self.session.run(None, dict(zip(self.inputs, inputs, strict=True)))


COMPILED = 16
"""Shapes of inputs for which OpenVINO keeps a compiled model: pictures of a detector have dozens (ours)."""


OPENVINO_LAYERS = ('Convolution', 'Deconvolution', 'FullyConnected')
"""Layers in the graph that OpenVINO runs. Products of two activations, as in attention, are its MatMul."""


class _SignalStack(ctypes.Structure):
    _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give the thread back the stack on which its signal handlers run.

    The CPU plugin of OpenVINO (2026.4) gives the thread that compiles a model one of its own, for AMX
    (https://github.com/openvinotoolkit/openvino/pull/11894), and unmaps it when the plugin goes, on whatever thread
    that happens. Where the stack stays behind, the next signal that Python handles, such as that of a data worker which
    ends, ends the process with signal 11.
    """
    swap = getattr(ctypes.CDLL(None), 'sigaltstack', None)
    before = _SignalStack()
    if swap is not None:
        swap(None, ctypes.byref(before))
    try:
        yield
    finally:
        if swap is not None:
            swap(ctypes.byref(before), None)


@contextmanager
def _failures_of_openvino() -> Iterator[None]:
    """Its messages begin with the places in its own source where they were passed on."""
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith('Exception from ')]
        raise RuntimeFailed('\n'.join(lines) or str(error)) from error


class OpenVino:
    """A model compiled by OpenVINO, its float layers in float32.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: None: the runtime's choice.
    """

    def __init__(self, model: str | Path | bytes, threads: int | None = None) -> None:
        import openvino

        self.core = openvino.Core()
        source = model if isinstance(model, bytes) else str(model)
        with _failures_of_openvino():
            self.model = self.core.read_model(
                source if has_vnni() else without_saturation(_read(model)).SerializeToString()
            )
        # Else it takes bfloat16 on CPUs that have it, and quantizes the inputs of the last layer a second time.
        self.options: dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32', 'DYNAMIC_QUANTIZATION_GROUP_SIZE': 0}
        if threads is not None:
            self.options['INFERENCE_NUM_THREADS'] = threads
        self.compiled: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for inputs in the order of the graph."""
        with _failures_of_openvino(), kept_signal_stack():
            return self._run(inputs)

    def _run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.compiled:
            if len(self.compiled) == COMPILED:
                self.compiled.pop(next(iter(self.compiled)))
            # With an open shape its integer layers are slower and not exact (2026.4).
            model = self.model.clone()
            for value, shape in zip(model.inputs, shapes, strict=True):
                own = value.partial_shape
                if not own.compatible(type(own)(list(shape))):  # reshaped, it would give other values
                    raise RuntimeFailed(f'input {value.any_name} has shape {own} in the graph, this one has {shape}')
            model.reshape({value.any_name: shape for value, shape in zip(model.inputs, shapes, strict=True)})
            self.compiled[shapes] = self.core.compile_model(model, 'CPU', self.options)
        found = self.compiled[shapes](list(inputs))
        return [np.array(found[i]) for i in range(len(found))]

    def integer_layers(self) -> int:
        """How many layers it computes with integers, of a model that has run."""
        model = next(iter(self.compiled.values())).get_runtime_model()
        made = [node.get_rt_info() for node in model.get_ops()]
        kinds = [(about['layerType'].value, about['primitiveType'].value) for about in made]
        return sum(layer in OPENVINO_LAYERS and kernel.endswith('_I8') for layer, kernel in kinds)


RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVino]] = {'onnxruntime': OnnxRuntime, 'openvino': OpenVino}
"""The runtimes by the names of their packages."""


def installed_backends() -> list[str]:
    """Names of the runtimes that are installed.

    Raises:
        UserError: none is.
    """
    found = [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]
    if not found:
        raise UserError("no runtime is installed: uv pip install 'gdrq-mm[deploy]'")
    return found


def open_runtime(backend: str, model: str | Path | bytes, threads: int | None = None) -> OnnxRuntime | OpenVino:
    """A runtime with a graph.

    Raises:
        UserError: it is not known or not installed, or cannot load this file.
        RuntimeFailed: it cannot load these bytes.
    """
    if backend not in RUNTIMES:
        raise UserError(f'backend {backend} is not one of {", ".join(RUNTIMES)}')
    if backend not in installed_backends():
        raise UserError(f"{backend} is not installed: uv pip install 'gdrq-mm[deploy]'")
    try:
        return RUNTIMES[backend](model, threads)
    except RuntimeFailed as error:  # such as an older version than that of the export
        if isinstance(model, bytes):
            raise
        raise UserError(f'{backend} cannot load {model}: {str(error).strip().splitlines()[0]}') from error


INTEGER_KERNELS = ('QLinearConv', 'QGemm', 'QLinearMatMul', 'MatMulIntegerToFloat')
"""Layers that compute with integers in the graph that ONNX Runtime makes."""


def optimized(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'optimized.onnx'
        OnnxRuntime(graph.SerializeToString(), optimized=path)
        return onnx.load(path)


def kernels(graph: onnx.ModelProto) -> Counter[str]:
    """How often each operator stands in the graph that ONNX Runtime makes of this one; products do not count."""
    ran = optimized(graph)
    return Counter(node.op_type for node in ran.graph.node) - Counter(node.op_type for node in products(ran))


def products(graph: onnx.ModelProto) -> list[Any]:
    """The nodes that multiply two tensors of which both depend on the input, as attention does: they are no layers."""
    computed, found = {value.name for value in graph.graph.input}, []
    for node in graph.graph.node:
        if not computed.isdisjoint(node.input):
            computed.update(node.output)
        factors = node.input[:2] if node.op_type in LAYERS else node.input  # a bias is made in the type of the input
        if sum(name in computed for name in factors) > 1 and node.op_type in (*LAYERS, *INTEGER_KERNELS):
            found.append(node)
    return found


def integer_products(graph: onnx.ModelProto) -> tuple[int, int]:
    """How many products of two activations ONNX Runtime computes with integers, and how many there are."""
    found = len(products(graph))
    if not found:
        return 0, 0
    return sum(node.op_type in INTEGER_KERNELS for node in products(optimized(graph))), found


def layers(graph: onnx.ModelProto) -> list[Any]:
    """The nodes that are convolutions or linear layers."""
    apart = {node.name for node in products(graph)}
    return [node for node in graph.graph.node if node.op_type in LAYERS and node.name not in apart]


def integer_layers(graph: onnx.ModelProto) -> tuple[int, int]:
    """How many layers ONNX Runtime computes with integers, and how many there are."""
    ran = kernels(graph)
    return sum(ran[kind] for kind in INTEGER_KERNELS), len(layers(graph))


def float_layers(graph: onnx.ModelProto) -> list[str]:
    """Names of the layers that ONNX Runtime computes in float, each once: one may read several pyramid levels."""
    left = {node.name for node in optimized(graph).graph.node if node.op_type not in INTEGER_KERNELS}
    made_by = {name: node for node in graph.graph.node for name in node.output}
    found = []
    for node in layers(graph):
        if node.name in left:
            weight = made_by.get(node.input[1])
            while weight is not None and layer_of(weight.name) is None:  # a Transpose
                weight = made_by.get(weight.input[0])
            found.append(node.name if weight is None else str(layer_of(weight.name)))
    return list(dict.fromkeys(found))
