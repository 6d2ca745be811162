"""tools/benchmark.py: what it measures of a folder, without torch and OpenMMLab, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F

from gdrq_mm.commands import benchmark
from gdrq_mm.core.errors import UserError
from gdrq_mm.deploy import measure, runtime
from gdrq_mm.deploy.export import export
from gdrq_mm.deploy.float_twin import float_twin
from gdrq_mm.deploy.measure import ExportedGraph, graphs_of, inputs_for, peak_memory, timed_rounds, traced_size
from gdrq_mm.deploy.runtime import INTEGER_KERNELS, open_runtime
from tests.deploy.builders import in_float_here, needs_runtimes, trained_network
from tests.helpers import ENV, ROOT

TOOL = ROOT / 'tools/benchmark.py'
RUNTIMES = tuple(runtime.RUNTIMES)
OPSET = '<ir_version: 10, opset_import: ["" : 21]> g '
FLOAT_GRAPH = OPSET + '(float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu(x) }'
PICTURES = OPSET + '(uint8[N,H,W,3] image) => (float[N,H,W,3] y) { y = Cast<to = 1>(image) }'
HEAD = OPSET + '(float[N,2,4,4] x) => (float[N,2,4,4] y) { y = Relu(x) }'
FIXED = OPSET + '(float[2,3,8,8] x) => (float[2,3,8,8] y) { y = Relu(x) }'
SHAPES = OPSET + '(int64[N] x) => (int64[N] y) { y = Identity(x) }'


def parsed(text):
    return onnx.parser.parse_model(text)


def write(folder, parts, **others):
    """A folder as tools/export.py writes it: name -> text or model."""
    folder.mkdir()
    about = dict(export_version=1, parts={name: dict(file=f'{name}.onnx', shape=[3, 8, 8]) for name in parts})
    for name, model in {**parts, **others}.items():
        onnx.save(parsed(model) if isinstance(model, str) else model, folder / f'{name}.onnx')
    about.update({name: dict(file=f'{name}.onnx', size=[8, 8]) for name in others})
    (folder / 'export.json').write_text(json.dumps(about))
    return folder


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """The folder that the door for plain torch writes: model.onnx alone."""
    model, plan, x = trained_network()
    folder = tmp_path_factory.mktemp('plain') / 'exported'
    export(model, plan, x, folder)
    return folder


def tool(*args, blocked=()):
    """Runs it in a process in which some packages cannot be imported."""
    program = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {set(blocked)!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
if __name__ == '__main__':
    sys.argv = {[str(TOOL), *map(str, args)]!r}
    runpy.run_path({str(TOOL)!r}, run_name='__main__')
"""
    return subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=ENV)


