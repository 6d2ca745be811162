"""Whole models of OpenMMLab configs: exported, packed, tested in a runtime, and what is refused."""

import copy
import importlib.util
import json
import re
import shutil

import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.backbones.darknet import ResBlock

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import file_digest
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.topology import record
from gdrq_mm.deploy import runtime
from gdrq_mm.deploy.merge import IntegerLayer, merge_model
from gdrq_mm.deploy.runtime import RUNTIMES, float_layers, integer_layers, kernels
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import export_graphs, use_runtime
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.parts import parts_of
from tests.deploy.builders import exported, prepared, wrong
from tests.exports import ANY_SIZE, CONFIGS, META, PARTS, calibrated
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('function', ['LeakyReLU', 'Swish'])
def test_convolutions_in_front_of_activation_functions_run_as_integer_kernels_after_a_training_step(function):
    """A stage of YOLOv3's backbone: convolutions with batch normalization, the function, and an addition."""
    options = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type=function))
    stage = [ConvModule(3, 8, 3, padding=1, **options), ResBlock(8, **options), nn.Conv2d(8, 5, 1)]
    model, x = nn.Sequential(*stage), torch.randn(4, 3, 12, 12)
    model.train()(x)
    model, plan = prepared(model.eval(), x, bits=8, deployable=True)
    before = model[1].conv1.conv.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv1.conv.weight, before)
    graph, seen, out = exported(model.eval(), plan, x)
    ran = kernels(graph)
    assert (ran['QLinearConv'], ran['Conv'] + ran['FusedConv']) == (3, 1)  # the last one's output is that of the model
    assert {'0.bn.output_quant', '1.conv1.bn.output_quant', '1.conv2.bn.output_quant'} < {name for name, _ in seen}
    assert wrong(graph, seen, x, out) == dict.fromkeys(RUNTIMES)


EIGHT = 'quantization.activation.bits=8'


def agreement(one, other):
    """Share of values that agree; boxes are looked for, as those with nearly equal scores may change places."""
    if one.shape[-1] == 4:
        distance = (one[:, None] - other[None]).abs().amax(-1).amin(0)
        return float((distance < 2).float().mean())
    return float(torch.isclose(one, other, atol=2e-2 * float(other.abs().max()), rtol=0).float().mean())


def values_of(prediction):
    """The numbers of a prediction."""
    if 'pred_instances' in prediction:
        return [prediction.pred_instances.bboxes, prediction.pred_instances.scores]
    return [prediction.seg_logits.data] if 'seg_logits' in prediction else [prediction.pred_score]


def test_rounded_biases_do_not_stop_the_export_of_a_model_with_float_ones():
    """Kernels of ONNX Runtime round them; deployable=True does so in training."""
    cfg = read_config(ROOT / 'configs' / CONFIGS['cls'])
    cfg.quantization.deployable = False
    cfg.quantization.weight.bits = cfg.quantization.activation.bits = 8
    cfg.quantization.weight.gdrq = dict(k=20.0)  # coarse weights, so that a unit of the sums is large
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    model = calibrated(cfg, picture, bias=1.0)
    plan = record(model, lambda: infer(model, picture))
    report = export_graphs(model, merge_model(model, plan), lambda: infer(model, picture), lambda part: None)
    ends = list(report.ends('onnxruntime'))
    assert sum(piece.differing for piece in ends) > 1e-4 * sum(piece.values for piece in ends) + 1


@pytest.mark.parametrize('backend', RUNTIMES)
def test_a_runtime_predicts_what_torch_does(whole, backend):
    _, cfg, checkpoint, folder, picture = whole
    model = init_model(cfg, checkpoint, 'cpu')
    expected = values_of(infer(model, picture))
    use_runtime(model, folder, backend, checkpoint, parts=True)
    # The network itself must not run any more.
    model.backbone.forward = None
    for one, other in zip(values_of(infer(model, picture)), expected, strict=True):
        assert one.shape == other.shape and one.numel()
        assert agreement(one, other) > 0.9


