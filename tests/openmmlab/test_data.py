"""Data sets: what tools/prepare_data.py makes opens with OpenMMLab's own configs, and bad data is named, not traced."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import bccd, camvid, standard
from gdrq_mm.data.checks import check_annotations
from gdrq_mm.openmmlab import data_checks
from gdrq_mm.openmmlab.compat import mend_bases
from tests.damage import cut, put, remove, write
from tests.helpers import ROOT
from tests.runs import tool_function
from tests.tools import PREPARE, TRAIN, holds


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares a data set from the folder `source` below tmp_path, in its default place."""
    monkeypatch.chdir(tmp_path)

    def prepare(name):
        monkeypatch.setattr(sys, 'argv', [str(PREPARE), name, '--source', 'source'])
        tool_function('prepare_data.py')()

    return prepare


# ---- prepare_data: what is made opens -------------------------------------------------------------------------------

XML = """<annotation><size><width>8</width><height>6</height></size>
<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>4</ymax></bndbox></object>
<object><name>{}</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>2</xmax><ymax>5</ymax></bndbox></object></annotation>"""
LABELS = np.full((6, 8), 255, np.uint8)
LABELS[:, :7] = [0, 7, 33, 8, 31, 11, 32]  # Cityscapes' ids


def coco_file(*names):
    images = [dict(id=i, file_name=name, width=8, height=6) for i, name in enumerate(names, 1)]
    box = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 4, 3], area=12, iscrowd=0)
    return dict(images=images, annotations=[box], categories=coco_categories())


def coco_categories():
    from mmdet.datasets import CocoDataset

    return [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], 1)]


def make_voc(source):
    for year, lists in standard.VOC_LISTS.items():
        for name in lists:
            write(source / year / 'ImageSets' / f'{name}.txt', 'one\ntwo\n')
        for name in ('one', 'two'):
            write(source / year / 'JPEGImages' / f'{name}.jpg', 90)
            write(source / year / 'Annotations' / f'{name}.xml', XML.format('dog', 'cat'))
            mask = Image.fromarray(np.full((6, 8), 20, np.uint8), mode='P')
            mask.putpalette(bytes(range(256)) * 3)
            (source / year / 'SegmentationClass').mkdir(exist_ok=True)
            mask.save(source / year / 'SegmentationClass' / f'{name}.png')


def make_coco(source):
    for split in ('train2017', 'val2017'):
        write(source / 'annotations' / f'instances_{split}.json', coco_file('one.jpg', 'two.jpg'))
        for name in ('one', 'two'):
            write(source / split / f'{name}.jpg', 90)


def make_cityscapes(source):
    for split in ('train', 'val'):
        for name in ('ulm/ulm_1', 'bonn/bonn_2'):
            write(source / 'leftImg8bit' / split / f'{name}_leftImg8bit.png', 90)
            write(source / 'gtFine' / split / f'{name}_gtFine_labelIds.png', LABELS)
            write(source / 'gtFine' / split / f'{name}_gtFine_polygons.json', {})


def make_imagenet(source):
    for split in ('train', 'val'):
        for number in range(standard.IMAGENET_CLASSES):
            (source / split / f'n{number:08}').mkdir(parents=True)
            (source / split / f'n{number:08}' / 'x.JPEG').touch()


def make_bccd(source):
    for number, split in enumerate(bccd.SPLITS):
        write(source / 'BCCD/ImageSets/Main' / f'{split}.txt', f'x{number}\n')
        write(source / 'BCCD/Annotations' / f'x{number}.xml', XML.format('Platelets', 'RBC'))
        write(source / 'BCCD/JPEGImages' / f'x{number}.jpg', 90)


def make_camvid(source):
    for split in camvid.SPLITS:
        write(source / 'CamVid' / split / 'x.png', np.full((360, 480, 3), 90, np.uint8))
        write(source / 'CamVid' / f'{split}annot' / 'x.png', np.full((360, 480), 11, np.uint8))


MAKE = dict(
    voc=make_voc,
    coco=make_coco,
    cityscapes=make_cityscapes,
    imagenet=make_imagenet,
    bccd=make_bccd,
    camvid=make_camvid,
)


