"""One call from a trained model to a folder, and what it refuses."""

import copy
import ctypes
import dataclasses
import logging
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import whole_folder
from gdrq_mm.deploy import export as module
from gdrq_mm.deploy.export import export, export_part, first_wrong, for_openvino, properties
from gdrq_mm.deploy.flat import Flat, check_nest, nest
from gdrq_mm.deploy.from_packed import load_packed
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.names import Site
from gdrq_mm.deploy.runtime import RUNTIMES, OpenVino, RuntimeFailed, kept_signal_stack, open_runtime, products
from gdrq_mm.deploy.verify_onnx import Piece
from tests.deploy.builders import exported, in_float_here, pieces_of, pooled_network, prepared, trained_network
from tests.helpers import ENV, Function

FLOAT = dict(weight=dict(bits=32), activation=dict(bits=32))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_trained_model_is_exported_in_one_call(tmp_path):
    model, plan, x = trained_network()
    before, hooks = copy.deepcopy(model.state_dict()), {n: len(m._forward_hooks) for n, m in model.named_modules()}
    report = export(model.train(), plan, x, tmp_path / 'exported')
    assert model.training and {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / 'exported').iterdir()) == ['model.onnx', 'model.safetensors']
    assert report.wrong == 0 and list(report.differing) == list(RUNTIMES) and report.codes > 4 * 3 * 16 * 16
    assert report.layers == (7, 7) and report.float_layers == []
    loaded, _ = load_packed(pooled_network(), tmp_path / 'exported/model.safetensors')
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-3)
    run = open_runtime('onnxruntime', tmp_path / 'exported/model.onnx')
    torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0]), expected, atol=1e-4, rtol=1e-3)


def test_for_openvino_only_additions_are_quantized_besides_the_inputs_of_layers():
    stage = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU()]
    model, x = (
        Function(lambda m, x: m.last(m.stage(x) + m.side(x)), stage=nn.Sequential(*stage)),
        torch.randn(2, 3, 9, 9),
    )
    model.side, model.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
    model, plan = prepared(model, x, bits=8, deployable=True)
    fitted, names = for_openvino(model, plan)
    assert names == ['stage.1', 'stage.3']  # behind batch normalization where there is one
    left = [name for name, _ in fitted.named_modules() if name.endswith('output_quant')]
    assert left and set(left) == {n for n, _ in model.named_modules() if n.endswith('output_quant')} - {
        f'{name}.output_quant' for name in names
    }
    with torch.no_grad():
        off = float((fitted(x) - model(x)).norm() / model(x).norm())
    assert 0 < off < 0.05
    parts = [
        export_part('model', Flat(m), Flat(merge_model(m, plan)), x, any_size=True, target=target)
        for m, target in ((model, 'both'), (fitted, 'openvino'))
    ]
    assert [part.wrong for part in parts] == ['', ''] and [properties(part.graph)['for'] for part in parts] == [
        'both',
        'openvino',
    ]
    assert [list(part.pieces) for part in parts] == [list(RUNTIMES), ['openvino']]
    counts = [[node.op_type for node in part.graph.graph.node].count('QuantizeLinear') for part in parts]
    assert counts[0] - counts[1] == len(names)
    run = OpenVino(parts[1].graph.SerializeToString(), 1)
    torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0]), fitted(x).detach(), atol=1e-3, rtol=1e-3)
    assert run.integer_layers() == 4 - len(in_float_here(parts[1].graph))


def test_one_example_is_enough_and_pictures_may_have_any_size(tmp_path):
    model, plan, x = trained_network()
    export(model, plan, x[:1], tmp_path / 'exported')
    graph = onnx.load(tmp_path / 'exported/model.onnx')
    assert properties(graph) == {'structure': 0, 'shape': [3, 16, 16], 'any_size': True, 'for': 'both'}
    for backend in RUNTIMES:
        run = open_runtime(backend, tmp_path / 'exported/model.onnx')
        for shape in ((1, 3, 16, 16), (3, 3, 24, 40)):
            x = torch.randn(shape)
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0]), model(x), atol=1e-4, rtol=1e-3)


