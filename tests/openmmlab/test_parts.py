"""Models that are exported in several parts for their shape: cascades, masks without regions, transformers.

Small ones with random weights: exported, run by a runtime through the library's own prediction, and compared with the
merged model, whose sums are exact.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict

from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.runtime import RUNTIMES
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import export_graphs, use_runtime, write_bundle
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.decode.boxes import NotCovered
from gdrq_mm.openmmlab.end2end import export_end2end, without_partner
from tests.detectors import ANCHORS, BN, DELTAS, FOCAL, PREPROCESSOR, calibrated_detector
from tests.helpers import ROOT

pytestmark = pytest.mark.full
CHANNELS, CLASSES = 8, 4
RESNET = dict(type='ResNet', depth=18, stem_channels=8, base_channels=4, zero_init_residual=False)
FPN = dict(type='FPN', in_channels=[4, 8, 16, 32], out_channels=CHANNELS, num_outs=4, norm_cfg=BN)
STRIDES = [4, 8, 16, 32]
ATTENTION = dict(embed_dims=CHANNELS, num_heads=2, batch_first=True)
FORWARD = dict(embed_dims=CHANNELS, feedforward_channels=16, num_fcs=2, act_cfg=dict(type='ReLU', inplace=True))
SEGMENTS = dict(channels=CHANNELS, num_classes=CLASSES, norm_cfg=BN, align_corners=False)


def regions(size):
    return dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=size, sampling_ratio=0),
        out_channels=CHANNELS,
        featmap_strides=STRIDES,
    )


def box_head(stds, agnostic):
    return dict(
        type='Shared2FCBBoxHead',
        in_channels=CHANNELS,
        fc_out_channels=16,
        roi_feat_size=3,
        num_classes=CLASSES,
        reg_class_agnostic=agnostic,
        bbox_coder={**DELTAS, 'target_stds': stds},
    )


CASCADE = dict(
    num_stages=2,
    stage_loss_weights=[1, 0.5],
    bbox_roi_extractor=regions(3),
    bbox_head=[box_head([0.1, 0.1, 0.2, 0.2], False), box_head([0.05, 0.05, 0.1, 0.1], True)],
    mask_roi_extractor=regions(4),
)
MASKS = dict(num_convs=1, in_channels=CHANNELS, conv_out_channels=CHANNELS, num_classes=CLASSES)


def cascade(kind, **roi_head):
    """A detector of regions in two stages."""
    return dict(
        type=kind,
        data_preprocessor={**PREPROCESSOR, 'pad_mask': True},
        backbone=RESNET,
        neck=FPN,
        rpn_head=dict(
            type='RPNHead',
            in_channels=CHANNELS,
            feat_channels=CHANNELS,
            anchor_generator={**ANCHORS, 'strides': STRIDES},
            bbox_coder=DELTAS,
        ),
        roi_head={**CASCADE, **roi_head},
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=40, nms=dict(type='nms', iou_threshold=0.9), min_bbox_size=0),
            rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.5), max_per_img=50, mask_thr_binary=0.5),
        ),
    )


def without_regions(kind, **head):
    """A model that predicts masks without regions, on a grid of each level."""
    return dict(
        type=kind,
        data_preprocessor={**PREPROCESSOR, 'pad_mask': True},
        backbone=RESNET,
        neck=FPN,
        mask_head=dict(
            num_classes=CLASSES,
            in_channels=CHANNELS,
            feat_channels=CHANNELS,
            stacked_convs=1,
            strides=[8, 8, 16, 16],
            scale_ranges=((1, 96), (48, 192), (96, 384), (192, 768)),
            num_grids=[6, 5, 4, 3],
            norm_cfg=dict(type='GN', num_groups=2),
            loss_cls=FOCAL,
            **head,
        ),
        test_cfg=dict(
            nms_pre=60,
            score_thr=0.3,
            mask_thr=0.5,
            filter_thr=0.05,
            kernel='gaussian',
            sigma=2.0,
            max_per_img=40,
        ),
    )


MODELS = {
    'Cascade Mask R-CNN': cascade('CascadeRCNN', type='CascadeRoIHead', mask_head=dict(type='FCNMaskHead', **MASKS)),
    'HTC': cascade(
        'HybridTaskCascade',
        type='HybridTaskCascadeRoIHead',
        mask_head=[dict(type='HTCMaskHead', with_conv_res=later, **MASKS) for later in (False, True)],
        semantic_roi_extractor={**regions(4), 'featmap_strides': [8]},
        semantic_head=dict(
            type='FusedSemanticHead',
            num_ins=4,
            fusion_level=1,
            seg_scale_factor=1 / 8,
            num_convs=1,
            in_channels=CHANNELS,
            conv_out_channels=CHANNELS,
            num_classes=CLASSES,
        ),
    ),
    'SOLO': without_regions('SOLO', type='SOLOHead'),
    'SOLOv2': without_regions(
        'SOLOv2',
        type='SOLOV2Head',
        mask_feature_head=dict(
            feat_channels=CHANNELS,
            start_level=0,
            end_level=3,
            out_channels=CHANNELS,
            mask_stride=4,
            norm_cfg=dict(type='GN', num_groups=2),
        ),
    ),
    'DETR': dict(
        type='DETR',
        num_queries=12,
        data_preprocessor={**PREPROCESSOR, 'pad_size_divisor': 1},
        backbone={**RESNET, 'out_indices': (3,)},
        neck=dict(
            type='ChannelMapper',
            in_channels=[32],
            kernel_size=1,
            out_channels=CHANNELS,
            act_cfg=None,
            norm_cfg=None,
            num_outs=1,
        ),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=ATTENTION, ffn_cfg=FORWARD)),
        decoder=dict(
            num_layers=2,
            layer_cfg=dict(self_attn_cfg=ATTENTION, cross_attn_cfg=ATTENTION, ffn_cfg=FORWARD),
            return_intermediate=True,
        ),
        positional_encoding=dict(num_feats=CHANNELS // 2, normalize=True),
        bbox_head=dict(
            type='DETRHead',
            num_classes=CLASSES,
            embed_dims=CHANNELS,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
        ),
        test_cfg=dict(max_per_img=12),
    ),
    'OCRNet': dict(
        type='CascadeEncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[110] * 3, std=[55] * 3, size=(64, 64)),
        num_stages=2,
        backbone={**RESNET, 'type': 'ResNetV1c', 'strides': (1, 2, 1, 1), 'dilations': (1, 1, 2, 4)},
        decode_head=[
            dict(type='FCNHead', num_convs=1, concat_input=False, in_channels=16, in_index=2, **SEGMENTS),
            dict(type='OCRHead', in_channels=32, in_index=3, ocr_channels=CHANNELS, **SEGMENTS),
        ],
        test_cfg=dict(mode='whole'),
    ),
}
STAGES = ['proposals', 'bbox_head.0', 'bbox_head.1', 'mask_head.0', 'mask_head.1']
PARTS = {
    'SOLO': ['model'],
    'SOLOv2': ['model'],
    'DETR': ['features', 'encoder', 'decoder', 'bbox_head'],
    'OCRNet': ['model'],
    'Cascade Mask R-CNN': STAGES,
    'HTC': STAGES,
}


NOT_COVERED = {
    'HTC': 'HybridTaskCascadeRoIHead predicts in a way of its own',
    'SOLO': 'SOLO predicts in a way of its own',
    'SOLOv2': 'SOLOv2 predicts in a way of its own',
}
"""Models without end2end.onnx, and why."""
VARIES = {'OCRNet': (2.0, 0.1)}
"""Weights and biases of last layers; by default those of a detector."""
SIZE = 64


def config_of(name):
    """W4A7: with fewer bits one float32 sum at a rounding tie changes most outputs of random weights.

    Sums of 7 bits fit without VNNI too.
    """
    segments = 'decode_head' in MODELS[name]
    cfg = read_config(ROOT / f'configs/{"seg/fcn_r18" if segments else "det/yolox_nano"}_gdrq_w4a4_digits.py')
    cfg.model = ConfigDict(copy.deepcopy(MODELS[name]))
    cfg.quantization.activation.bits = 7
    cfg.quantization.attention = dict(bits=7)
    if not segments:
        cfg.test_dataloader.dataset.pipeline[1].scale = (SIZE, SIZE)
    return cfg


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """Exports a model by its name; once, as it takes a minute."""
    return functools.cache(lambda name: exported_model(name, tmp_path_factory.mktemp('parts')))


@pytest.fixture
def exported(request, exports):
    return exports(request.param)


def exported_model(name, folder):
    """Config, merged model, checkpoint, folder and a picture of an exported model."""
    cfg, picture = config_of(name), np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    model = calibrated_detector(cfg, [picture], *VARIES.get(name, ()))
    checkpoint = str(folder / 'model.pth')
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    merged = merge_model(model, model.plan)
    report = export_graphs(model, merged, lambda: infer(model, picture), lambda part: None)
    assert [part.name for part in report.parts] == PARTS[name]
    if name in NOT_COVERED:
        with pytest.raises(NotCovered, match=NOT_COVERED[name]):
            export_end2end(model, report, lambda: infer(model, picture))
    whole = NOT_COVERED.get(name) or export_end2end(model, report, lambda: infer(model, picture))
    write_bundle(folder / 'exported', model, checkpoint, report, whole)
    return cfg, merged, checkpoint, folder / 'exported', picture


@pytest.mark.parametrize('exported', MODELS, indirect=True)
@pytest.mark.parametrize('backend', RUNTIMES)
@pytest.mark.parametrize('parts', [True, False], ids=['parts', 'end2end'])
def test_a_runtime_predicts_what_the_merged_model_does(exported, parts, backend):
    """Without end2end.onnx it is the parts in both cases."""
    cfg, merged, checkpoint, folder, picture = exported
    deployed = init_model(cfg, checkpoint, 'cpu')
    use_runtime(deployed, folder, backend, checkpoint, parts=parts)
    deployed.backbone.forward = None  # the network itself must not run any more
    found, expected = infer(deployed, picture), infer(merged, picture)
    if 'pred_sem_seg' in expected:
        labels, others = found.pred_sem_seg.data, expected.pred_sem_seg.data
        assert labels.shape == others.shape and (labels == others).float().mean() > 0.99 and len(others.unique()) > 1
        return
    one, other = (
        (torch.cat([each.bboxes, each.scores[:, None]], 1), each.labels)
        for each in (found.pred_instances, expected.pred_instances)
    )
    assert len(other[0]) > 10
    assert without_partner(*one, *other) == without_partner(*other, *one) == 0
    if 'masks' in expected.pred_instances:
        masks, others = found.pred_instances.masks, expected.pred_instances.masks
        assert masks.shape == others.shape and (masks == others).float().mean() > 0.99
        assert 0 < masks.float().mean() < 1


@pytest.mark.parametrize('exported', ['DETR'], indirect=True)
def test_what_is_padding_in_a_batch_is_masked(exported):
    cfg, merged, checkpoint, folder, picture = exported
    deployed = init_model(cfg, checkpoint, 'cpu')
    use_runtime(deployed, folder, 'onnxruntime', checkpoint, parts=True)
    deployed.backbone.forward = None
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    inputs = [pixels, pixels[:, :, : SIZE // 2]]

    def states(model):
        metas = [dict(img_shape=x.shape[1:], ori_shape=x.shape[1:], scale_factor=(1.0, 1.0)) for x in inputs]
        samples = [DetDataSample(metainfo=meta) for meta in metas]
        seen = []
        hook = model.bbox_head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        with torch.no_grad():
            model.test_step(dict(inputs=inputs, data_samples=samples))
        hook.remove()
        return seen[0]

    found, expected = states(deployed), states(merged)
    assert found.shape == expected.shape and expected.std() > 0
    torch.testing.assert_close(found, expected, atol=0.05 * float(expected.abs().max()), rtol=0)