@pytest.mark.parametrize(
    ('name', 'config', 'counts'),
    [
        ('voc', 'mmdet::_base_/datasets/voc0712.py', (12, 2)),  # both years, three times
        ('voc', 'mmseg::_base_/datasets/pascal_voc12.py', (2, 2)),
        ('coco', 'mmdet::_base_/datasets/coco_detection.py', (1, 2)),  # training leaves out pictures without a box
        ('cityscapes', 'mmseg::_base_/datasets/cityscapes.py', (2, 2)),
        ('imagenet', 'mmpretrain::_base_/datasets/imagenet_bs32.py', (1000, 1000)),
        ('bccd', 'configs/_base_/datasets/bccd.py', (1, 1)),
        ('camvid', 'configs/_base_/datasets/camvid.py', (1, 1)),
    ],
)
def test_prepared_data_opens_with_the_configs_of_openmmlab(tmp_path, prepare, name, config, counts):
    MAKE[name](tmp_path / 'source')
    prepare(name)
    mend_bases()
    base = config if '::' in config else str(ROOT / config)
    (tmp_path / 'leaf.py').write_text(f'_base_ = {base!r}')
    cfg = Config.fromfile(tmp_path / 'leaf.py')
    scope = config.split('::')[0] if '::' in config else {'bccd': 'mmdet', 'camvid': 'mmseg'}[name]
    init_default_scope(scope)
    for loader, count in zip((cfg.train_dataloader, cfg.val_dataloader), counts):
        for part in (loader.dataset, *loader.dataset.get('dataset', {}).get('datasets', [])):
            if 'filter_cfg' in part:  # it drops pictures that are smaller than 32
                part.filter_cfg = dict(filter_empty_gt=True)
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == count
        info = dataset.get_data_info(0)
        assert Path(info['img_path']).is_file()
        if scope == 'mmdet':
            box = [0, 0, 4, 3] if name == 'voc' else [1, 1, 5, 4]
            assert [i['bbox'] for i in info['instances']][:1] == [box]
    if scope == 'mmseg':
        labels = {'voc': [20], 'cityscapes': [0, 1, 2, 16, 17, 18, 255], 'camvid': [11]}[name]
        data_checks.check_dataset(dataset, data_checks.Labels(ignored=frozenset({11, 255})))
        assert np.unique(dataset[0]['data_samples'].gt_sem_seg.data).tolist() == labels


def test_the_train_ids_of_cityscapes(tmp_path, prepare):
    from mmseg.datasets import CityscapesDataset

    make_cityscapes(tmp_path / 'source')
    prepare('cityscapes')
    folder = tmp_path / 'data/cityscapes/gtFine/val/ulm'
    made = cv2.imread(str(folder / 'ulm_1_gtFine_labelTrainIds.png'), cv2.IMREAD_UNCHANGED)
    assert made[0].tolist() == [255, 0, 18, 1, 16, 2, 17, 255]
    links = ['ulm_1_gtFine_labelIds.png', 'ulm_1_gtFine_polygons.json']
    assert sorted(p.name for p in folder.iterdir() if p.is_symlink() and p.exists()) == links
    assert len(standard.CITYSCAPES_CLASSES) == len(CityscapesDataset.METAINFO['classes'])


def test_bccd_has_the_boxes_with_an_area(tmp_path):
    make_bccd(tmp_path)
    content = json.loads((bccd.build(tmp_path, tmp_path / 'out') / 'annotations/test.json').read_text())
    box = dict(id=1, image_id=1, category_id=3, bbox=[1, 1, 4, 3], area=12, iscrowd=0)
    assert content['annotations'] == [box]
    assert content['images'] == [dict(id=1, file_name='x3.jpg', width=8, height=6)]


