"""Small whole detectors with dense heads."""

import copy

import torch
import torch.nn as nn
from mmengine.config import ConfigDict
from torch.nn.modules.batchnorm import _BatchNorm

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.heads import last_layers
from tests.helpers import ROOT

CHANNELS, CLASSES = 16, len(digits.CLASSES)
BN = dict(type='BN')
RESNET = dict(
    type='ResNet', depth=18, stem_channels=8, base_channels=8, out_indices=(1, 2, 3), zero_init_residual=False
)
FPN = dict(
    type='FPN', in_channels=[16, 32, 64], out_channels=CHANNELS, num_outs=4, add_extra_convs='on_output', norm_cfg=BN
)
SMALL = dict(num_classes=CLASSES, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=2)
STRIDES = [8, 16, 32, 64]
ANCHORS = dict(
    type='AnchorGenerator', ratios=[0.5, 1.0, 2.0], octave_base_scale=4, scales_per_octave=1, strides=STRIDES
)
DELTAS = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
FOCAL = dict(type='FocalLoss', use_sigmoid=True)
TEST_CFG = dict(nms_pre=1000, min_bbox_size=0, score_thr=0.3, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[110] * 3, std=[55] * 3, pad_size_divisor=32)


def detector(kind, head, neck=FPN, **test_cfg):
    return dict(
        type=kind,
        data_preprocessor=PREPROCESSOR,
        backbone=RESNET,
        neck=neck,
        bbox_head=head,
        test_cfg={**TEST_CFG, **test_cfg},
    )


DETECTORS = {
    'RetinaNet': detector(
        'RetinaNet', dict(type='RetinaHead', **SMALL, anchor_generator=ANCHORS, bbox_coder=DELTAS, loss_cls=FOCAL)
    ),
    'FCOS': detector(
        'FCOS',
        dict(
            type='FCOSHead',
            **SMALL,
            strides=STRIDES,
            regress_ranges=((-1, 64), (64, 128), (128, 256), (256, 1e8)),
            norm_on_bbox=True,
            centerness_on_reg=True,
            loss_cls=FOCAL,
            norm_cfg=BN,
        ),
    ),
    'ATSS': detector(
        'ATSS',
        dict(
            type='ATSSHead',
            **SMALL,
            anchor_generator={**ANCHORS, 'ratios': [1.0]},
            bbox_coder=DELTAS,
            loss_cls=FOCAL,
            norm_cfg=dict(type='GN', num_groups=4),
        ),
    ),
    'RTMDet': detector(
        'RTMDet',
        dict(
            type='RTMDetSepBNHead',
            **SMALL,
            share_conv=True,
            pred_kernel_size=1,
            with_objectness=False,
            exp_on_reg=True,
            anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
            bbox_coder=dict(type='DistancePointBBoxCoder'),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
            loss_bbox=dict(type='GIoULoss'),
            norm_cfg=BN,
        ),
    ),
    'YOLOv3': detector(
        'YOLOV3',
        dict(
            type='YOLOV3Head',
            num_classes=CLASSES,
            in_channels=[32, 16, 16],
            out_channels=[32, 16, 16],
            anchor_generator=dict(
                type='YOLOAnchorGenerator',
                base_sizes=[[(60, 50), (40, 60)], [(30, 40), (30, 25)], [(12, 20), (16, 16)]],
                strides=[32, 16, 8],
            ),
            featmap_strides=[32, 16, 8],
        ),
        neck=dict(type='YOLOV3Neck', num_scales=3, in_channels=[64, 32, 16], out_channels=[32, 16, 16]),
        conf_thr=0.2,
    ),
}


def detector_config(name):
    """The config of a detector of DETECTORS, W4A8."""
    cfg = read_config(ROOT / 'configs/det/yolox_nano_gdrq_w4a4_digits.py')
    cfg.model = ConfigDict(copy.deepcopy(DETECTORS[name]))
    cfg.quantization.activation.bits = 8
    return cfg


def calibrated_detector(cfg, pictures, weight=0.05, bias=0.5):
    """A model with random weights that is sure of some boxes and not of others, calibrated with pictures.

    Args:
        weight, bias: how much those of its last layers vary.
    """
    torch.manual_seed(0)
    float_cfg = cfg.copy()
    float_cfg.pop('quantization')
    start = init_model(float_cfg, None, 'cpu')
    for name, module in start.named_modules():
        if isinstance(module, _BatchNorm):  # statistics of the pictures, as a trained model has them
            module.train().momentum = None
        elif isinstance(module, nn.Conv2d) and name in last_layers(start):
            nn.init.normal_(module.weight, std=weight)
            module.bias is None or nn.init.normal_(module.bias, std=bias)
    for picture in pictures:
        infer(start, picture)
    model = init_model(cfg, None, 'cpu')
    model.load_state_dict(start.state_dict())
    calibrate(model, pictures, lambda picture: infer(model, picture), trains_next=False)
    return model.eval()