def test_weights_of_2_bits_have_the_size_of_4_in_onnx_and_their_own_in_the_packed_file(tmp_path):
    x, sizes = torch.randn(4, 64, 8, 8), {}
    for bits in (2, 4):
        convs = (nn.Conv2d(64, 256, 3, bias=False), nn.ReLU(), nn.Conv2d(256, 64, 3, bias=False))
        model, plan = prepared(nn.Sequential(*convs), x, bits=bits, weight=dict(bits=bits), deployable=True)
        export(model, plan, x, tmp_path / str(bits))
        sizes[bits] = [(tmp_path / f'{bits}/model.{kind}').stat().st_size for kind in ('onnx', 'safetensors')]
    weights = 2 * 64 * 256 * 9
    (onnx_of_2, packed_of_2), (onnx_of_4, packed_of_4) = sizes.values()
    assert abs(onnx_of_2 - onnx_of_4) < 0.01 * onnx_of_4 and 0.5 * weights < onnx_of_4 < 0.6 * weights
    assert 0.25 * weights < packed_of_2 < 0.3 * weights and 0.5 * weights < packed_of_4 < 0.6 * weights


def test_a_layer_that_nothing_reads_is_left_out_and_named(tmp_path):
    """As the last stage of a backbone whose head reads an earlier one."""

    def forward(m, x):
        x = m.relu(m.one(x))
        m.unread(x)
        return m.last(x)

    convs = dict(one=nn.Conv2d(3, 8, 3), unread=nn.Conv2d(8, 8, 3), last=nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, 16, 16)
    model, plan = prepared(Function(forward, relu=nn.ReLU(), **convs).eval(), x, bits=8, deployable=True)
    report = export(model, plan, x, tmp_path / 'exported')
    assert report.unread == ['unread'] and report.layers[1] == 2
    assert 'not exported, as nothing reads what they make: unread' in str(report)


def test_products_of_two_activations_are_no_layers(tmp_path):
    def forward(m, x):
        x = m.one(x).flatten(2)
        return m.last((x @ x.transpose(1, 2)).unsqueeze(-1))

    x = torch.randn(4, 3, 16, 16)
    model = Function(forward, one=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 1)).eval()
    model, plan = prepared(model, x, bits=8, deployable=True)
    report = export(model, plan, x, tmp_path / 'exported')
    assert report.layers[1] == 2 and set(report.float_layers) <= {'one', 'last'}
    assert [node.op_type for node in products(report.parts[0].graph)] == ['MatMul']


OTHER_VALUES = {
    'tokens': (lambda m, x: m.last(m.first(m.table(x)).relu().mean(1)), torch.randint(20, (4, 6))),
    'bytes': (lambda m, x: m.last(m.first(x / 255).relu().mean(1)), torch.randint(256, (4, 6, 8), dtype=torch.uint8)),
    'labels': (lambda m, x: (y := m.last(m.first(x).relu()), y.argmax(-1), y > 0.0123), torch.randn(4, 8)),
    'one tensor twice': (lambda m, x: (y := m.last(m.first(x).relu()), [y, y.relu(), y]), torch.randn(4, 8)),
    'the input': (lambda m, x: (x, m.last(m.first(x).relu()), torch.arange(3.0)), torch.randn(4, 8)),
}