def test_camvid_is_reduced_or_copied(tmp_path):
    make_camvid(tmp_path / 'source')
    first = camvid.build(tmp_path / 'source', tmp_path / 'first')
    assert cv2.imread(str(first / 'train/x.jpg')).shape == (180, 240, 3)
    for split in camvid.SPLITS:
        shutil.copytree(first / split, tmp_path / 'second/images' / split)
        shutil.copytree(first / 'masks' / split, tmp_path / 'second/masks' / split)
    second = camvid.build(tmp_path / 'second', tmp_path / 'third')
    for path in ('train/x.jpg', 'masks/train/x.png'):
        assert (first / path).read_bytes() == (second / path).read_bytes()


def test_imagenet_with_lists(tmp_path, prepare):
    for split in ('train', 'val'):
        write(tmp_path / 'source' / split / 'x.JPEG.png', 90)
        write(tmp_path / 'source/meta' / f'{split}.txt', 'x.JPEG.png 3\n')
    prepare('imagenet')
    assert (tmp_path / 'data/imagenet/meta/val.txt').read_text() == 'x.JPEG.png 3\n'


def test_one_year_of_voc_is_enough_and_data_in_place_stays(tmp_path, prepare, monkeypatch):
    make_voc(tmp_path / 'source/VOCdevkit')
    shutil.rmtree(tmp_path / 'source/VOCdevkit/VOC2007')
    prepare('voc')
    assert os.listdir(tmp_path / 'data/VOCdevkit') == ['VOC2012']
    before = sorted(tmp_path.rglob('*'))
    assert standard.voc('data/VOCdevkit', 'data/VOCdevkit') == Path('data/VOCdevkit')
    assert sorted(tmp_path.rglob('*')) == before


# ---- prepare_data: what is wrong is named ---------------------------------------------------------------------------


