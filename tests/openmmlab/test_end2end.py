"""end2end.onnx of whole models: what it predicts, what it refuses, and the examples that run it."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from PIL import ExifTags, Image

from gdrq_mm.core.errors import UserError
from gdrq_mm.deploy.chain import run_chain
from gdrq_mm.deploy.export import ExportReport
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.openmmlab import end2end
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import use_runtime
from gdrq_mm.openmmlab.deployed import check_pictures
from gdrq_mm.openmmlab.end2end import unlike_model, unlike_model_with_more_boxes, without_partner
from tests.exports import ANY_SIZE
from tests.helpers import ROOT


@pytest.mark.parametrize('backend', RUNTIMES)
def test_end2end_predicts_what_the_parts_do(whole, backend):
    """The parts run in the same runtime, so that all ties fall alike; decoding is the library's, in torch."""
    name, cfg, checkpoint, folder, picture = whole
    parts, end2end = (init_model(cfg, checkpoint, 'cpu') for _ in range(2))
    use_runtime(parts, folder, backend, checkpoint, parts=True)
    use_runtime(end2end, folder, backend, checkpoint)
    end2end.backbone.forward = end2end.extract_feat = None
    larger = np.pad(picture, ((0, 13), (0, 40), (0, 0)))
    for each in (picture, larger) if name in ANY_SIZE else (picture,):
        one, other = infer(end2end, each), infer(parts, each)
        if name == 'cls':
            torch.testing.assert_close(one.pred_score, other.pred_score, atol=1e-4, rtol=0)
            assert one.pred_label == other.pred_label
        elif name == 'seg':
            assert (one.pred_sem_seg.data == other.pred_sem_seg.data).float().mean() > 0.999
        else:
            pairs = [
                (torch.cat([p.bboxes, p.scores[:, None]], 1), p.labels)
                for p in (one.pred_instances, other.pred_instances)
            ]
            assert len(pairs[0][0]) > 20
            assert without_partner(*pairs[0], *pairs[1]) == without_partner(*pairs[1], *pairs[0]) == 0
        if name == 'det':
            masks, others = one.pred_instances.masks, other.pred_instances.masks
            assert masks.shape == others.shape and (masks == others).float().mean() > 0.99


@pytest.mark.parametrize('whole', ['cls', pytest.param('det', marks=pytest.mark.full)], indirect=True)
def test_the_verified_graphs_stay_as_they_are_but_for_names(whole):
    _, _, _, folder, _ = whole
    about = json.loads((folder / 'export.json').read_text())
    graph = onnx.load(folder / about['end2end']['file']).graph
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert len(nodes) == len(graph.node) and len(weights) == len(graph.initializer)
    assert set(about['end2end']['saturating']) <= {name for node in graph.node for name in node.input}
    for number, (name, entry) in enumerate(about['parts'].items()):
        part = onnx.load(folder / entry['file']).graph
        prefix = f'{name}/' if number else ''
        for node in part.node:
            found = nodes[prefix + node.name]
            if not number:
                assert found.SerializeToString() == node.SerializeToString()
            assert (found.op_type, list(found.attribute)) == (node.op_type, list(node.attribute))
        for tensor in part.initializer:
            found = weights[prefix + tensor.name]
            assert (found.data_type, list(found.dims), found.raw_data) == (
                tensor.data_type,
                list(tensor.dims),
                tensor.raw_data,
            )


@pytest.mark.parametrize('whole', ['yolox', pytest.param('seg', marks=pytest.mark.full)], indirect=True)
def test_pictures_that_the_graph_does_not_take_are_refused(whole):
    name, cfg, checkpoint, folder, picture = whole
    entry = json.loads((folder / 'export.json').read_text())['end2end']
    assert entry['any_size'] == (name in ANY_SIZE)
    refused = {
        'takes uint8 pictures, these are float32': picture[None].astype(np.float32),
        'was given a batch of 0 pictures': picture[None][:0],
        r'takes pictures of shape \(N, H, W, 3\), these have \(1, 96, 96, 1\)': picture[None, ..., :1],
    }
    if name == 'seg':
        message = r'takes pictures of 96 x 96, this one is 96 x 64 \(height x width\)'
        refused[message] = picture[None, :, :64]
    for message, pictures in refused.items():
        with pytest.raises(UserError, match=message):
            check_pictures(pictures, entry)
    check_pictures(picture[None], entry)
    if name == 'seg':
        model = init_model(cfg, checkpoint, 'cpu')
        use_runtime(model, folder, 'onnxruntime', checkpoint)
        with pytest.raises(UserError, match=r'end2end\.onnx takes pictures of 96 x 96, this one is '):
            infer(model, picture[:64])


