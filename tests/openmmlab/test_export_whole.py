"""A W4A4 model of each task, trained for an epoch and exported: the whole graphs give what torch gives.

A float32 sum at a rounding tie falls on either side, and one such code changes others behind it: in a detector that is
barely trained, all of a picture's outputs by a tenth. So raw outputs (logits, not softmax) are compared by the mean
distance of the best picture. No tie is in all pictures, a wrong scale is: the bound is seen broken by one layer's
multiplier that is 5 % off.
"""

import copy

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.names import layer_of
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.bundle import example_inputs, export_graphs
from gdrq_mm.openmmlab.parts import parts_of
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.runs import TASK_CONFIGS, checkpoint_of, task_config

BOUND = 0.01
"""Largest such distance from torch's. Where no code flips it is 1e-7."""


LONG = {'det', 'seg'}


@pytest.fixture(
    scope='module',
    params=[pytest.param(task, marks=[pytest.mark.full] * (task in LONG)) for task in TASK_CONFIGS],
)
def trained(request, scenes_root, tmp_path_factory):
    """The graphs of a trained model: (name of the part, graph, input, what torch gives)."""
    torch.manual_seed(0)
    task = request.param
    cfg = task_config(task, scenes_root, tmp_path_factory.mktemp(task))
    cfg.train_dataloader.dataset.pop('indices')
    cfg.train_dataloader.batch_size = 2 if task != 'cls' else 5
    cfg.model.backbone.zero_init_residual = False  # else residual branches give 0 at first
    runner = QuantRunner.from_cfg(cfg)
    runner.train()
    model = init_model(cfg, checkpoint_of(runner), 'cpu')
    batch = next(iter(runner.test_dataloader))

    def predict():
        return model.test_step(copy.deepcopy(batch))

    report = export_graphs(model, merge_model(model, model.plan), predict, lambda part: None)
    parts = parts_of(model, task)
    inputs = example_inputs(model, parts, predict)
    found = []
    for part, exported in zip(parts, report.parts, strict=True):
        with torch.no_grad():
            expected = [out.numpy() for out in part.module(*inputs[part.name])]
        found.append((part.name, exported.graph, inputs[part.name][0].numpy(), expected))
    return found


def distance(graph, x, expected, backend):
    """Mean distance of the output that is furthest off, for the best picture, in mean sizes of that output."""
    found = open_runtime(backend, graph.SerializeToString())([x])

    def of_pictures(one, other):
        return np.abs(one - other).reshape(len(one), -1).mean(1) / np.abs(other).mean()

    return max(float(np.min(of_pictures(one, other))) for one, other in zip(found, expected, strict=True))


def scaled(graph, node):
    """The graph with the multiplier of one layer 5 % larger."""
    changed = copy.deepcopy(graph)
    (weight,) = [each for each in changed.graph.node if each.name == node.name]
    (scale,) = [each for each in changed.graph.initializer if each.name == weight.input[1]]
    changed.graph.initializer.append(
        numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.05), 'changed')
    )
    weight.input[1] = 'changed'
    return changed


@pytest.mark.parametrize('backend', RUNTIMES)
def test_a_runtime_gives_what_torch_gives(trained, backend):
    for name, graph, x, expected in trained:
        assert all(out.std() > 0 for out in expected), name
        assert distance(graph, x, expected, backend) < BOUND, name


@pytest.mark.parametrize('backend, every', [('onnxruntime', 1), ('openvino', 6)])
def test_a_wrong_scale_in_any_layer_is_seen(trained, backend, every):
    for _, graph, x, expected in trained:
        layers = [node for node in graph.graph.node if layer_of(node.name) is not None]
        assert layers
        for node in layers[::every]:
            assert distance(scaled(graph, node), x, expected, backend) > BOUND, node.name