def test_it_measures_parts_their_sum_and_a_whole_graph_without_torch(network, tmp_path):
    first = onnx.load(network / 'model.onnx')
    folder = write(tmp_path / 'exported[w4a4]', dict(proposals=first, bbox_head=HEAD), end2end=PICTURES)
    options = ('--threads', 1, '--batch', 2, '--regions', 5, '--rounds', 2, '--out', tmp_path / 'found.json')
    blocked = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    done = tool(folder, *options, blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert 'exported[w4a4]' in done.stdout.replace('\n', '')
    found = json.loads((tmp_path / 'found.json').read_text())
    assert (found['threads'], found['batch'], found['regions'], found['rounds']) == (1, 2, 5, 2)
    assert found['versions']['onnxruntime'] and found['date'] and found['hardware']['cores']
    rows = {(row['graph'], row['runtime'], row['numbers']): row for row in found['rows']}
    graphs = ('proposals', 'bbox_head', 'end2end', 'sum')
    kinds = dict.fromkeys(graphs, ('exported', 'float32')) | dict.fromkeys(('bbox_head', 'end2end'), ('exported',))
    assert list(rows) == [(graph, name, kind) for graph in graphs for name in RUNTIMES for kind in kinds[graph]]
    shapes = [[2, 3, 16, 16], [10, 2, 4, 4], [2, 16, 16, 3]]
    for name in RUNTIMES:
        assert [rows[graph, name, 'exported']['inputs'] for graph in graphs] == [*([s] for s in shapes), shapes[:2]]
        exported, whole = rows['proposals', name, 'exported'], rows['sum', name, 'exported']
        integers = 7 - (len(in_float_here(first)) if name == 'openvino' else 0)
        assert exported['layers'] == whole['layers'] == 7
        assert exported['integer_layers'] == whole['integer_layers'] == integers
        assert (
            rows['proposals', name, 'float32']['integer_layers'] == rows['sum', name, 'float32']['integer_layers'] == 0
        )
        assert (
            exported['times_faster'] and whole['times_faster'] and not rows['end2end', name, 'exported']['times_faster']
        )
    for (graph, _, kind), row in rows.items():
        seconds = row['seconds']
        assert 0 < seconds['low'] <= seconds['median'] <= seconds['high'] and row['peak_bytes'] > 0
        assert row['pictures_a_second'] == pytest.approx(2 / seconds['median'])
        assert graph in done.stdout and kind in done.stdout
        files = [folder / f'{name}.onnx' for name in (graphs[:2] if graph == 'sum' else [graph])]
        if kind == 'exported':
            assert row['bytes'] == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize('backend', RUNTIMES)
def test_the_float_twin_has_the_layers_in_float32(backend, network):
    exported = onnx.load(network / 'model.onnx')
    twin = float_twin(exported)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    (ours,), (theirs,) = (open_runtime(backend, m.SerializeToString(), 1)([x]) for m in (twin, exported))
    assert 0.9 < np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] < 1 - 1e-6  # 4 bits: near, and not the same
    assert not {'QuantizeLinear', 'DequantizeLinear', 'Clip'} & {node.op_type for node in twin.graph.node}
    assert {tensor.data_type for tensor in twin.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert len(runtime.layers(twin)) == len(runtime.layers(exported)) == 7
    assert not any(runtime.kernels(twin)[kind] for kind in INTEGER_KERNELS)
    assert float_twin(twin) is None and float_twin(parsed(FLOAT_GRAPH)) is None


@needs_runtimes
def test_the_float_twin_computes_with_the_rounded_weights():
    """INT4 weights times a factor, a scale a channel; codes are clipped, pooled, read in a subgraph too."""
    model = parsed(
        OPSET
        + """(float[N,2,4,4] x, bool yes) => (float[N,3,2,2] y)
        <int32 factor = {16}, float minus = {-1}, float[3] scales = {0.5, 0.25, 2}, int8[3] zeros = {0, 0, 0},
         float step = {0.1}, uint8 zero = {8}, uint8 low = {1}, uint8 high = {15}>
        {
            wide = Cast<to = 6>(few)
            product = Mul(wide, factor)
            codes_of = Cast<to = 3>(product)
            w = DequantizeLinear<axis = 0>(codes_of, scales, zeros)
            q = QuantizeLinear(x, step, zero)
            clipped = Clip(q, low, high)
            pooled = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(clipped)
            d = DequantizeLinear(pooled, step, zero)
            z = If(yes) <
                then_branch = then () => (float[N,2,2,2] a) { a = Mul(d, minus) },
                else_branch = other () => (float[N,2,2,2] b) { b = Identity(d) }
            >
            y = Conv(z, w)
        }"""
    )
    codes = np.array([-8, 7, 1, 2, -3, 4]).reshape(3, 2, 1, 1)
    few = codes.astype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4))
    model.graph.initializer.append(onnx.numpy_helper.from_array(few, 'few'))
    twin = float_twin(model)
    x = torch.randn(1, 2, 4, 4)
    weight = torch.from_numpy(codes) * 16.0 * torch.tensor([0.5, 0.25, 2]).view(3, 1, 1, 1)
    (found,) = open_runtime('onnxruntime', twin.SerializeToString(), 1)([x.numpy(), np.array(True)])
    expected = F.conv2d(-F.max_pool2d(x, 2), weight)
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-4)