@pytest.mark.parametrize('whole', ['yolox', pytest.param('det', marks=pytest.mark.full)], indirect=True)
@pytest.mark.parametrize('backend', RUNTIMES)
def test_a_detector_takes_pictures_of_other_sizes(whole, backend):
    """Raw outputs are compared: which boxes of a detector that has not been trained survive NMS is chance."""
    _, cfg, checkpoint, folder, _ = whole
    model, deployed = (init_model(cfg, checkpoint, 'cpu') for _ in range(2))
    (part, *_) = parts_of(model, 'det')
    use_runtime(deployed, folder, backend, checkpoint, parts=True)
    for size in ((96, 160), (160, 96)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected, found = part.module(x), parts_of(deployed, 'det')[0].module(x)
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected):
            assert one.shape == other.shape
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98
    height, width = (infer(deployed, np.zeros(shape, np.uint8)).img_shape for shape in ((96, 144, 3), (144, 96, 3)))
    assert height != width


@pytest.mark.full
@pytest.mark.parametrize('whole', ['det'], indirect=True)
@pytest.mark.parametrize('backend', RUNTIMES)
def test_the_heads_of_a_two_stage_detector_take_any_number_of_regions(whole, backend):
    _, cfg, checkpoint, folder, picture = whole
    model, deployed = (init_model(cfg, checkpoint, 'cpu') for _ in range(2))
    use_runtime(deployed, folder, backend, checkpoint, parts=True)
    for name, size in (('bbox_head', 7), ('mask_head', 14)):
        head, graph = (m.roi_head.get_submodule(name) for m in (model, deployed))
        for number in (1, 5):
            x = 3 * torch.randn(number, 64, size, size)
            with torch.no_grad():
                expected, found = head(x), graph(x)
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape
                assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98
    masks = infer(deployed, picture).pred_instances.masks
    assert len(masks) > 100 and masks.shape[1:] == picture.shape[:2] and 0 < masks.float().mean() < 1


@pytest.mark.parametrize('whole', ['seg'], indirect=True)
def test_a_picture_of_another_size_than_a_fixed_one_is_refused(whole):
    _, cfg, checkpoint, folder, _ = whole
    model = init_model(cfg, checkpoint, 'cpu')
    use_runtime(model, folder, 'onnxruntime', checkpoint, parts=True)
    with pytest.raises(UserError, match='model was exported for inputs of 3 x 96 x 96, this one is 3 x 96 x 128'):
        model.extract_feat(torch.zeros(1, 3, 96, 128))


def test_export_json_says_what_a_program_needs(whole):
    name, _, _, folder, _ = whole
    about = json.loads((folder / 'export.json').read_text())
    assert about['task'] == {'yolox': 'det'}.get(name, name) and len(about['mean']) == len(about['std']) == 3
    for part, entry in about['parts'].items():
        model = onnx.load(folder / entry['file'])
        onnx.checker.check_model(model, full_check=True)
        assert {opset.domain for opset in model.opset_import} == {''}, 'standard operators only'
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert entry['any_size'] == (part in ANY_SIZE.get(name, ())) and part in PARTS[name]
        assert shape == ([0, entry['shape'][0], 0, 0] if entry['any_size'] else [0, *entry['shape']])


@pytest.mark.parametrize('whole', ['yolox'], indirect=True)
def test_all_convolutions_of_yolox_but_those_of_its_outputs_are_integer_kernels(whole):
    _, _, _, folder, _ = whole
    graph = onnx.load(folder / 'model.onnx')
    outputs = [f'bbox_head.multi_level_conv_{kind}.{level}' for level in range(3) for kind in ('cls', 'reg', 'obj')]
    assert integer_layers(graph) == (83 - len(outputs), 83)
    assert sorted(float_layers(graph)) == sorted(outputs)


