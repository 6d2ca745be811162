"""Decoding for end2end.onnx, head by head: in torch and as a graph it gives what mmdet's own code gives.

The heads have random weights and read random features, so their outputs are any numbers; no network is quantized here.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmdet.models import DetDataPreprocessor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmpretrain.models import ClsDataPreprocessor
from mmseg.models import SegDataPreProcessor
from torch import Tensor

from gdrq_mm.deploy.chain import Step, export_steps, join, run_chain
from gdrq_mm.deploy.flat import Flat
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.openmmlab.decode.boxes import NotCovered, Suppression
from gdrq_mm.openmmlab.decode.dense import Detect, detections_of
from gdrq_mm.openmmlab.decode.ops import TRANSLATIONS, pool_regions, suppress
from gdrq_mm.openmmlab.decode.pictures import Prepare
from gdrq_mm.openmmlab.deployed import to_graph
from gdrq_mm.openmmlab.end2end import without_partner

CHANNELS, CLASSES = 8, 3
NMS = dict(type='nms', iou_threshold=0.5)
TEST_CFG = dict(nms_pre=60, min_bbox_size=0, score_thr=0.3, nms=NMS, max_per_img=50)
ANCHORS = dict(type='AnchorGenerator', ratios=[0.5, 2.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16])
DELTAS = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
LOSS = dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
SOFTMAX = dict(type='CrossEntropyLoss', use_sigmoid=False)
SMALL = dict(num_classes=CLASSES, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=1)
HEADS = {
    'YOLOX': dict(
        type='YOLOXHead',
        **SMALL,
        strides=(8, 16),
        test_cfg=dict(score_thr=0.3, nms=dict(type='nms', iou_threshold=0.6)),
    ),
    'RetinaNet': dict(type='RetinaHead', **SMALL, anchor_generator=ANCHORS, bbox_coder=DELTAS, loss_cls=LOSS),
    'RetinaNet, softmax, one class': dict(
        type='RetinaHead',
        **{**SMALL, 'num_classes': 1},
        anchor_generator=ANCHORS,
        bbox_coder={**DELTAS, 'clip_border': False},
        loss_cls=SOFTMAX,
    ),
    'FCOS': dict(
        type='FCOSHead',
        **SMALL,
        strides=(8, 16),
        regress_ranges=((-1, 64), (64, 1e8)),
        norm_on_bbox=True,
        loss_cls=LOSS,
        norm_cfg=None,
    ),
    'ATSS': dict(
        type='ATSSHead',
        **SMALL,
        anchor_generator={**ANCHORS, 'ratios': [1.0]},
        bbox_coder=DELTAS,
        loss_cls=LOSS,
        norm_cfg=dict(type='GN', num_groups=2),
    ),
    'RTMDet': dict(
        type='RTMDetHead',
        **SMALL,
        anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16]),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        with_objectness=False,
        norm_cfg=dict(type='BN'),
    ),
    'SSD': dict(
        type='SSDHead',
        in_channels=(CHANNELS, CHANNELS),
        num_classes=CLASSES,
        anchor_generator={**ANCHORS, 'scales_per_octave': 2},
        bbox_coder=DELTAS,
        test_cfg={**TEST_CFG, 'nms': dict(type='nms', iou_threshold=0.45, class_agnostic=True)},
    ),
    'YOLOv3': dict(
        type='YOLOV3Head',
        num_classes=CLASSES,
        in_channels=[CHANNELS, CHANNELS],
        out_channels=[CHANNELS, CHANNELS],
        anchor_generator=dict(
            type='YOLOAnchorGenerator', base_sizes=[[(30, 40), (20, 20)], [(10, 13), (16, 30)]], strides=[16, 8]
        ),
        featmap_strides=[16, 8],
        test_cfg={**TEST_CFG, 'conf_thr': 0.2},
    ),
}
STRIDES = {'YOLOv3': (16, 8)}


@pytest.fixture(scope='module', autouse=True)
def registered():
    register_all_modules(init_default_scope=False)


def head_of(name):
    """A head with random weights, in evaluation mode."""
    torch.manual_seed(0)
    options = copy.deepcopy(HEADS[name])
    with torch.no_grad():
        head = MODELS.build({'test_cfg': ConfigDict(copy.deepcopy(TEST_CFG)), **options, '_scope_': 'mmdet'}).eval()
        head.test_cfg = ConfigDict(head.test_cfg)
        if name == 'SSD':  # onedl-mmdetection 3.5.1 asks it for its loss when it predicts
            assert not hasattr(head, 'loss_cls')
            head.loss_cls = None
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.25)
                module.bias is None or nn.init.normal_(module.bias, std=0.3)
    return head


def outputs_of(head, name, pictures, height, width):
    """What it makes of random features of pictures of a size: nested, and flat."""
    torch.manual_seed(height)
    features = [torch.randn(pictures, CHANNELS, height // s, width // s) for s in STRIDES.get(name, (8, 16))]
    flat = Flat(head, lambda head, x: head(features))
    with torch.no_grad():
        outputs = flat(features[0])
    return flat.structure, outputs


def expected_of(head, structure, outputs, height, width):
    """mmdet's own detections of each picture: (K, 5), (K,)."""

    def nested(each):
        return outputs[each] if isinstance(each, int) else [nested(inner) for inner in each]

    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        raw = [[each.clone() for each in level] for level in nested(structure)]  # YOLOv3 changes them in place
        found = head.predict_by_feat(*raw, batch_img_metas=[meta] * len(outputs[0]), rescale=False)
    return [(torch.cat([each.bboxes, each.scores[:, None]], 1), each.labels) for each in found]


