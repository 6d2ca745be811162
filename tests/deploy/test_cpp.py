"""examples/cpp: built as its CMakeLists.txt says, it predicts what Python does with Pillow and numpy."""

import importlib.util
import json
import os
import re
import shutil
import subprocess

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

from tests.helpers import ROOT

NEEDS = {
    'cmake': shutil.which('cmake'),
    'a C++ compiler': shutil.which('c++') or shutil.which('g++') or shutil.which('clang++'),
    'openvino': importlib.util.find_spec('openvino'),
}
MISSING = [name for name, found in NEEDS.items() if not found]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'not installed: {", ".join(MISSING)}')

HEAD = '<ir_version: 10, opset_import: ["" : 21]> whole (uint8[N,H,W,3] image) => '
MEANS = 'f = Cast<to = 1>(image) means = ReduceMean<keepdims = 0>(f, axes)'
CLASSIFIER = f"""{HEAD} (float[N,4] scores, float[N,3] topk_scores, int64[N,3] topk_labels)
<float[3,4] w = {{0.02, -0.01, 0.0, 0.01, 0.0, 0.01, -0.02, 0.0, -0.03, 0.0, 0.03, 0.01}}, int64[1] k = {{3}},
 int64[2] axes = {{1, 2}}>
{{ {MEANS} y = MatMul(means, w) scores = Softmax<axis = 1>(y) topk_scores, topk_labels = TopK(scores, k) }}"""
DETECTOR = f"""{HEAD} (float[N,3,5] dets, int64[N,3] labels)
<float[1,3,4] boxes = {{0, 0, 5, 7, 3, 4, 11, 13, 1, 2, 3, 4}}, int64[1,3] labels_of = {{2, 0, 1}},
 int64[2] axes = {{1, 2}}, int64[1] last = {{2}}, float full = {{255}}>
{{ {MEANS} share = Div(means, full) score = Unsqueeze(share, last)
   dets = Concat<axis = 2>(boxes, score) labels = Identity(labels_of) }}"""
LARGE = ', '.join(str(127 - 30 * label) for label in range(4) for _ in range(27))
SATURATING = f"""{HEAD} (float[N,4] scores, float[N,3] topk_scores, int64[N,3] topk_labels)
<int8[4,3,3,3] codes = {{{LARGE}}}, float full = {{255}}, float step = {{0.00390625}}, uint8 zero = {{0}},
 float weight_step = {{0.001}}, int64[1] k = {{3}}>
{{ f = Cast<to = 1>(image) share = Div(f, full) p = Transpose<perm = [0, 3, 1, 2]>(share)
   q = QuantizeLinear(p, step, zero) x = DequantizeLinear(q, step, zero) w = DequantizeLinear(codes, weight_step)
   c = Conv(x, w) means = GlobalAveragePool(c) y = Flatten(means)
   scores = Softmax<axis = 1>(y) topk_scores, topk_labels = TopK(scores, k) }}"""
ROWS = ', '.join(str(127 - 30 * label) for label in range(4) for _ in range(12))
QUERIES = f"""{HEAD} (float[N,4] scores, float[N,3] topk_scores, int64[N,3] topk_labels)
<float[1,12] queries = {{{', '.join(['0.98'] * 12)}}}, int8[4,12] codes = {{{ROWS}}}, float step = {{0.00390625}},
 uint8 zero = {{0}}, float weight_step = {{0.001}}, int64[1] k = {{3}}, int64[1] one = {{1}}>
{{ n = Shape<start = 0, end = 1>(image) r = Concat<axis = 0>(n, one) p = Tile(queries, r)
   q = QuantizeLinear(p, step, zero) x = DequantizeLinear(q, step, zero) rows = DequantizeLinear(codes, weight_step)
   w = Transpose<perm = [1, 0]>(rows) y = MatMul(x, w)
   scores = Softmax<axis = 1>(y) topk_scores, topk_labels = TopK(scores, k) }}"""
CLASSES = ['zero', 'a "one"', 'two, too]', 'three']


@pytest.fixture(scope='module')
def predict(tmp_path_factory):
    """Builds the program; predict(folder, picture, ...) runs it."""
    import openvino.utils

    build = tmp_path_factory.mktemp('build')
    where = f'-DOpenVINO_DIR={openvino.utils.get_cmake_path()}'
    for command in (['cmake', '-S', ROOT / 'examples/cpp', '-B', build, where], ['cmake', '--build', build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def predict(*args, before=(), **variables):
        command = [*before, build / 'predict', *args]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})

    return predict