def test_rounds_run_every_contestant_twice_in_changing_order(monkeypatch):
    monkeypatch.setattr(measure, 'PAUSE', 0)
    ran = []
    rounds = list(timed_rounds({name: lambda name=name: ran.append(name) for name in 'abcd'}, 6))
    assert len(rounds) == 6 and all(set(each) == set('abcd') and min(each.values()) > 0 for each in rounds)
    orders = [''.join(ran[start : start + 8 : 2]) for start in range(0, len(ran), 8)]
    assert ran[::2] == ran[1::2] and len(orders) == measure.WARM_UP + 6
    assert len(set(orders)) > 1 and all(sorted(order) == list('abcd') for order in orders)


@needs_runtimes
def test_memory_grows_with_the_graph(tmp_path):
    big = parsed(OPSET + '(float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu(x) }')
    onnx.save(big, tmp_path / 'g.onnx')
    few, many = (np.zeros((1, 3, side, side), np.float32) for side in (8, 2048))
    small, large = (peak_memory('onnxruntime', [tmp_path / 'g.onnx'], [[x]], 1) for x in (few, many))
    assert small > 0 and large - small > 0.8 * many.nbytes  # the output; the input is there before


def graph(text, inside=False, noted=None):
    model = parsed(text)
    if noted:
        onnx.helper.set_model_props(model, dict(shape=json.dumps(noted)))
    return ExportedGraph('g', 'g.onnx', model, True, inside)


@pytest.mark.parametrize(
    ('text', 'batch', 'size', 'usual', 'shape'),
    [
        (FLOAT_GRAPH, 3, None, (8, 16), (3, 3, 8, 16)),
        (FLOAT_GRAPH, 1, (32, 64), (8, 16), (1, 3, 32, 64)),
        (PICTURES, 2, (32, 64), None, (2, 32, 64, 3)),
        (FIXED, 2, None, (4, 4), (2, 3, 8, 8)),
        (FIXED, 2, (8, 8), None, (2, 3, 8, 8)),
    ],
)
def test_inputs_have_the_shape_that_the_graph_and_the_user_say(text, batch, size, usual, shape):
    (x,) = inputs_for(graph(text), batch, size, usual)
    assert x.shape == shape and x.dtype == (np.uint8 if text == PICTURES else np.float32) and x.std() > 0


def test_sequences_are_as_long_as_that_of_the_export():
    text = OPSET + '(float[N,L,4] x, float[N,L] mask) => (float[N,L,4] y, float[N,L] z) { y = Relu(x) z = Relu(mask) }'
    tokens = graph(text, inside=True, noted=[6, 4])
    x, mask = inputs_for(tokens, 2, (64, 64), (8, 8))
    assert x.shape == (2, 6, 4) and mask.shape == (2, 6)
    assert not tokens.regions and graph(HEAD, inside=True).regions and not graph(HEAD).regions


def test_regions_have_no_size_of_a_picture():
    (x,) = inputs_for(graph(HEAD, inside=True), 7, (64, 64), (8, 8))
    assert x.shape == (7, 2, 4, 4)
    assert traced_size(graph(FLOAT_GRAPH, noted=[3, 8, 16]).model) == (8, 16)
    assert traced_size(graph(FLOAT_GRAPH).model) is traced_size(graph(FLOAT_GRAPH, noted='x').model) is None