def report_of(folder, about):
    """What an export reported, as far as a chain needs it."""
    return ExportReport(
        [SimpleNamespace(name=n, graph=onnx.load(folder / e['file'])) for n, e in about['parts'].items()]
    )


@pytest.mark.parametrize('whole', ['yolox', pytest.param('det', marks=pytest.mark.full)], indirect=True)
def test_a_picture_without_boxes_is_compared_with_a_lower_threshold(whole, monkeypatch):
    _, cfg, checkpoint, folder, picture = whole
    model = init_model(cfg, checkpoint, 'cpu')
    head = model.roi_head if hasattr(model, 'roi_head') else model.bbox_head
    head.test_cfg.score_thr = 0.9999
    report = report_of(folder, json.loads((folder / 'export.json').read_text()))

    def shifted(*args):
        values = run_chain(*args)
        return {**values, 'dets': values['dets'] + torch.tensor([9.0, 9, 9, 9, 0])}

    values = run_chain(end2end.chain_of(model, report)[0], torch.from_numpy(picture[None]))
    assert not (values['labels'] >= 0).any() and unlike_model(model, values) == ''
    assert unlike_model_with_more_boxes(model, report, values) == ''
    monkeypatch.setattr(end2end, 'run_chain', shifted)
    assert re.match(r'of \d\d boxes in dets \d+ are missing', unlike_model_with_more_boxes(model, report, values))
    assert head.test_cfg.score_thr == 0.9999


@pytest.mark.parametrize('whole', ['yolox'], indirect=True)
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda m: m.bbox_head.test_cfg.update(score_thr=0.5),
            r'test_cfg\.score_thr=0\.01, the config has 0\.5',
        ),
        (lambda m: m.data_preprocessor.mean.add_(1), r'data_preprocessor\.mean.*=.*, the config has'),
    ],
)
def test_a_graph_of_other_settings_is_refused(whole, change, message):
    """Thresholds and the normalization are inside of it."""
    _, cfg, checkpoint, folder, _ = whole
    model = init_model(cfg, checkpoint, 'cpu')
    change(model)
    with pytest.raises(UserError, match=f'end2end.onnx was exported with {message}.*: export the model again, or use'):
        use_runtime(model, folder, 'onnxruntime', checkpoint)
    use_runtime(model, folder, 'onnxruntime', checkpoint, parts=True)


@pytest.mark.parametrize('whole', ['yolox'], indirect=True)
def test_the_tool_draws_what_the_graphs_predict(whole, tmp_path, run):
    _, cfg, checkpoint, folder, picture = whole
    cfg.dump(tmp_path / 'config.py')
    cv2.imwrite(str(tmp_path / 'picture.png'), picture)
    drawn, command = {}, [ROOT / 'tools/infer.py', 'config.py', checkpoint, 'picture.png', '--score-thr', 0.02]
    graphs = ['--backend', 'onnxruntime', '--exported', folder]
    for name, more in {'torch': [], 'end2end': graphs, 'parts': [*graphs, '--parts']}.items():
        done = run(*command, '--out', f'{name}.png', *more)
        assert done.returncode == 0, done.stderr
        drawn[name] = cv2.imread(str(tmp_path / f'{name}.png')).astype(int)
    done = run(*command, '--out', 'without.png', '--score-thr', 2)
    boxes = abs(drawn['torch'] - cv2.imread(str(tmp_path / 'without.png'))).mean()
    for name in ('end2end', 'parts'):
        assert abs(drawn[name] - drawn['torch']).mean() < 0.2 * boxes
    for more, message in (
        (graphs[:2], '--backend and --exported DIR belong together'),
        (['--parts'], '--parts belongs to --backend'),
        ([*graphs, '--device', 'cuda'], '--device cuda: onnxruntime runs on the CPU here'),
    ):
        done = run(*command, '--out', 'bad.png', *more)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


EXAMPLES = dict(cls='classify.py', seg='segment.py', det='detect.py', yolox='detect.py')


def example(name, folder, *args):
    """An example without what only training needs."""
    without = "import sys; sys.modules.update(dict.fromkeys(['torch', 'mmcv', 'mmengine'])); sys.argv = sys.argv[1:];"
    program = f'{without} sys.path.insert(0, {str(ROOT / "examples")!r}); import runpy; runpy.run_path(sys.argv[0])'
    command = [sys.executable, '-c', program, ROOT / 'examples' / name]
    return subprocess.run([*command, folder, *args], capture_output=True, text=True)