def test_a_packed_file_predicts_what_torch_does(whole):
    _, cfg, checkpoint, folder, picture = whole
    model = init_model(cfg, folder.parent / 'model.safetensors', 'cpu')
    assert model.dataset_meta == META
    assert all(name.startswith('auxiliary_head') for name in quant_layers(model))
    assert sum(isinstance(m, IntegerLayer) for m in model.modules()) > 5
    expected = values_of(infer(init_model(cfg, checkpoint, 'cpu'), picture))
    for one, other in zip(values_of(infer(model, picture)), expected, strict=True):
        assert one.shape == other.shape and one.numel()
        assert agreement(one, other) > 0.9


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
@pytest.mark.parametrize(
    'options, message',
    [
        (
            {'quantization.weight.bits': 3},
            r'^packed file .* has W4A8 in layer backbone.layer1.0.conv1, .* W3A8',
        ),
        ({'model.backbone.depth': 34}, r'^packed file .* does not fit the model: '),
        ({'model.backbone.depth': 50}, r'^packed file .* does not fit the model: |is that of another model: '),
        ({'model.head.num_classes': 7}, r'^packed file .* does not fit the model: size mismatch for head.fc'),
    ],
)
def test_a_packed_file_of_another_model_is_refused(whole, options, message):
    _, cfg, _, folder, _ = whole
    with pytest.raises(UserError, match=message):
        init_model(cfg, folder.parent / 'model.safetensors', 'cpu', options)


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
def test_a_packed_file_with_a_float_config_is_refused(whole):
    _, cfg, _, folder, _ = whole
    cfg = copy.deepcopy(cfg)
    cfg.pop('quantization')
    with pytest.raises(UserError, match='holds a quantized model, the config has no quantization'):
        init_model(cfg, folder.parent / 'model.safetensors', 'cpu')


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
def test_bundles_that_do_not_fit_are_refused(whole, tmp_path, monkeypatch):
    _, cfg, checkpoint, folder, _ = whole
    model = init_model(cfg, checkpoint, 'cpu')

    def refused(message, folder, checkpoint=checkpoint, backend='onnxruntime'):
        with pytest.raises(UserError, match=message):
            use_runtime(model, folder, backend, checkpoint)

    refused('export.json cannot be read: No such file', tmp_path)
    refused('backend tensorrt is not one of onnxruntime, openvino', folder, backend='tensorrt')
    other = tmp_path / 'other.pth'
    torch.save(dict(state_dict=model.state_dict(), meta={'x': 1}), other)
    refused('was exported from another checkpoint', folder, str(other))
    shutil.copytree(folder, tmp_path / 'edited')
    graph = onnx.load(tmp_path / 'edited/model.onnx')
    graph.doc_string = 'edited by hand'
    onnx.save(graph, tmp_path / 'edited/model.onnx')
    refused('^[^ ]*model.onnx was changed after its export', tmp_path / 'edited')
    about = json.loads((folder / 'export.json').read_text())
    (tmp_path / 'edited/model.onnx').unlink()
    refused('^[^ ]*model.onnx is missing', tmp_path / 'edited')
    shutil.copy(folder / 'model.onnx', tmp_path / 'edited/model.onnx')
    deep = '[' * 100_000 + ']' * 100_000
    for change in (
        dict(file='..', sha256=None),
        dict(file='../model.onnx'),
        dict(structure='x'),
        dict(structure='DEEP'),
    ):
        parts = {'model': {**about['parts']['model'], **change}}
        text = json.dumps({**about, 'parts': parts}).replace('"DEEP"', deep)
        (tmp_path / 'edited/export.json').write_text(text)
        refused('export.json is damaged', tmp_path / 'edited')
    for key in ('task', 'end2end'):
        (tmp_path / 'edited/export.json').write_text(json.dumps({k: v for k, v in about.items() if k != key}))
        refused('export.json is damaged: KeyError', tmp_path / 'edited')
    (tmp_path / 'edited/export.json').write_text('{"export_version": 2, "task": "cls", "parts": 3}')
    refused('export.json is damaged', tmp_path / 'edited')
    (tmp_path / 'edited/export.json').write_text('{"export_version": 1, "task": "cls", "parts": {}}')
    refused('has version 1, this is 2: export the model again', tmp_path / 'edited')
    graph.graph.node[0].op_type = 'OfALaterOpset'
    onnx.save(graph, tmp_path / 'edited/model.onnx')
    parts = {'model': {**about['parts']['model'], 'sha256': file_digest(tmp_path / 'edited/model.onnx')}}
    (tmp_path / 'edited/export.json').write_text(json.dumps({**about, 'parts': parts, 'end2end': dict(refused='')}))
    refused(r'^onnxruntime cannot load [^ ]*model\.onnx: ', tmp_path / 'edited')
    found = importlib.util.find_spec
    monkeypatch.setattr(runtime.importlib.util, 'find_spec', lambda name: None if name == 'openvino' else found(name))
    refused(r"openvino is not installed: uv pip install 'gdrq-mm\[deploy\]'", folder, backend='openvino')