@pytest.fixture
def folder(tmp_path):
    def write(text, **end2end):
        onnx.save(onnx.parser.parse_model(text), tmp_path / 'end2end.onnx')
        about = dict(file='end2end.onnx', size=[24, 40], any_size=False, channels='RGB', saturating=[])
        resize = dict(width=40, height=24, interpolation='bilinear')
        about['input'] = dict(resize=resize, crop=None, pad=None)
        about.update(end2end)
        parts = dict(model=dict(file='model.onnx', shape=[3, 8, 8], any_size=True))
        text = json.dumps(dict(export_version=2, parts=parts, end2end=about, classes=CLASSES), indent=1)
        (tmp_path / 'export.json').write_text(text + '\n')
        return tmp_path

    return write


@pytest.fixture
def picture(tmp_path):
    """Writes noise in which red, green and blue differ."""

    def write(height=18, width=25):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        pixels[..., 2] //= 3
        Image.fromarray(pixels).save(tmp_path / 'picture.ppm')
        return tmp_path / 'picture.ppm'

    return write


def means_of(path, height, width, channels):
    pixels = np.asarray(Image.open(path).resize((width, height), Image.Resampling.BILINEAR), np.float64)
    return pixels.mean((0, 1))[:: 1 if channels == 'RGB' else -1]