@pytest.mark.parametrize('kind', OTHER_VALUES)
def test_inputs_and_outputs_may_be_whole_numbers_and_the_same_tensor(kind, tmp_path):
    forward, x = OTHER_VALUES[kind]
    layers = dict(table=nn.Embedding(20, 8), first=nn.Linear(8, 8), last=nn.Linear(8, 3))
    model, plan = prepared(Function(forward, **layers).eval(), x, bits=8, deployable=True)
    report = export(model, plan, x, tmp_path / 'exported')
    assert report.wrong == 0 and report.layers == (2, 2)
    flat = Flat(model)
    with torch.no_grad():
        expected = flat(x)
    for backend in RUNTIMES:
        found = open_runtime(backend, tmp_path / 'exported/model.onnx')([x.numpy()])
        assert nest(flat.structure, range(len(found))) == nest(properties(report.parts[0].graph)['structure'], range(9))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    'settings',
    [dict(overrides={'first': FLOAT, 'last': FLOAT}), dict(overrides={'*conv2': FLOAT}), dict(skip=['*conv2'])],
)
def test_layers_of_32_bits_stay_float_as_those_that_are_skipped(settings, tmp_path):
    model, plan, x = trained_network(**settings)
    report = export(model, plan, x, tmp_path / 'exported')
    number = 7 - 2
    assert report.wrong == 0 and report.layers[1] == 7 and 0 < report.layers[0] <= number
    loaded, _ = load_packed(pooled_network(), tmp_path / 'exported/model.safetensors')
    assert sum(isinstance(module, IntegerLayer) for module in loaded.modules()) == number
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-3)


def test_a_model_without_integers_is_not_exported(tmp_path):
    for settings in (dict(skip=['*']), dict(overrides={'*': FLOAT})):
        model, plan, x = trained_network(**settings)
        with pytest.raises(UserError, match=r'^the model has no quantized layer: there are no integers to export$'):
            export(model, plan, x, tmp_path / 'exported')


