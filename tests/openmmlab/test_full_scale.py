"""Each full-scale config trains some iterations and tests, on tiny data in the layout of the real one."""

import json
import math

import cv2
import numpy as np
import pytest
import torch

from gdrq_mm.core.modules import quant_layers
from gdrq_mm.openmmlab.models import drop_pretrained
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ROOT
from tests.openmmlab.test_configs import FULL_SCALE, bits_in_name, load, name
from tests.runs import At

COCO = ROOT.parent / 'shared/data/coco_mini'
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
    if not COCO.is_dir():
        pytest.skip(f'{COCO} is not there')
    (root / 'coco/annotations').mkdir(parents=True)
    for split, number in (('train', 4), ('val', 2)):
        (root / f'coco/{split}2017').symlink_to(COCO / f'{split}2017')
        everything = json.loads((COCO / f'annotations/instances_{split}2017.json').read_text())
        images = everything['images'][:number]
        ids = {image['id'] for image in images}
        boxes = [box for box in everything['annotations'] if box['image_id'] in ids]
        some = {**everything, 'images': images, 'annotations': boxes}
        (root / f'coco/annotations/instances_{split}2017.json').write_text(json.dumps(some))


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


def data_of(path):
    """What makes the data of a config, and the metrics to expect."""
    if path.parent.name == 'cls':
        return imagenet, {'accuracy/top1', 'accuracy/top5'}
    if '_voc_' in path.name:
        return voc, {'pascal_voc/mAP', 'pascal_voc/AP50'} if path.parent.name == 'det' else {'aAcc', 'mIoU', 'mAcc'}
    if path.parent.name == 'det':
        return coco, {f'coco/bbox_mAP{suffix}' for suffix in ('', '_50', '_75', '_s', '_m', '_l')}
    return cityscapes, {'aAcc', 'mIoU', 'mAcc'}


def shrink(cfg):
    """Make all pictures of a config small, at any depth: sizes of resizing, crops and padding."""
    if isinstance(cfg, dict):
        for key, value in cfg.items():
            if key in ('scale', 'img_scale', 'crop_size', 'size', 'random_size_range') and isinstance(
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


@pytest.mark.parametrize('path', FULL_SCALE, ids=name)
def test_a_full_scale_config_trains_and_tests(path, tmp_path, monkeypatch):
    make, expected = data_of(path)
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
    assert {key for key, layer in layers.items() if torch.equal(layer.weight, before[key])} == frozen
    assert [key for key, value in runner.model.state_dict().items() if not torch.isfinite(value.float()).all()] == []
    edges = {row.name for row in runner.report.layers if row.note.split(', ')[0] in ('first', 'last')}
    for key, layer in layers.items():
        assert layer.bits == ((8, 8) if key in edges else bits_in_name(path)), key
    metrics = runner.test()
    assert set(metrics) >= expected
    assert all(math.isfinite(value) for key, value in metrics.items() if key in expected)
