"""Training and testing on bad data: one line names the file, before training where that is cheap."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.registry import DATASETS, init_default_scope

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import digits
from gdrq_mm.openmmlab import data_checks
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.damage import cut, edit, put, remove
from tests.helpers import ROOT
from tests.tools import TEST, TRAIN, holds

CONFIGS = dict(
    cls='cls/resnet18_width16_digits.py', det='det/faster_rcnn_r18_digits.py', seg='seg/fcn_r18_digits.py'
)  # float: the data is the same


@pytest.fixture
def digits_copy(tmp_path, digits_root):
    """A copy of the small digits that may be damaged."""
    return Path(shutil.copytree(digits_root, tmp_path / 'data/digits'))


def boxes(change):
    return edit(lambda content: content['annotations'][0].update(change))


def only(key, change):
    return edit(lambda content: content.update({key: change(content[key])}))


COCO = 'scenes/annotations/train.json'
BAD = [
    ('det', COCO, put('{"images": ['), ['is not JSON']),
    ('det', COCO, lambda path: path.write_text('[1]'), ['is a list, not a COCO dict']),
    ('det', COCO, lambda path: (path.unlink(), path.mkdir()), ['the data set cannot be read', 'Is a directory']),
    ('det', COCO, edit(lambda content: content.pop('images')), ["no list 'images'"]),
    ('det', COCO, edit(lambda content: content.pop('annotations')), ['no annotations']),
    ('det', COCO, edit(lambda content: content['annotations'][1].pop('bbox')), ["entry 1 of 'annotations' lacks bbox"]),
    ('det', COCO, boxes(dict(image_id=99)), ['annotation 1 is of image 99']),
    ('det', COCO, boxes(dict(category_id=99)), ['annotation 1 is of category 99']),
    ('det', COCO, boxes(dict(bbox=[5, 5, -3, 4])), ['annotation 1 has bbox=[5, 5, -3, 4]']),
    ('det', COCO, boxes(dict(bbox=[5, float('nan'), 3, 4])), ['annotation 1 has bbox=[5, nan, 3, 4]']),
    ('det', COCO, boxes(dict(area=None)), ['train.json: annotation 1 has area=None, which is not a number']),
    ('det', COCO, boxes(dict(category_id=None)), ['train.json: annotation 1 has category_id=None']),
    (
        'det',
        COCO,
        only('images', lambda old: [{**old[0], 'width': None}, *old[1:]]),
        ['train.json: image', 'width=None'],
    ),
    ('det', COCO, only('images', lambda old: [{**old[0], 'file_name': 3}, *old[1:]]), ['file_name=3, which is not']),
    ('det', COCO, boxes(dict(bbox=[5, 5, 3])), ['annotation 1 has bbox=[5, 5, 3]']),
    ('det', COCO, only('categories', lambda old: [*old[:9], dict(id=9, name='x')]), ['1 classes', ': 9;']),
    ('det', 'scenes/annotations/test.json', boxes(dict(image_id=99)), ['annotation 1 is of image 99']),
    ('det', 'scenes/train/00000.png', remove, ['missing']),
    ('det', 'scenes/train/00000.png', cut, ['damaged']),
    ('det', 'scenes/test/00000.png', put('junk'), ['damaged']),
    ('seg', 'scenes/masks/train/00000.png', remove, ['missing']),
    ('seg', 'scenes/masks/train/00000.png', cut, ['damaged']),
    ('seg', 'scenes/masks/test/00000.png', cut, ['damaged']),
    ('seg', 'scenes/masks/train/00000.png', put(np.full((96, 96), 11, np.uint8)), ['labels 11', '0 to 10 and 255']),
    ('seg', 'scenes/masks/test/00000.png', put(np.full((96, 96), 254, np.uint8)), ['labels 254', '0 to 10 and 255']),
    ('seg', 'scenes/masks/train/00000.png', put(np.zeros((96, 48), np.uint8)), ['(96, 48)', '(96, 96)']),
    ('seg', 'scenes/masks/train/00000.png', put(np.zeros((96, 96, 3), np.uint8)), ['(96, 96, 3)']),
    ('seg', 'scenes/train/00000.png', cut, ['damaged']),
    ('seg', 'scenes/test/00000.png', remove, ['data/digits/scenes/test has no pictures']),
    (
        'det',
        'scenes/annotations/test.json',
        lambda path: path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes()),
        ['is not JSON'],
    ),
    ('det', COCO, boxes(dict(bbox=[5, 5, 10**400, 4])), ['annotation 1 has bbox=[5, 5, 1000']),
    ('det', COCO, boxes(dict(id=2)), ["two entries of 'annotations' have id=2"]),
    ('det', COCO, only('images', lambda old: [*old, old[0]]), ["two entries of 'images' have id=0"]),
    (
        'det',
        COCO,
        only('categories', lambda old: [*old[:9], dict(id=9, name='0')]),
        ["two entries of 'categories' have name='0'"],
    ),
    ('det', 'scenes/annotations/test.json', boxes(dict(iscrowd=None)), ['annotation 1 has iscrowd=None; evaluation']),
    ('cls', 'cls/test/0/00034.png', cut, ['damaged']),
    ('cls', 'cls/test/0/00034.png', lambda path: path.write_text(''), ['damaged']),
]


@pytest.mark.parametrize(('task', 'path', 'damage', 'fragments'), BAD)
def test_bad_data(error_of, digits_copy, task, path, damage, fragments):
    path = next(digits_copy.glob('cls/test/0/*')).relative_to(digits_copy) if task == 'cls' else path
    damage(digits_copy / path)
    named = [] if 'no pictures' in fragments[0] else [f'data/digits/{path}']
    message = error_of(TRAIN, ROOT / 'configs' / CONFIGS[task], '--cfg-options', 'log_level=ERROR')
    holds(message, *named, *fragments)
    if '/test/' in str(path) or 'test.json' in str(path):
        torch.save({}, 'x.pth')
        assert error_of(TEST, ROOT / 'configs' / CONFIGS[task], 'x.pth') == message


def test_what_evaluation_alone_wants_may_be_missing_elsewhere(digits_copy):
    from mmdet.datasets import CocoDataset

    path = digits_copy / COCO
    edit(lambda content: [box.pop('iscrowd') for box in content['annotations']])(path)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    with data_checks.checked_reading(read_config(ROOT / 'configs' / CONFIGS['det'])):
        prefix = dict(img=str(digits_copy / 'scenes/train'))
        assert len(CocoDataset(ann_file=str(path), data_prefix=prefix, metainfo=dict(classes=digits.CLASSES)))


def test_labels_are_compared_by_names_that_stand_once():
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    known = {}
    for name in ('train', 'val'):
        data_checks.refuse_other_labels(known, name, IMAGENET_CATEGORIES)  # 'crane' is the 134th and the 517th class
    data_checks.refuse_other_labels(known, 'other', [*IMAGENET_CATEGORIES, 'more'])
    with pytest.raises(UserError, match=r"one less: the class 'goldfish.*' has the label 0, and 1 in train"):
        data_checks.refuse_other_labels(known, 'one less', IMAGENET_CATEGORIES[1:])


def test_a_box_that_is_ignored_has_any_label():
    boxes = [dict(bbox_label=-1, ignore_flag=1), dict(bbox_label=1, ignore_flag=0)]
    assert data_checks._labels(dict(instances=boxes), False) == [1]
    assert data_checks._labels(dict(instances=boxes, gt_label=np.int64(3)), True) == [3]


def only_class(digits_copy, split, removed):
    """Remove the pictures of a class from a split."""
    shutil.rmtree(digits_copy / 'cls' / split / removed)


CLS = ROOT / 'configs' / CONFIGS['cls']


def test_classes_of_splits_that_are_numbered_differently(error_of, digits_copy):
    only_class(digits_copy, 'test', '3')
    message = error_of(TRAIN, CLS)
    holds(message, "the class '4' has the label", '3', 'cls/train', 'cls/test')


def test_classes_in_another_order_than_their_folders(error_of, digits_copy):
    names = [str(digit) for digit in reversed(range(10))]
    message = error_of(TRAIN, CLS, '--cfg-values', repr({'train_dataloader.dataset.metainfo': dict(classes=names)}))
    holds(message, 'cls/train: metainfo.classes is not in the order of its folders, 0, 1, 2, 3, 4, ...')


def test_classes_of_a_checkpoint_in_another_order(error_of, digits_copy):
    names = [str(digit) for digit in reversed(range(10))]
    model = QuantRunner.from_cfg(read_config(CLS, dict(work_dir=str(digits_copy)))).model
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=names))), 'x.pth')
    holds(error_of(TEST, CLS, 'x.pth'), "x.pth: the class '9' has the label 0, and 9 in", 'cls/test')


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize(
    ('line', 'fragments'),
    [
        ('0/00034.png 12', ['0/00034.png has the label 12, and num_classes=10', '0 to 9']),
        ('0/00034.png -1', ['0/00034.png has the label -1']),
        ('0/00034.png', ['_dataloader: the data set cannot be read: not enough values']),
    ],
)
def test_a_list_of_pictures_with_wrong_labels(error_of, digits_copy, split, line, fragments):
    (digits_copy / 'cls/list.txt').write_text(f'{line}\n')
    loader = dict(train='train_dataloader', test='val_dataloader')[split]
    options = [f'{loader}.dataset.ann_file=list.txt', f'{loader}.dataset.data_prefix=']
    holds(error_of(TRAIN, CLS, '--cfg-options', *options), *fragments)


def test_a_class_folder_without_pictures(error_of, digits_copy):
    only_class(digits_copy, 'test', '9')
    for folder in (digits_copy / 'cls/test').iterdir():
        only_class(digits_copy, 'test', folder.name)
        folder.mkdir()
    holds(error_of(TRAIN, CLS), 'val_dataloader: the data set cannot be read: Found 0 files in subfolders')


@pytest.mark.parametrize(
    ('task', 'heads', 'given'),
    [
        ('cls', ['head', 'data_preprocessor'], 9),
        ('det', ['roi_head.bbox_head'], 9),
        ('seg', ['decode_head', 'auxiliary_head'], 4),
    ],
)
def test_a_model_with_too_few_classes(error_of, digits_copy, task, heads, given):
    options = [f'model.{name}.num_classes={given}' for name in heads]
    message = error_of(TRAIN, ROOT / 'configs' / CONFIGS[task], '--cfg-options', 'log_level=ERROR', *options)
    holds(message, 'data/digits/', 'label', f'0 to {given - 1}')


def test_labels_that_heads_know():
    heads = dict(decode_head=[dict(num_classes=2), dict(num_classes=2, ignore_index=11)], backbone=dict(depth=18))
    assert data_checks.labels_of(dict(module=heads)) == data_checks.Labels(2, frozenset({11, 255}))
    assert data_checks.labels_of(dict(decode_head=dict(num_classes=1, ignore_index=None))) == data_checks.Labels()


def test_a_worker_process_names_the_file_too(tmp_path, digits_copy, run):
    """One line, exit code 1; in the middle of training."""
    path = next(digits_copy.glob('cls/train/7/*'))
    path.write_text('junk')
    command = (TRAIN, ROOT / 'configs' / CONFIGS['cls'], '--no-validate', '--cfg-options')
    done = run(*command, 'train_dataloader.num_workers=1', 'train_dataloader.batch_size=8')
    assert done.returncode == 1
    named = f'error: {path.relative_to(tmp_path)} cannot be read: damaged or not a picture'
    assert done.stderr.startswith(named) and len(done.stderr.splitlines()) == 1, done.stderr


def test_boxes_without_an_area_are_counted(digits_copy, monkeypatch):
    """In the log, when the data set is built."""
    said = []
    monkeypatch.setattr(data_checks, 'print_log', lambda message, **kwargs: said.append(message))
    boxes(dict(bbox=[5, 5, 0, 4]))(digits_copy / COCO)
    init_default_scope('mmdet')
    dataset = Config.fromfile(ROOT / 'configs' / CONFIGS['det']).train_dataloader.dataset
    with data_checks.checked_reading(Config(dict(default_scope='mmdet'))):
        DATASETS.build(dataset | dict(data_root=str(digits_copy / 'scenes')))
    assert len(said) == 1
    holds(said[0], 'annotations/train.json: 1 of ', 'boxes are left out', 'annotation 1')


def scenes(root, **changes):
    """Config of the test scenes for segmentation."""
    init_default_scope('mmseg')
    given = read_config(ROOT / 'configs' / CONFIGS['seg']).val_dataloader.dataset
    return given | dict(data_root=str(root / 'scenes'), **changes)


def test_a_sample_is_the_same_when_it_is_checked(digits_root):
    plain, checked = (DATASETS.build(scenes(digits_root)) for _ in range(2))
    data_checks.check_dataset(checked, data_checks.Labels(ignored=frozenset({255})))
    data_checks.check_dataset(checked, data_checks.Labels(ignored=frozenset({255})))
    assert torch.equal(plain[0]['inputs'], checked[0]['inputs'])
    assert torch.equal(plain[0]['data_samples'].gt_sem_seg.data, checked[0]['data_samples'].gt_sem_seg.data)


def test_data_sets_within_data_sets_and_transforms_within_transforms(digits_copy):
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    tta = dict(type='TestTimeAug', transforms=[flips, [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]])
    inner = scenes(digits_copy, pipeline=[dict(type='LoadImageFromFile'), tta])
    dataset = RepeatDataset(dict(type='ConcatDataset', datasets=[inner]), times=2)
    data_checks.check_dataset(dataset, data_checks.Labels(ignored=frozenset({255})))
    assert len(dataset[0]['inputs']) == 2
    mask = digits_copy / 'scenes/masks/test/00000.png'
    cut(mask)
    with pytest.raises(UserError, match=f'{mask} cannot be read: damaged'):
        dataset[0]
    mask.unlink()
    with pytest.raises(UserError, match=f'1 path is missing: {mask}'):
        data_checks.check_dataset(dataset, data_checks.Labels(ignored=frozenset({255})))