WRONG = [
    ('voc', 'VOC2007/Annotations/two.xml', remove, ['1 path is missing']),
    ('voc', 'VOC2012/SegmentationClass/one.png', remove, ['1 path is missing']),
    ('voc', 'VOC2007/ImageSets/Main/test.txt', remove, []),
    ('coco', 'train2017', remove, []),
    ('coco', 'val2017/two.jpg', remove, ['1 path is missing']),
    ('coco', 'annotations/instances_val2017.json', put('junk'), ['is not JSON']),
    ('cityscapes', 'leftImg8bit/val', remove, ['has no pictures']),
    ('cityscapes', 'gtFine/train/ulm/ulm_1_gtFine_labelIds.png', remove, ['1 path is missing']),
    ('cityscapes', 'gtFine/train/ulm/ulm_1_gtFine_labelIds.png', put(LABELS[:3]), ['(3, 8)', '(6, 8)']),
    ('cityscapes', 'gtFine/val/ulm/ulm_1_gtFine_labelIds.png', put(LABELS // 2), ['127', '0 to 33']),
    ('imagenet', 'val', remove, []),
    ('imagenet', 'train/n00000003', remove, ['train has 999 class folders']),
    ('imagenet', 'train/n00000003/x.JPEG', remove, ['n00000003', '1 class folders']),
    ('imagenet', 'val/n00000003', lambda path: path.rename(path.parent / 'n1'), ['n00000003', 'missing in val']),
    ('bccd', 'BCCD/JPEGImages/x1.jpg', remove, ['1 path is missing']),
    ('bccd', 'BCCD/JPEGImages/x1.jpg', cut, ['damaged']),
    ('bccd', 'BCCD/JPEGImages/x1.jpg', put(np.zeros((8, 6, 3), np.uint8)), ['6x8', '8x6']),
    ('bccd', 'BCCD/Annotations/x1.xml', cut, []),
    ('bccd', 'BCCD/Annotations/x1.xml', put(XML.format('dog', 'RBC')), []),
    ('camvid', 'CamVid/val', remove, []),
    ('camvid', 'CamVid/valannot/x.png', remove, ['1 path is missing']),
    ('camvid', 'CamVid/test/x.png', cut, ['damaged']),
    ('camvid', 'CamVid/testannot/x.png', cut, ['cannot be read']),
    ('camvid', 'CamVid/testannot/x.png', put(np.full((360, 480), 12, np.uint8)), ['labels 12', '0 to 10 and 11']),
]


@pytest.mark.parametrize(('name', 'path', 'damage', 'fragments'), WRONG)
def test_a_source_that_is_not_whole(tmp_path, error_of, name, path, damage, fragments):
    MAKE[name](tmp_path / 'source')
    damage(tmp_path / 'source' / path)
    named = [] if path.endswith(('n00000003', 'x.JPEG')) else [f'source/{path}']
    holds(error_of(PREPARE, name, '--source', 'source', '--out', 'data/out'), *named, *fragments)
    assert not (tmp_path / 'data').exists() or os.listdir(tmp_path / 'data') == []


def test_a_progress_bar_ends_with_an_error(tmp_path):
    """Also while the caller holds it: rich before 14.1 refuses another bar beside one that was left."""
    make_coco(tmp_path)
    put('junk')(tmp_path / 'annotations/instances_val2017.json')
    with pytest.raises(UserError) as held:
        standard.coco(tmp_path, tmp_path / 'out')
    drawing = [each for each in threading.enumerate() if each.__module__.startswith('rich')]
    for thread in drawing:
        thread.join(5)  # it was told to end
    assert held and not any(thread.is_alive() for thread in drawing)


def test_a_source_and_a_place_that_cannot_be_used(tmp_path, error_of):
    holds(error_of(PREPARE, 'coco'), 'coco needs --source PATH', 'train2017')
    for name in MAKE:
        holds(error_of(PREPARE, name, '--source', 'nothing'), '--source nothing is not a folder')
    make_coco(tmp_path / 'source')
    write(tmp_path / 'data/coco/mine', 'mine')
    holds(error_of(PREPARE, 'coco', '--source', 'source'), 'data/coco is there already')
    assert os.listdir(tmp_path / 'data') == ['coco'] and (tmp_path / 'data/coco/mine').is_file()
    holds(error_of(PREPARE, 'coco', '--source', 'source', '--out', 'data/coco/mine/x'), 'data/coco/mine/x')


def test_the_command_that_prepares_missing_data_is_told(tmp_path, error_of):
    """In data sets within data sets too."""
    (tmp_path / 'leaf.py').write_text("_base_ = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'")
    holds(error_of(TRAIN, 'leaf.py'), 'data/VOCdevkit', 'python tools/prepare_data.py voc --source PATH')


def test_a_category_that_is_not_used_may_have_any_name():
    """Exports of Roboflow have the name of the data set as a category of its own."""
    content = coco_file('x.jpg')
    (name, *_) = (each['name'] for each in content['categories'])
    content['categories'] += [dict(id=98, name='cells'), dict(id=99, name='cells')]
    assert check_annotations(content, 'x.json', [name]) == ''
    with pytest.raises(UserError, match="two entries of 'categories' have name='cells'"):
        check_annotations(content, 'x.json', [name, 'cells'])


def test_boxes_that_are_left_out():
    content = coco_file('x.jpg')
    assert check_annotations(content, 'x.json') == ''
    for number, box in enumerate(([1, 1, 0, 3], [1, 1, 3, 0], [8, 0, 2, 2], [0, -3, 4, 3], [7, 5, 2, 2]), 2):
        content['annotations'].append({**content['annotations'][0], 'id': number, 'bbox': box})
    holds(check_annotations(content, 'x.json'), 'x.json: 4 of 6 boxes', 'annotation 2, 3, 4, 5')


def test_a_bad_annotation_of_voc(tmp_path):
    from mmdet.datasets import CocoDataset, VOCDataset

    before = CocoDataset.COCOAPI, VOCDataset.parse_data_info
    make_voc(tmp_path)
    (xml := tmp_path / 'VOC2007/Annotations/two.xml').write_text('<annotation>')
    given = dict(ann_file='VOC2007/ImageSets/Main/test.txt', data_prefix=dict(sub_data_root='VOC2007/'))
    with (
        data_checks.checked_reading(Config(dict(default_scope='mmdet'))),
        pytest.raises(UserError, match=f'{xml} is not an annotation'),
    ):
        VOCDataset(data_root=str(tmp_path), test_mode=True, **given)
    assert (CocoDataset.COCOAPI, VOCDataset.parse_data_info) == before  # checked_reading leaves mmdet as it was