REASONS = {
    'no head': ('cls', {}, 'a classifier with extract_feat and a head is expected'),
    'YOLACT': ('det', dict(bbox_head=1, mask_head=1), 'its mask_head reads what its bbox_head has found'),
    'Fast R-CNN': ('det', dict(roi_head=1), 'it has no rpn_head: its proposals come from elsewhere'),
    'no box head': ('det', dict(roi_head=1, rpn_head=1), 'it has no box head'),
    'PointRend': ('seg', dict(decode_head=2), 'Identity, a later head of its cascade, predicts in a way of its own'),
    'no decode head': ('seg', {}, 'it has no decode_head'),
    'anything': ('det', {}, 'it has no bbox_head'),
}


@pytest.mark.parametrize('kind', REASONS)
def test_a_model_that_has_no_such_parts_is_refused_for_what_it_has(kind):
    class Odd(nn.Module):
        pass

    task, parts, reason = REASONS[kind]
    model = Odd()
    for name, number in parts.items():
        model.add_module(name, nn.Identity() if number == 1 else nn.ModuleList([nn.Identity()] * number))
    with pytest.raises(UserError, match=f'Odd cannot be exported: {reason}'):
        parts_of(model, task)


def test_a_head_that_reads_more_than_features_is_refused():
    """As those of Double Heads, Sparse R-CNN and Mask2Former."""

    class Queries(nn.Module):
        def forward(self, features, queries, mask=None):
            return features

    class Unused(nn.Module):
        """Its predict() does all."""

    one = nn.Identity()
    for kind, task, heads in (
        (Queries, 'seg', lambda head: dict(decode_head=head)),
        (Queries, 'cls', lambda head: dict(head=head, extract_feat=one)),
        (Queries, 'det', lambda head: dict(bbox_head=head)),
        (Queries, 'det', lambda head: dict(rpn_head=one, roi_head=nn.ModuleDict(dict(bbox_head=head)))),
        (Queries, 'det', lambda head: dict(rpn_head=one, roi_head=nn.ModuleDict(dict(bbox_head=one, mask_head=head)))),
        (Unused, 'det', lambda head: dict(rpn_head=head, roi_head=nn.ModuleDict(dict(bbox_head=one)))),
    ):
        model = nn.ModuleDict(heads(kind()))
        with pytest.raises(UserError, match=f'^ModuleDict cannot be exported: {kind.__name__} does not read features'):
            parts_of(model, task)