def assert_printed(done, names, numbers, atol):
    """Lines of the form 'name: number % at number, number, ...'."""
    assert done.returncode == 0, done.stderr
    lines = [line.split(': ') for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == names
    found = [[float(word) for word in re.findall(r'-?[0-9.]+', text)] for _, text in lines]
    np.testing.assert_allclose(found, numbers, rtol=0, atol=atol)


@pytest.mark.parametrize('channels', ['RGB', 'BGR'])
@pytest.mark.parametrize(('size', 'off'), [((24, 40), 0.051), ((18, 25), 0.3)])  # OpenVINO scales to within one level
def test_a_classifier(predict, folder, picture, channels, size, off):
    model, path = onnx.parser.parse_model(CLASSIFIER), picture(*size)
    (weight, *_) = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    scores = np.exp(means_of(path, 24, 40, channels) @ weight)
    scores *= 100 / scores.sum()
    best = scores.argsort()[::-1][:3]
    done = predict(folder(CLASSIFIER, channels=channels), path)
    assert_printed(done, [CLASSES[i] for i in best], scores[best, None], off)


@pytest.mark.parametrize(
    ('any_size', 'resize', 'size', 'scales'),
    [
        (False, dict(width=40, height=24), (24, 40), (1.6, 4 / 3)),
        (True, dict(long=40, short=24, round='nearest'), (24, 33), (33 / 25, 4 / 3)),
        (True, dict(short=24, round='down'), (24, 33), (33 / 25, 4 / 3)),
        (True, dict(long=30, short=24, round='down'), (21, 30), (1.2, 21 / 18)),
    ],
)
def test_a_detector_gives_boxes_in_the_picture(predict, folder, picture, any_size, resize, size, scales):
    path = picture()
    scores = 100 * means_of(path, *size, 'RGB') / 255
    boxes = np.array([[0, 0, 5, 7], [3, 4, 11, 13], [1, 2, 3, 4]]) / (scales * 2)
    numbers, names = np.hstack([scores[:, None], boxes]), ['two, too]', 'zero', 'a "one"']
    rule = dict(resize={**resize, 'interpolation': 'bilinear'}, crop=None, pad=None)
    given = folder(DETECTOR, any_size=any_size, input=rule)
    assert scores[2] < 30 < scores[:2].min()
    assert_printed(predict(given, path), names[:2], numbers[:2], 0.8)
    assert_printed(predict(given, path, '0'), names, numbers, 0.8)


@pytest.mark.parametrize('size', [(18, 25), (9, 30)])
def test_a_picture_is_cut_and_filled_up(predict, folder, picture, size):
    """A side that is shorter than the cut stays."""
    path, model = picture(*size), onnx.parser.parse_model(CLASSIFIER)
    (weight, *_) = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    pixels = np.asarray(Image.open(path), np.float64)
    rows, columns = ((side - min(side, to)) / 2 for side, to in zip(size, (10, 15)))
    cut = pixels[round(rows) : round(rows) + 10, round(columns) : round(columns) + 15]
    full = np.pad(cut, [(0, 16 - len(cut)), (0, 1), (0, 0)], constant_values=200)
    scores = np.exp(full.mean((0, 1)) @ weight)
    scores *= 100 / scores.sum()
    best = scores.argsort()[::-1][:3]
    rule = dict(resize=None, crop=dict(width=15, height=10), pad=dict(width=16, height=16, value=200))
    done = predict(folder(CLASSIFIER, any_size=True, input=rule), path)
    assert_printed(done, [CLASSES[i] for i in best], scores[best, None], 0.051)
    done = predict(folder(CLASSIFIER, input=rule), path)
    assert done.stderr == f'error: {path} is 16 x 16 for the graph, which takes 40 x 24\n'
    done = predict(folder(CLASSIFIER, input=dict(refused='its pipeline')), path)
    assert done.stderr == f'error: {path} cannot be made an input: "its pipeline"\n'


@pytest.fixture
def without_vnni(tmp_path):
    """Arguments with which a program sees a CPU without VNNI, and OpenVINO uses one."""
    (tmp_path / 'cpuinfo').write_text('flags: avx2\n')
    before = ['unshare', '-rm', 'sh', '-c', f'mount --bind {tmp_path}/cpuinfo /proc/cpuinfo && exec "$@"', 'sh']
    if subprocess.run([*before, 'true'], capture_output=True).returncode:
        pytest.skip('without the right to mount /proc/cpuinfo stays as it is')
    return dict(before=before, ONEDNN_MAX_CPU_ISA='AVX2')


def test_layers_that_saturate_are_exact_without_vnni(predict, folder, tmp_path, without_vnni):
    (tmp_path / 'picture.ppm').write_bytes(b'P6 40 24 255\n' + bytes([250] * 40 * 24 * 3))
    scores = np.exp(0.001 * 27 * 251 / 256 * (127 - 30 * np.arange(4)))
    best = (100 * scores / scores.sum())[:3, None]
    done = predict(folder(SATURATING, saturating=['x']), tmp_path / 'picture.ppm', **without_vnni)
    assert_printed(done, CLASSES[:3], best, 0.051)
    done = predict(folder(SATURATING), tmp_path / 'picture.ppm', **without_vnni)
    assert done.returncode == 0 and abs(float(re.search(r'[0-9.]+', done.stdout)[0]) - best[0]) > 5, 'it saturates'
    done = predict(folder(SATURATING, saturating=['z']), tmp_path / 'picture.ppm', **without_vnni)
    assert done.stderr == 'error: end2end.onnx has no tensor z\n'


def test_layers_that_read_constants_are_exact_without_vnni(predict, folder, picture, without_vnni):
    """As a decoder reads its learned queries; OpenVINO 2026.4 cannot fold them alone."""
    scores = np.exp(0.001 * 12 * 251 / 256 * (127 - 30 * np.arange(4)))
    done = predict(folder(QUERIES, saturating=['x']), picture(), **without_vnni)
    assert_printed(done, CLASSES[:3], (100 * scores / scores.sum())[:3, None], 0.051)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda f: (f / 'export.json').unlink(), 'error: {f}/export.json cannot be read'),
        (lambda f: (f / 'export.json').write_text('{}\n'), 'error: export.json has no end2end: export the model again'),
        (
            lambda f: (f / 'export.json').write_text('{\n"end2end": {"refused": "soft NMS"},\n"classes": []\n}\n'),
            'error: {f} has no end2end.onnx: "soft NMS"',
        ),
        (lambda f: (f / 'end2end.onnx').unlink(), 'error: {f}/end2end.onnx cannot be read'),
        (lambda f: (f / 'picture.ppm').write_bytes(b'P6 25 18 255\n123'), 'error: {f}/picture.ppm is no binary PPM'),
        (lambda f: (f / 'picture.ppm').unlink(), 'error: {f}/picture.ppm cannot be read'),
    ],
)
def test_bad_input_is_one_line(predict, folder, picture, change, message):
    given, path = folder(CLASSIFIER), picture()
    change(given)
    done = predict(given, path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(message.format(f=given))