@pytest.mark.parametrize(
    ('text', 'batch', 'size', 'message'),
    [
        (FIXED, 1, None, 'g.onnx takes batches of 2 only, not 1'),
        (FIXED, 2, (8, 16), 'g.onnx takes pictures of 8 x 8 only, not 8 x 16'),
        (FLOAT_GRAPH, 1, None, 'g.onnx takes pictures of any size and notes none; give one with --size'),
        (SHAPES, 1, None, 'g.onnx: input x is TensorProto.INT64, not uint8 or float32'),
    ],
)
def test_what_a_graph_does_not_take_is_refused(text, batch, size, message):
    with pytest.raises(UserError) as caught:
        inputs_for(graph(text), batch, size, None)
    assert str(caught.value) == message


def listing(value):
    return lambda folder: (folder / 'export.json').write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], '{f} has no ONNX graph; gdrq export writes them'),
        (lambda f: (f / 'model.onnx').unlink(), '{f}/model.onnx cannot be read: No such file or directory'),
        (lambda f: (f / 'model.onnx').write_bytes(b'\x08' * 99), '{f}/model.onnx is no ONNX graph'),
        (lambda f: (f / 'model.onnx').write_bytes(b''), '{f}/model.onnx is no ONNX graph: it has no nodes'),
        (listing('{'), '{f}/export.json is damaged: JSONDecodeError'),
        (listing([]), '{f}/export.json is damaged: TypeError'),
        (listing({}), "{f}/export.json is damaged: KeyError 'parts'"),
        (listing(dict(parts=dict(a=dict(file='../a.onnx')))), "{f}/export.json is damaged: '../a.onnx' is no name"),
    ],
)
def test_a_folder_that_cannot_be_measured(tmp_path, change, message):
    folder = write(tmp_path / 'exported', dict(model=FLOAT_GRAPH))
    change(folder)
    with pytest.raises(UserError) as caught:
        graphs_of(folder)
    assert str(caught.value).startswith(message.format(f=folder))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs the tool here, in a folder with a graph; what it says instead of measuring."""
    folder = write(tmp_path / 'exported', dict(model=FIXED))

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args or [folder])])
        with pytest.raises(UserError) as caught:
            benchmark.main()
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value).replace(str(tmp_path), '.')

    return run, folder


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--threads', 0], '--threads 0 is less than 1'),
        (['--batch', 0], '--batch 0 is less than 1'),
        (['--rounds', -1], '--rounds -1 is less than 1'),
        (['--size', 8, 0], '--size 0 is less than 1'),
        (['--batch', 3], './exported/model.onnx takes batches of 2 only, not 3'),
        (['--batch', 2, '--size', 9, 9], './exported/model.onnx takes pictures of 8 x 8 only, not 9 x 9'),
        (['--out', '/dev/null/a.json'], '--out /dev/null/a.json cannot be written: File exists'),
    ],
)
def test_a_wrong_option_is_one_line(refused, options, message):
    run, folder = refused
    assert run(folder, *options) == message


def test_no_folder_and_no_runtime_are_one_line(refused, monkeypatch):
    run, folder = refused
    assert run(folder / 'none') == './exported/none is no folder; python tools/export.py writes one'
    monkeypatch.setattr(runtime.importlib.util, 'find_spec', lambda name: name == 'openvino' or None)
    expected = "onnxruntime is not installed: uv pip install 'gdrq-mm[deploy]'"
    assert run(folder, '--runtime', 'onnxruntime') == expected


@needs_runtimes
def test_a_runtime_that_cannot_run_a_graph_is_one_line(refused, tmp_path):
    run, _ = refused
    add = OPSET + '(float[N,3,H,W] x) => (float[N,3,H,W] y) <float[1,3,8,8] c> { y = Add(x, c) }'
    model = parsed(add.replace('<float[1,3,8,8] c>', '<float[1,3,1,2] c = {1, 2, 3, 4, 5, 6}>'))
    folder = write(tmp_path / 'wrong', dict(model=model))
    message = run(folder, '--size', 5, 5, '--runtime', 'onnxruntime')
    assert message.startswith('onnxruntime cannot run ./wrong/model.onnx on 1 x 3 x 5 x 5: ')
