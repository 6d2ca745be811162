"""Each full-scale config trains some iterations and tests, on tiny data in the layout of the real one."""

import json
import math
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset

from gdrq_mm.core.modules import quant_layers
from gdrq_mm.openmmlab.models import drop_pretrained
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.configs import FULL_SCALE, bits_in_name, load, name
from tests.runs import At

COCO = os.environ.get('GDRQ_COCO')
"""A folder with COCO 2017, or a part of it, on which the COCO configs are tried too."""
VOC_CLASSES = ('dog', 'car', 'person')
BOX = '<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>'


def picture(path, rng, size=(96, 128)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, 256, (*size, 3), np.uint8))


def imagenet(root, rng):
    for split, number in (('train', 4), ('val', 2)):
        for i in range(number):
            picture(root / 'imagenet' / split / f'{i}.JPEG', rng, (256, 240))
        lines = [f'{i}.JPEG {250 * i + 7}\n' for i in range(number)]
        (root / 'imagenet/meta').mkdir(exist_ok=True)
        (root / 'imagenet/meta' / f'{split}.txt').write_text(''.join(lines))


def coco(root, rng):
    """Boxes of COCO: pictures of noise with a box of each of three classes."""
    categories = [dict(id=number, name=each) for number, each in enumerate(CocoDataset.METAINFO['classes'], 1)]
    (root / 'coco/annotations').mkdir(parents=True)
    for split, number in (('train2017', 4), ('val2017', 2)):
        images = [dict(id=i, file_name=f'{i:012}.jpg', width=128, height=96) for i in range(1, number + 1)]
        boxes = [
            dict(id=3 * i + j, image_id=i, category_id=30 * j + 1, bbox=[10 + j, 12, 50, 58], area=2900, iscrowd=0)
            for i in range(1, number + 1)
            for j in range(3)
        ]
        for image in images:
            picture(root / 'coco' / split / image['file_name'], rng)
        content = dict(images=images, annotations=boxes, categories=categories)
        (root / f'coco/annotations/instances_{split}.json').write_text(json.dumps(content))


def real_coco(root, rng):
    """The first pictures of COCO itself."""
    if COCO is None:
        pytest.skip('the environment variable GDRQ_COCO names no folder with COCO')
    (root / 'coco/annotations').mkdir(parents=True)
    for split, number in (('train2017', 4), ('val2017', 2)):
        (root / 'coco' / split).symlink_to(Path(COCO).resolve() / split)
        everything = json.loads((Path(COCO) / f'annotations/instances_{split}.json').read_text())
        images = everything['images'][:number]
        ids = {image['id'] for image in images}
        boxes = [box for box in everything['annotations'] if box['image_id'] in ids]
        some = {**everything, 'images': images, 'annotations': boxes}
        (root / f'coco/annotations/instances_{split}.json').write_text(json.dumps(some))


def voc(root, rng):
    """Boxes and masks of VOC; the same two pictures in every split."""
    for year in ('VOC2007', 'VOC2012'):
        folder = root / 'VOCdevkit' / year
        for part in ('Main', 'Segmentation'):
            (folder / 'ImageSets' / part).mkdir(parents=True)
        (folder / 'Annotations').mkdir()
        for split in ('train', 'val', 'trainval', 'test', 'aug'):
            for part in ('Main', 'Segmentation'):
                (folder / 'ImageSets' / part / f'{split}.txt').write_text('0001\n0002\n')
        for stem in ('0001', '0002'):
            picture(folder / f'JPEGImages/{stem}.jpg', rng)
            objects = ''.join(
                f'<object><name>{each}</name><difficult>0</difficult>{BOX.format(10, 12, 60 + i, 70)}</object>'
                for i, each in enumerate(VOC_CLASSES)
            )
            size = '<size><width>128</width><height>96</height><depth>3</depth></size>'
            (folder / f'Annotations/{stem}.xml').write_text(f'<annotation>{size}{objects}</annotation>')
            for part in ('SegmentationClass', 'SegmentationClassAug'):
                (folder / part).mkdir(exist_ok=True)
                cv2.imwrite(str(folder / part / f'{stem}.png'), rng.integers(0, 21, (96, 128), np.uint8))


def cityscapes(root, rng):
    for split in ('train', 'val'):
        for i in range(2):
            stem = f'cityscapes/{{}}/{split}/town/town_{i}'
            picture(root / f'{stem.format("leftImg8bit")}_leftImg8bit.png', rng)
            mask = root / f'{stem.format("gtFine")}_gtFine_labelTrainIds.png'
            mask.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(mask), rng.integers(0, 19, (96, 128), np.uint8))


