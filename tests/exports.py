"""Whole models that are exported once, for several test files."""

import numpy as np
import torch

from benchmarks.shared import calibrated
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.packed import write_packed
from gdrq_mm.openmmlab.apis import infer
from gdrq_mm.openmmlab.bundle import export_graphs, write_bundle
from gdrq_mm.openmmlab.cli import read_config
from tests.helpers import ROOT

CONFIGS = dict(
    cls='cls/resnet18_width16_gdrq_w4a4_digits.py',
    seg='seg/pspnet_r18_gdrq_w4a4_digits.py',
    det='det/faster_rcnn_r18_gdrq_w4a4_digits.py',
    yolox='det/yolox_nano_gdrq_w4a4_digits.py',
)


LONGER = ('seg', 'det')
"""Those that take longer: a minute each."""


ANY_SIZE = dict(det=['proposals'], yolox=['model'])  # PSPNet pools to grids whose cells depend on the size


PARTS = dict(cls=['model'], seg=['model'], det=['proposals', 'bbox_head', 'mask_head'], yolox=['model'])


MASKS = dict(
    mask_roi_extractor=dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
        out_channels=64,
        featmap_strides=[4, 8, 16, 32],
    ),
    mask_head=dict(
        type='FCNMaskHead',
        num_convs=1,
        in_channels=64,
        conv_out_channels=8,
        num_classes=10,
        loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
    ),
)


META = dict(classes=['a', 'b'], palette=[(1, 2, 3), (4, 5, 6)])


def export_whole(name, folder):
    """Export a model of CONFIGS, calibrated, not trained.

    Returns:
        Its name, config, path of a checkpoint, folder of the export, and the picture that it was calibrated with.
    """
    from gdrq_mm.openmmlab.end2end import export_end2end  # torch before 2.4 has not what it needs

    cfg = read_config(ROOT / 'configs' / CONFIGS[name])
    # A float32 sum may fall on the other side of a tie, which depends on the processor. With 4 bits one such code
    # changes most outputs of a model that has not been trained; with 8 it hardly moves them.
    cfg.quantization.activation.bits = 8
    if name == 'det':  # which boxes survive NMS is chance too: all do
        cfg.merge_from_dict(
            {'model.type': 'MaskRCNN', 'model.roi_head': MASKS, 'model.test_cfg.rcnn.mask_thr_binary': 0.5}
        )
        test_cfg = cfg.model.test_cfg
        test_cfg.rpn.nms.iou_threshold = test_cfg.rcnn.nms.iou_threshold = 1.0
        test_cfg.rcnn.score_thr, test_cfg.rpn.max_per_img, test_cfg.rcnn.max_per_img = 0.0, 100, 1000
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3) if name == 'cls' else (96, 96, 3), np.uint8)
    model = calibrated(cfg, picture)
    checkpoint = str(folder / 'model.pth')
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    plan = record(model, lambda: infer(model, picture))
    write_packed(merge_model(model, plan), folder / 'model.safetensors', cfg.pretty_text, META)
    reported = []
    report = export_graphs(model, merge_model(model, plan), lambda: infer(model, picture), reported.append)
    end2end = export_end2end(model, report, lambda: infer(model, picture))
    write_bundle(folder / 'exported', model, checkpoint, report, end2end)
    assert reported == report.parts and [part.name for part in reported] == PARTS[name]
    return name, cfg, checkpoint, folder / 'exported', picture