def flattened():
    """A network that takes pictures of 8 x 8 alone."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    x = torch.randn(4, 3, 8, 8)
    return *prepared(model.eval(), x, bits=8, deployable=True), x


def strict():
    """One that says so itself."""

    def forward(m, x):
        if x.shape[-1] != 8:
            raise ValueError(f'a picture is {x.shape[-1]} pixels wide and not 8')
        return m.last(m.first(x).relu())

    x = torch.randn(4, 3, 8, 8)
    model = Function(forward, first=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 3, 1))
    return *prepared(model.eval(), x, bits=8, deployable=True), x


def by_table(found):
    """One that looks something up by the width."""

    def network():
        def forward(m, x):
            return m.last(m.first(x).relu()) * found(x.shape[-1])

        x = torch.randn(4, 3, 8, 8)
        model = Function(forward, first=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 3, 1))
        return *prepared(model.eval(), x, bits=8, deployable=True), x

    return network


@pytest.mark.parametrize(
    'network, reason',
    [
        (flattened, 'mat1 and mat2 shapes cannot be multiplied'),
        (strict, 'a picture is 72 pixels wide'),
        (by_table({8: 2.0}.__getitem__), r'KeyError\(72\)'),
        (by_table(range(1, 10).__getitem__), 'range object index out of range'),
    ],
)
def test_why_a_graph_takes_one_size_is_said(network, reason, tmp_path, caplog):
    model, plan, x = network()
    with caplog.at_level(logging.WARNING):
        report = export(model, plan, x, tmp_path / 'exported')
    (line,) = [r.getMessage() for r in caplog.records if r.name == 'gdrq_mm.deploy.export']
    assert re.match(f'part model takes the traced size only: {reason}', line)
    assert len(line.splitlines()) == 1 and properties(report.parts[0].graph)['any_size'] is False


def test_a_mistake_is_not_taken_for_a_size_that_does_not_fit(monkeypatch):
    """Nobody expects a KeyError, so its traceback is shown."""
    model, plan, x = trained_network()
    monkeypatch.setattr(module, 'export_onnx', lambda *args: {}['no'])
    with pytest.raises(KeyError, match='no'):
        export_part('model', Flat(model), Flat(merge_model(model, plan)), x, any_size=True)


class Odd(nn.Module):
    """Calls an operator that ONNX does not have."""

    def forward(self, x):
        return torch.fft.fft(x).abs() if x.shape[-1] > 4 else torch.linalg.inv(x)


def test_what_the_exporter_cannot_do_is_one_message(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd())
    model, plan = prepared(model.eval(), x := torch.randn(2, 3, 6, 6), bits=8)
    with pytest.raises(UserError, match=r'^part model cannot be exported: .*linalg') as refused:
        export(model, plan, x, tmp_path / 'exported')
    assert str(refused.value).isprintable() and list(tmp_path.iterdir()) == []


def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch):
    model, plan, x = trained_network()
    right = module.export_onnx

    def wrong(*args):
        graph = right(*args)
        (bias,) = [t for t in graph.graph.initializer if t.name == 'model.one.conv1.bias']
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return graph

    monkeypatch.setattr(module, 'export_onnx', wrong)
    with pytest.raises(UserError, match=r'^onnxruntime differs .* first at one.conv2: .*; nothing was written$'):
        export(model, plan, x, tmp_path / 'exported')
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_not_written(tmp_path, monkeypatch):
    model, plan, x = trained_network()

    def wrong(*args):
        merged = merge_model(*args)
        merged.one.conv1.bias.add_(0.2)
        return merged

    monkeypatch.setattr(module, 'merge_model', wrong)
    with pytest.raises(UserError, match=r'^the merged model differs .* first in layer one.conv1; nothing was written$'):
        export(model, plan, x, tmp_path / 'exported')
    assert list(tmp_path.iterdir()) == []


def test_folders_are_whole_or_not_there(tmp_path):
    model, plan, x = trained_network()
    (tmp_path / 'exported').mkdir()
    with pytest.raises(UserError, match='exported exists'):
        export(model, plan, x, tmp_path / 'exported')
    with pytest.raises(KeyError), whole_folder(tmp_path / 'new') as folder:
        (folder / 'file').touch()
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ['exported']
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be written: Not a directory'), whole_folder(tmp_path / 'file/new'):
        pass


def test_outputs_nest_as_they_like():
    model = Function(lambda m, x: (x, [x + 1, (x + 2,)]))
    flat = Flat(model)
    outputs = flat(torch.zeros(1))
    assert len(outputs) == 3 and flat.structure == [0, [1, [2]]]
    check_nest(flat.structure)
    assert nest(flat.structure, outputs) == [outputs[0], [outputs[1], [outputs[2]]]]
    with pytest.raises(UserError, match='its head returns dict'):
        Flat(Function(lambda m, x: {'out': x}))(torch.zeros(1))
    for bad in ('x', [0, None]):
        with pytest.raises(ValueError, match='structure'):
            check_nest(bad)


@pytest.mark.parametrize('site', [Site('one.conv1', 0), Site('head.conv.2', 11), Site('bn.output_quant', 1)])
def test_the_name_of_a_node_tells_the_site(site):
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize('backend', RUNTIMES)
def test_what_a_runtime_refuses_is_one_kind_of_error(backend):
    model, plan, x = trained_network()
    graph = module.export_onnx(merge_model(model, plan), x, ['y'])
    for operator, inputs in ((graph.graph.node[0].op_type, x[:, :2]), ('Nonsense', x)):
        graph.graph.node[0].op_type = operator
        with pytest.raises(RuntimeFailed) as caught:
            open_runtime(backend, graph.SerializeToString())([inputs.numpy()])
        assert 'Exception from' not in str(caught.value).splitlines()[0]  # a place in the source of OpenVINO


def test_a_signal_stack_that_a_runtime_leaves_is_taken_away():
    class Stack(ctypes.Structure):
        _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]

    def now():
        found = Stack()
        assert libc.sigaltstack(None, ctypes.byref(found)) == 0
        return found.start, found.flags, found.size

    libc, memory = ctypes.CDLL(None), ctypes.create_string_buffer(1 << 16)
    before = now()
    with kept_signal_stack():
        assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 1 << 16)), None) == 0
        assert now()[0] == ctypes.addressof(memory)
    assert now() == before


SIGNAL_STACK = """
import ctypes, sys
import numpy as np
import openvino
from gdrq_mm.deploy.runtime import _SignalStack

def now():
    found = _SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.start, found.flags, found.size

