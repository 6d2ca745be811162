"""One graph from several: the verified graphs of a model, and what stands between them, one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
import torch.nn as nn
from onnx import helper
from onnx_ir.passes import common
from torch import Tensor

from .onnx_export import OPSET


@dataclass
class Step:
    """One graph of a chain. A value has one name in the whole chain."""

    name: str
    """Stands in front of the names inside the graph; '': they stay as they are."""
    module: nn.Module
    """From tensors to a tensor or a tuple of them."""
    takes: Sequence[str]
    gives: Sequence[str]
    open_axes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of each input, the dimensions that may have any size."""
    graph: onnx.ModelProto | None = None
    """Where it is exported already."""


def run_chain(
    steps: Sequence[Step],
    image: Tensor,
    run: Callable[[Step, Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """All values of a chain that begins with the value `image`.

    Args:
        run: computes a step from its inputs. None: its module does, in torch.
    """
    values = {'image': image}
    for step in steps:
        inputs = [values[name] for name in step.takes]
        with torch.no_grad():
            found = step.module(*inputs) if run is None else run(step, inputs)
        values.update(zip(step.gives, [found] if isinstance(found, Tensor) else found, strict=True))
    return values


def export_steps(
    steps: Sequence[Step], values: Mapping[str, Tensor], translations: Mapping[Any, Any]
) -> list[onnx.ModelProto]:
    """A graph for each step; those that have none are traced.

    Args:
        values: of run_chain(); an open dimension is at least 2.
        translations: operator of torch -> function that builds it in ONNX Script.
    """
    graphs = []
    for step in steps:
        inputs = tuple(values[name] for name in step.takes)
        graphs.append(step.graph or _traced(step, inputs, translations))
    return graphs


def _traced(step: Step, inputs: tuple[Tensor, ...], translations: Mapping[Any, Any]) -> onnx.ModelProto:
    axes = tuple(dict.fromkeys(step.open_axes.get(name, ()), torch.export.Dim.AUTO) for name in step.takes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            _Called(step.module),
            inputs,
            input_names=list(step.takes),
            output_names=list(step.gives),
            opset_version=OPSET,
            dynamic_shapes=(axes,),
            custom_translation_table=dict(translations),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    common.ClearMetadataAndDocStringPass()(program.model)  # stack traces of the export
    model = program.model_proto
    read = {name for node in model.graph.node for name in node.input}
    for value in [value for value in model.graph.input if value.name not in read]:
        model.graph.input.remove(value)  # OpenVINO leaves out what nothing reads
    return model


class _Called(nn.Module):
    """A module whose forward takes all its inputs as one argument list, so that their shapes are told in one way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def join(steps: Sequence[Step], graphs: Sequence[onnx.ModelProto], outputs: Sequence[str]) -> onnx.ModelProto:
    """The graphs of a chain as one, checked. Nodes and initializers stay as they are, but for names.

    Args:
        outputs: the values that the graph returns.
    """
    nodes, initializers, known = [], [], {}
    for step, model in zip(steps, graphs, strict=True):
        graph = _renamed(step, model.graph)
        known.update({value.name: value for value in (*graph.input, *graph.output)})
        nodes += graph.node
        initializers += graph.initializer
    graph = helper.make_graph(nodes, 'end2end', [known['image']], [known[name] for name in outputs], initializers)
    model = helper.make_model(graph, opset_imports=graphs[0].opset_import, ir_version=graphs[0].ir_version)
    onnx.checker.check_model(model, full_check=True)
    return model


def _renamed(step: Step, graph: onnx.GraphProto) -> onnx.GraphProto:
    """A graph with the names of its step: those of the chain for what goes in and out, a prefix for the rest."""
    new = onnx.GraphProto()
    new.CopyFrom(graph)
    ends = [value.name for value in (*new.input, *new.output)]
    names = dict(zip(ends, ends if step.graph is None else [*step.takes, *step.gives], strict=True))

    def renamed(name: str) -> str:
        return names.get(name) or (f'{step.name}/{name}' if name and step.name else name)

    for node in new.node:
        node.name = renamed(node.name)
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for value in (*new.input, *new.output, *new.initializer):
        value.name = renamed(value.name)
    return new