def ade20k(root, rng):
    for split in ('training', 'validation'):
        for i in range(2):
            picture(root / f'ade/ADEChallengeData2016/images/{split}/{i}.jpg', rng)
            mask = root / f'ade/ADEChallengeData2016/annotations/{split}/{i}.png'
            mask.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(mask), rng.integers(0, 151, (96, 128), np.uint8))


def data_of(path):
    """What makes the data of a config."""
    if path.parent.name == 'cls':
        return imagenet
    if '_voc_' in path.name:
        return voc
    if path.parent.name == 'det':
        return coco
    return ade20k if 'ade20k' in path.read_text() else cityscapes


def metrics_of(path):
    """The metrics that its test computes."""
    if path.parent.name == 'cls':
        return {'accuracy/top1', 'accuracy/top5'}
    if path.parent.name == 'seg':
        return {'aAcc', 'mIoU', 'mAcc'}
    if '_voc_' in path.name:
        return {'pascal_voc/mAP', 'pascal_voc/AP50'}
    return {f'coco/bbox_mAP{suffix}' for suffix in ('', '_50', '_75', '_s', '_m', '_l')}


def shrink(cfg):
    """Make all pictures of a config small, at any depth: sizes of resizing, crops and padding."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key in ('scale', 'scales', 'img_scale', 'crop_size', 'size', 'random_size_range') and isinstance(
                value, (list, tuple)
            ):
                cfg[key] = [(96, 128) for _ in value] if isinstance(value[0], (list, tuple)) else (96, 128)
            else:
                shrink(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            shrink(value)


def few_regions(model):
    """Let a two-stage detector look at 64 regions of each picture instead of 1000."""
    if model.get('rpn_head') is not None:
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 64
        model.train_cfg.rcnn.sampler.num = 64


def keep_branches_alive(model):
    """Frozen BN that begins with zeros, without pretrained weights, would keep residual branches at zero."""
    if (model.backbone.get('norm_cfg') or {}).get('requires_grad') is False:
        model.backbone.zero_init_residual = False


MADE = [pytest.param(path, data_of(path), id=name(path)) for path in FULL_SCALE]
REAL = [pytest.param(path, real_coco, id=f'{name(path)}-real') for path in FULL_SCALE if data_of(path) is coco]


@pytest.mark.full
@pytest.mark.parametrize(('path', 'make'), [*MADE, *REAL])
def test_a_full_scale_config_trains_and_tests(path, make, tmp_path, monkeypatch):
    make(tmp_path / 'data', np.random.default_rng(0))
    monkeypatch.chdir(tmp_path)
    cfg = load(path)
    cfg.work_dir, cfg.load_from = str(tmp_path / 'run'), None
    if make is not imagenet:
        for part in (cfg.model, cfg.train_dataloader, cfg.test_dataloader):
            shrink(part)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    drop_pretrained(cfg.model)
    cfg.train_cfg = dict(by_epoch=False, max_iters=2)
    cfg.param_scheduler = []
    cfg.quantization.calibration_batches = 1
    few_regions(cfg.model)
    keep_branches_alive(cfg.model)
    test_cfg = cfg.model.get('test_cfg') or {}
    for part in (test_cfg, test_cfg.get('rcnn', {})):
        if 'score_thr' in part:
            part.score_thr = 0.0  # an untrained model finds nothing, and then there are no metrics
    cfg.log_level = 'ERROR'
    cfg.default_hooks.checkpoint = None  # VGG-16 with its momentum is 1 GB
    runner = QuantRunner.from_cfg(cfg)
    layers = quant_layers(runner.model)
    frozen = {key for key, layer in layers.items() if not layer.weight.requires_grad}
    before = {}

    def keep(runner):  # weights are initialized after the runner was built
        before.update({key: layer.weight.detach().clone() for key, layer in layers.items()})

    runner.register_hook(At(keep, 'before_train'))
    runner.train()
    assert runner.iter == 2
    still = {key for key, layer in layers.items() if torch.equal(layer.weight, before[key])}
    if cfg.model.type == 'DETR':  # its first decoder layer attends to values that are zero before the training
        still = {key for key in still if not key.startswith('decoder.layers.0.self_attn.')}
    assert still == frozen
    assert [key for key, value in runner.model.state_dict().items() if not torch.isfinite(value.float()).all()] == []
    edges = {row.name for row in runner.report.layers if row.note.split(', ')[0] in ('first', 'last')}
    for key, layer in layers.items():
        assert layer.bits == ((8, 8) if key in edges else bits_in_name(path)), key
    metrics = runner.test()
    expected = metrics_of(path)
    assert set(metrics) >= expected
    assert all(math.isfinite(value) for key, value in metrics.items() if key in expected)