def same(found, expected):
    """Whether each detection of each picture has a partner on the other side; there are some."""
    dets, labels = found
    assert len(dets) == len(expected)
    for det, label, (boxes, classes) in zip(dets, labels, expected):
        there = label >= 0
        assert (det[~there] == 0).all() and (det[there, 4] > 0).all()
        assert 5 < len(boxes) == there.sum()
        assert (det[:-1, 4] >= det[1:, 4]).all()
        assert without_partner(boxes, classes, det[there], label[there]) == 0
        assert without_partner(det[there], label[there], boxes, classes) == 0
    return True


@pytest.mark.parametrize('name', HEADS)
def test_a_head_is_decoded_as_mmdet_does(name):
    head = head_of(name)
    structure, outputs = outputs_of(head, name, 2, 64, 96)
    # Pictures are padded in front of the network; boxes are clipped to the pictures.
    found = Detect(head, structure)(torch.zeros(2, 60, 90, 3), *outputs)
    assert same(found, expected_of(head, structure, outputs, 60, 90))
    assert found[0].shape[1] == (found[1] >= 0).sum(1).max()


IN_SHORT = ('YOLOX', 'FCOS')
"""Heads whose graphs are made in the default run too; it takes seconds for each."""


@pytest.mark.parametrize(
    'name', [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.full) for name in HEADS]
)
def test_the_graph_of_a_head_gives_the_same_for_other_pictures(name):
    head = head_of(name)
    structure, outputs = outputs_of(head, name, 2, 64, 96)
    decoder = Detect(head, structure).eval()
    names = [f'y{i}' for i in range(len(outputs))]
    axes = {'image': (0, 1, 2), **dict.fromkeys(names, (0, 2, 3))}
    step = Step('decode', decoder, ['image', *names], ['dets', 'labels'], axes)
    values = dict(zip(step.takes, (torch.zeros(2, 60, 90, 3, dtype=torch.uint8), *outputs)))
    (graph,) = export_steps([step], values, TRANSLATIONS)
    assert {each.domain for each in graph.opset_import} == {''} and not graph.functions
    runtimes = [open_runtime(backend, graph.SerializeToString()) for backend in RUNTIMES]
    for pictures, height, width in ((2, 64, 96), (1, 96, 64)):
        _, outputs = outputs_of(head, name, pictures, height, width)
        given = dict(zip(step.takes, (np.zeros((pictures, height, width, 3), np.uint8), *map(Tensor.numpy, outputs))))
        inputs = [given[value.name] for value in graph.graph.input]
        for runtime in runtimes:
            assert same(map(torch.from_numpy, runtime(inputs)), expected_of(head, structure, outputs, height, width))
        nothing = [np.full_like(each, -50) if each.dtype != np.uint8 else each for each in inputs]
        for runtime in runtimes if getattr(head, 'use_sigmoid_cls', True) else ():  # softmax is always sure
            dets, labels = runtime(nothing)
            assert dets.shape == (pictures, 0, 5) and labels.shape == (pictures, 0)


PREPROCESSORS = [
    ClsDataPreprocessor([120, 110, 100], [60, 50, 40], pad_size_divisor=32, pad_value=2, to_rgb=True),
    DetDataPreprocessor([110.0], [50.0], pad_size_divisor=32, pad_value=3, rgb_to_bgr=True),
    DetDataPreprocessor(bgr_to_rgb=True),
    SegDataPreProcessor([120, 110, 100], [60, 50, 40], pad_val=4, test_cfg=dict(size_divisor=32)),
    SegDataPreProcessor(size_divisor=32),
    SegDataPreProcessor(pad_val=5, test_cfg=dict(size=(96, 64))),
]