before = now()
core = openvino.Core()
model = core.compile_model(core.read_model(sys.argv[1]), 'CPU')
print(now() != before)
"""


def test_openvino_still_changes_the_signal_stack(tmp_path):
    """If not, `kept_signal_stack` is no longer needed. In a process of its own, which handles no signal."""
    model, plan, x = trained_network()
    onnx.save(module.export_onnx(merge_model(model, plan), x, ['y']), tmp_path / 'model.onnx')
    command = [sys.executable, '-c', SIGNAL_STACK, str(tmp_path / 'model.onnx')]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and done.stdout.split()[-1] == 'True', done.stderr


@pytest.mark.parametrize(
    ('differing', 'undecided', 'wrong', 'message'),
    [
        ((0, 11), 0, 0, ''),
        ((0, 1), 0, 1, 'openvino differs from the trained model, first at b: 1 of 50000 values'),
        ((5, 7), 0, 0, 'openvino differs from the trained model in 12 of 100000 codes, more than .*, first at a$'),
        ((9, 600), 598, 0, ''),
        ((0, 600), 588, 0, 'openvino differs from the trained model in 12 of 100000 codes, more than .*, first at b$'),
    ],
)
def test_codes_may_differ_once_in_ten_thousand_where_they_are_not_quite_ties(differing, undecided, wrong, message):
    a, b = (Piece(name, 0.1, 50000, n, 0, 0, 0.5) for name, n in zip('ab', differing))
    b = dataclasses.replace(b, undecided=undecided)
    right = dataclasses.replace(b, differing=0, undecided=0)
    found = {'onnxruntime': [a, right], 'openvino': [a, dataclasses.replace(b, wrong=wrong)]}
    assert re.match(f'{message}$' if not message else message, first_wrong(found, True))
    assert bool(first_wrong(found, False)) == bool(wrong)


@pytest.fixture(scope='module', params=[(8, 2), (4, 16)], ids=['8 bits', '4 bits'])
def ties(request):
    """A network, its input, graph and so on: LeakyReLU makes one code of two, or of 16, a tie of the next quantizer."""
    bits, ratio = request.param
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 12, 12)
    model, plan = prepared(model.eval(), x, bits=bits, deployable=True)
    before, behind = model[0].output_quant, model[2].input_quant
    behind.threshold.copy_(ratio * before.step() * max(-behind.lo, behind.hi))
    return x, *exported(model, plan, x)


def test_values_that_are_ties_are_no_reason_to_refuse(ties):
    x, graph, seen, out = ties
    pieces = pieces_of(graph, seen, x, out)
    assert first_wrong(pieces, True) == ''
    (behind,) = [piece for piece in pieces['openvino'] if piece.name == '2']  # it divides otherwise than torch
    assert behind.differing == behind.undecided > 1e-3 * behind.values and behind.wrong == 0


@pytest.mark.parametrize('factor', [0.95, 0.99, 1.01, 1.05])
@pytest.mark.parametrize('place', ['model.0.scale', 'model.2.quantize.scale'])
def test_a_fault_is_refused_where_values_are_ties(ties, place, factor):
    x, right, seen, out = ties
    graph = copy.deepcopy(right)
    (scale,) = [tensor for tensor in graph.graph.initializer if tensor.name == place]
    value = onnx.numpy_helper.to_array(scale) * np.float32(factor)
    scale.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float32), place))
    pieces = pieces_of(graph, seen, x, out)
    for backend in RUNTIMES:
        assert first_wrong({backend: pieces[backend]}, True)


@pytest.mark.filterwarnings('ignore:.*weight_norm.*')
@pytest.mark.parametrize(
    'makes', [weight_norm, spectral_norm, lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)]
)
def test_export_right_after_a_training_step_of_a_weight_that_a_hook_makes(makes, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    makes(model[2])
    x = torch.randn(4, 3, 12, 12)
    model, plan = prepared(model, x)
    model.train()(x).sum().backward()
    assert export(model, plan, x, tmp_path / 'exported').wrong == 0