def test_a_transformer_other_than_detr_is_refused():
    cfg = read_config(ROOT / 'configs/det/deformable_detr_gdrq_w4a4.py')
    small = dict(depth=18, base_channels=8, init_cfg=None)
    layers = {'model.encoder.num_layers': 1, 'model.decoder.num_layers': 1, 'model.num_queries': 2}
    cfg.merge_from_dict({'model.backbone': small, 'model.neck.in_channels': [16, 32, 64], **layers})
    cfg.pop('quantization')
    with pytest.raises(UserError, match=r'^DeformableDETR cannot be exported: it runs its encoder and decoder in'):
        parts_of(init_model(cfg, None, 'cpu'), 'det')


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
def test_the_tool_writes_the_packed_file_of_a_checkpoint(whole, tmp_path, digits_root, run):
    _, cfg, checkpoint, _, picture = whole
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits_root)
    saved = torch.load(checkpoint)
    for value in saved['state_dict'].values():
        if value.dim() == 4:  # most weights near 0, as training leaves them: new ones use all codes alike
            value.mul_((value / value.std()).square())
    checkpoint = str(tmp_path / 'peaked.pth')
    torch.save(saved, checkpoint)
    options = '--format', 'packed', '--compress', '--out', 'out[w4a8]', '--cfg-options', EIGHT
    done = run(ROOT / 'tools/export.py', ROOT / 'configs' / CONFIGS['cls'], checkpoint, *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r'^out\[w4a8]/model.safetensors: .* 21 layers as integers$', done.stdout, re.MULTILINE)
    saved = [float(share) for share in re.findall(r'([\d.]+)% less', done.stdout)]
    assert len(saved) == 2 and saved[0] > saved[1] > 10, 'by the entropy, and by compression'
    expected = infer(init_model(cfg, checkpoint, 'cpu'), picture).pred_score
    found = infer(init_model(cfg, tmp_path / 'out[w4a8]/model.safetensors', 'cpu'), picture).pred_score
    assert agreement(found, expected) > 0.9


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
def test_the_tool_says_that_weights_of_2_bits_take_4_in_onnx(whole, tmp_path, digits_root, run):
    """The table of layers counts them at 2, as the packed file holds them."""
    cfg, two = copy.deepcopy(whole[1]), 'quantization.weight.bits=2'
    cfg.quantization.weight.bits = 2
    torch.save(dict(state_dict=calibrated(cfg, whole[4]).state_dict(), meta={}), tmp_path / 'two.pth')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits_root)
    config = ROOT / 'configs' / CONFIGS['cls']
    done = run(ROOT / 'tools/export.py', config, 'two.pth', '--out', 'exported', '--cfg-options', EIGHT, two)
    assert done.returncode == 0, done.stderr
    assert '19 layers have weights of less than 4 bits, which take 4 in ONNX; --format packed' in done.stdout


@pytest.mark.parametrize('whole', ['cls'], indirect=True)
def test_the_tools_export_and_test_in_a_runtime(whole, tmp_path, digits_root, run):
    """As a user runs them: export, test in both runtimes, and what goes wrong."""
    _, _, checkpoint, _, _ = whole
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits_root)
    config = ROOT / 'configs' / CONFIGS['cls']

    def tool(name, *args):
        return run(ROOT / 'tools' / name, config, checkpoint, *args, '--cfg-options', EIGHT)

    done = tool('export.py', '--out', 'exported')
    assert done.returncode == 0, done.stderr
    assert '21 of 21 layers as integer kernels' in done.stdout
    assert re.search(r': (0 of \d+ codes differ$|\d+ of \d+ codes differ, by the rounding of ties)', done.stdout, re.M)
    assert 'less than 4 bits' not in done.stdout
    assert 'pictures (N, H, W, 3) of 32 x 32 -> scores, topk_scores, topk_labels' in done.stdout
    codes, outputs = done.stdout.split('model: outputs')
    assert 'y0' not in codes and 'whole graph: y0' in outputs and 'largest relative difference' in outputs
    (tmp_path / 'taken').touch()
    accuracy = []
    graphs = [('--backend', name, '--exported', 'exported') for name in RUNTIMES]
    for options in ((), *graphs, (*graphs[0], '--parts')):
        done = tool('test.py', '--work-dir', 'tested', *options)
        assert done.returncode == 0, done.stderr
        name = '_'.join(['record', *options[1:2], *(['parts'] if '--parts' in options else [])])
        found = json.loads((tmp_path / f'tested/{name}.json').read_text())
        assert found['model']['backend'] == (options[1] if options else 'torch')
        assert found['model'].get('parts', False) == ('--parts' in options)
        accuracy.append(found['metrics']['accuracy/top1'])
    assert len(set(accuracy)) == 1
    for name, args, message in [
        ('export.py', ('--out', 'exported'), '--out exported exists'),
        ('export.py', ('--out', 'taken/exported'), '--out: the folder taken cannot be written'),
        ('test.py', ('--backend', 'openvino'), '--backend and --exported DIR belong together'),
        ('test.py', ('--parts',), '--parts belongs to --backend and --exported DIR'),
        ('test.py', ('--backend', 'openvino', '--exported', 'none'), 'none/export.json cannot be read'),
    ]:
        done = tool(name, *args)
        assert done.returncode and done.stderr.startswith('error: ') and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