@pytest.mark.parametrize('number', range(len(PREPROCESSORS)))
def test_pictures_are_prepared_as_the_library_does(number):
    """By a graph for pictures of any size, and by one for pictures of one size, which the library pads."""
    preprocessor = PREPROCESSORS[number]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 70, 50), np.uint8))
    data = dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=dict(img_shape=(70, 50)))])
    expected = preprocessor(copy.deepcopy(data))['inputs']
    image = to_graph(SimpleNamespace(data_preprocessor=preprocessor), pixels)[None]
    sizes = [list(expected.shape[2:]), None]
    if 'size' in (getattr(preprocessor, 'test_cfg', None) or {}):
        with pytest.raises(NotCovered, match=r'it pads pictures to at least \(96, 64\)'):
            Prepare(preprocessor, sizes.pop())
    for size in sizes:
        assert torch.equal(Prepare(preprocessor, size)(image), expected)


def test_heads_that_decode_in_another_way_are_refused():
    class Own(type(head_of('RetinaNet'))):
        def _bbox_post_process(self, *args, **kwargs):
            raise NotImplementedError

    head = head_of('RetinaNet')
    head.__class__ = Own
    with pytest.raises(NotCovered, match=r'^Own decodes its outputs in a way of its own$'):
        detections_of(head)
    head = head_of('RetinaNet')
    head.bbox_coder = nn.Identity()
    with pytest.raises(NotCovered, match=r'^its boxes are coded by Identity$'):
        detections_of(head)
    head = head_of('RetinaNet')
    head.test_cfg.min_bbox_size = 4
    with pytest.raises(NotCovered, match='its test_cfg has min_bbox_size'):
        detections_of(head)
    for nms, message in (
        (dict(type='soft_nms'), 'nms=soft_nms'),
        (None, 'nms=None'),
        (dict(max_num=3), 'nms has max_num'),
    ):
        with pytest.raises(NotCovered, match=f'its {"test_cfg has " if "=" in message else ""}{message}'):
            Suppression(nms, CLASSES)


@pytest.mark.parametrize('backend', RUNTIMES)
@pytest.mark.parametrize('aligned, ratio', [(True, 0), (False, 2)])
def test_regions_are_pooled_as_mmcv_does(backend, aligned, ratio):
    """Also where a level has no regions, and whatever the memory format of the features is."""
    torch.manual_seed(0)
    features = [torch.randn(2, CHANNELS, 64 // s, 64 // s) for s in (4, 8, 16)]
    low = 40 * torch.rand(10, 2)
    regions = torch.cat([low, low + 20 * torch.rand(10, 2)], 1)
    pictures, levels = torch.arange(10) % 2, torch.tensor([0, 2] * 5)
    module = nn.Module()
    module.forward = lambda regions, pictures, levels, *features: pool_regions(
        list(features), regions, pictures, levels, [4, 8, 16], 7, ratio, aligned
    )
    names = ['regions', 'pictures', 'levels', 'a', 'b', 'c']
    values = dict(zip(names, (regions, pictures, levels, *features)))
    axes = {**dict.fromkeys(names[:3], (0,)), **dict.fromkeys(names[3:], (0, 2, 3))}
    (graph,) = export_steps([Step('pool', module, names, ['out'], axes)], values, TRANSLATIONS)
    for number in (10, 4):
        inputs = [regions[:number], pictures[:number], levels[:number], *features]
        (found,) = open_runtime(backend, graph.SerializeToString())([each.numpy() for each in inputs])
        torch.testing.assert_close(torch.from_numpy(found), module.forward(*inputs), atol=1e-4, rtol=1e-4)
        others = [x.contiguous(memory_format=torch.channels_last) for x in features]
        assert torch.equal(module.forward(*inputs[:3], *others), module.forward(*inputs))


def test_suppression_keeps_classes_apart_and_pictures_too():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]]).repeat(2, 1, 1)
    scores = torch.tensor([[[0.9, 0.8, 0.0], [-1, 0.7, 0.6]], [[0.1, 0.2, 0.3], [-1, -1, -1]]])
    expected = torch.tensor([[[0.9, 0, 0.0], [0, 0.7, 0.6]], [[0.0, 0.2, 0.3], [0, 0, 0]]])
    assert torch.equal(suppress(boxes, scores, 0.5), expected)


def test_the_graphs_of_a_chain_stay_as_they_are_but_for_names():
    """Two graphs that use the same names inside."""
    steps = [
        Step('', nn.Linear(4, 4), ['image'], ['y0'], {'image': (0,)}),
        Step('second', nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ['y0'], ['out'], {'y0': (0,)}),
    ]
    x = torch.randn(3, 4)
    values = run_chain(steps, x)
    graphs = export_steps(steps, values, TRANSLATIONS)
    whole = join(steps, graphs, ['out'])
    first = len(graphs[0].graph.node)
    assert [each.op_type for each in whole.graph.node[:first]] == [each.op_type for each in graphs[0].graph.node]
    weights = [bytes(each.raw_data) for graph in graphs for each in graph.graph.initializer]
    assert [bytes(each.raw_data) for each in whole.graph.initializer] == weights
    (found,) = open_runtime('onnxruntime', whole.SerializeToString())([x.numpy()])
    torch.testing.assert_close(torch.from_numpy(found), values['out'])