def test_the_examples_need_numpy_and_a_runtime_alone(whole, tmp_path):
    name, cfg, checkpoint, folder, picture = whole
    assert len((ROOT / 'examples' / EXAMPLES[name]).read_text().splitlines()) <= 48
    path, result = tmp_path / 'picture.png', tmp_path / 'result.png'
    cv2.imwrite(str(path), picture)
    results = [] if name == 'cls' else [result, '0.0001'] if 'det' in EXAMPLES[name] else [result]
    done = example(EXAMPLES[name], folder, path, *results)
    assert done.returncode == 0, done.stderr
    prediction = infer(init_model(cfg, checkpoint, 'cpu'), picture)
    if name == 'cls':
        best = done.stdout.splitlines()[0]
        assert float(best.split()[-2]) == pytest.approx(100 * float(prediction.pred_score.max()), abs=0.2)
    elif name == 'seg':
        mask = np.asarray(Image.open(result))
        logits = prediction.seg_logits.data
        first, second = logits.topk(2, dim=0).values
        sure = (first - second > 0.05 * logits.std()).numpy()  # an untrained model is not sure of much
        assert sure.any() and (mask == prediction.pred_sem_seg.data[0].numpy())[sure].mean() > 0.97
    else:
        boxes = np.array([line.split(' at ')[1].split(', ') for line in done.stdout.splitlines()], float)
        about = json.loads((folder / 'export.json').read_text())['end2end']
        size = about['size'][::-1]
        pixels = np.asarray(Image.open(path).resize(size, Image.Resampling.BILINEAR))[
            ..., :: 1 if about['channels'] == 'RGB' else -1
        ]
        (dets,), *_ = open_runtime('onnxruntime', folder / about['file'])([pixels[None]])
        expected = dets[dets[:, 4] > 0.0001, :4] * 96 / size[0]
        assert about['any_size'] and len(boxes) == len(expected) > 20 and np.abs(boxes - expected).max() <= 0.51
        assert (np.asarray(Image.open(result)) != picture[..., ::-1]).any()
        done = example(EXAMPLES[name], folder, path, result, '2')
        assert (
            done.returncode == 0 and done.stdout == '' and (np.asarray(Image.open(result)) == picture[..., ::-1]).all()
        )


@pytest.mark.parametrize('whole', ['cls', 'yolox', pytest.param('seg', marks=pytest.mark.full)], indirect=True)
def test_the_examples_turn_a_picture_as_its_camera_says(whole, tmp_path):
    """As OpenCV does, by which the libraries read it."""
    name, _, _, folder, picture = whole
    results = [] if name == 'cls' else [tmp_path / 'result.png', *(['0.0001'] if name == 'yolox' else [])]
    turned, exif = Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter to the right
    Image.fromarray(picture).save(tmp_path / 'as_it_is.png')
    turned.save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(cv2.imread(str(tmp_path / 'turned.png')), cv2.imread(str(tmp_path / 'as_it_is.png')))
    one, other = (
        example(EXAMPLES[name], folder, tmp_path / f'{each}.png', *results) for each in ('as_it_is', 'turned')
    )
    assert one.returncode == 0 and one.stdout and other.stdout == one.stdout


@pytest.mark.parametrize('whole', ['cls', 'yolox', pytest.param('seg', marks=pytest.mark.full)], indirect=True)
def test_the_examples_take_gray_pictures_and_say_what_they_cannot_take(whole, tmp_path):
    name, _, _, folder, picture = whole
    results = [] if name == 'cls' else [tmp_path / 'result.png']
    cv2.imwrite(str(tmp_path / 'gray.png'), picture[..., 0])
    (tmp_path / 'broken.png').write_text('no picture')
    about = json.loads((folder / 'export.json').read_text())
    old, without = (shutil.copytree(folder, tmp_path / kind) for kind in ('old', 'without'))
    (old / 'export.json').write_text(
        json.dumps({k: v for k, v in about.items() if k != 'end2end'} | {'export_version': 1})
    )
    (without / 'export.json').write_text(json.dumps(about | {'end2end': {'refused': 'its nms is soft'}}))
    other = shutil.copytree(folder, tmp_path / 'other')
    (other / 'export.json').write_text(json.dumps(about | {'task': 'pose'}))
    assert example(EXAMPLES[name], folder, tmp_path / 'gray.png', *results).returncode == 0
    for place, file, message in [
        (folder, 'broken.png', 'broken.png cannot be read as a picture'),
        (folder, 'none.png', 'none.png cannot be read as a picture'),
        (old, 'gray.png', ': export the model again'),
        (without, 'gray.png', ': its nms is soft'),
        (other, 'gray.png', ': its task is pose'),
    ]:
        done = example(EXAMPLES[name], place, tmp_path / file, *results)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
