"""tools/prepare_data.py: what it makes opens, and what is wrong with a source is told."""

import io
import json
import pickle
import tarfile

import cv2
import numpy as np
import pytest

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import cifar10, digits
from tests.tools import PREPARE, Payload, holds

# ---- prepare_data: CIFAR-10 -----------------------------------------------------------------------------------------


def batch(labels=(3, 0), seed=0, **more):
    """An official batch of random pictures."""
    planes = np.random.default_rng(seed).integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
    return {b'data': planes, b'labels': list(labels), **more}


def archive(path, members):
    """`members`: a dict, or pairs, of which several may have one name."""
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def per_class(number=2):
    rng = np.random.default_rng(0)
    pictures = {
        f'cifar10/{split}/{name}/{i}.png': cv2.imencode('.png', rng.integers(0, 256, (32, 32, 3), np.uint8))[1]
        for split in ('train', 'test')
        for name in cifar10.CLASSES
        for i in range(number)
    }
    return {name: png.tobytes() for name, png in pictures.items()}


def damaged(path):
    content = bytearray(archive(path, per_class()))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


SOURCES = {
    'missing': (lambda path: None, ['given.tar.gz', 'No such file']),
    'empty': (lambda path: path.touch(), ['given.tar.gz', 'not a readable CIFAR-10 archive']),
    'no archive': (lambda path: path.write_text('junk ' * 100), ['given.tar.gz', 'not a readable CIFAR-10 archive']),
    'an empty folder': (lambda path: path.mkdir(), ['given.tar.gz', 'cifar*10*.tar.gz']),
    'too few': (lambda path: archive(path, per_class()), ['20 train pictures', '50000']),
    'truncated': (
        lambda path: path.write_bytes(archive(path, per_class(20))[:-60000]),
        ['given.tar.gz', 'not a readable CIFAR-10 archive'],
    ),
    'damaged': (damaged, ['given.tar.gz']),  # tarfile takes a damaged header for the end: the counts tell
    'something else': (lambda path: archive(path, {'readme.txt': b'hello'}), ['0 train pictures', '50000']),
    'a batch of code': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps(Payload())}),
        ['given.tar.gz', 'data_batch_1 holds more than plain data', 'mkdir'],
    ),
    'a batch without data': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps({b'labels': [1]})}),
        ['given.tar.gz', 'data'],
    ),
    'a batch with a wrong label': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps(batch([3, 10]))}),
        ['given.tar.gz', '10'],
    ),
    'a batch with a label below 0': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps(batch([3, -1]))}),
        ['given.tar.gz', '-1'],
    ),
    'a batch that is a list': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps([1])}),
        ['given.tar.gz'],
    ),
    'a batch that takes memory': (
        lambda path: archive(path, {'data_batch_1': bytes(65 << 20)}),
        ['given.tar.gz', 'claims 68157440 bytes'],
    ),
}


@pytest.mark.parametrize('kind', SOURCES)
def test_a_wrong_source(tmp_path, error_of, kind):
    """A half-filled data folder would pass for the whole data set, so none may be left."""
    make, fragments = SOURCES[kind]
    make(tmp_path / 'given.tar.gz')
    holds(error_of(PREPARE, 'cifar10', '--source', 'given.tar.gz'), *fragments)
    assert not (tmp_path / 'executed').exists()
    assert not (tmp_path / 'data/cifar10').exists()


def test_cifar10_needs_a_source(error_of):
    holds(error_of(PREPARE, 'cifar10'), '--source PATH')


@pytest.mark.parametrize('dataset', ['digits', 'cifar10'])
def test_a_folder_that_cannot_be_written(tmp_path, error_of, dataset):
    (tmp_path / 'occupied').touch()
    archive(tmp_path / 'given.tar.gz', per_class())
    holds(error_of(PREPARE, dataset, '--source', 'given.tar.gz', '--out', 'occupied'), 'occupied')


def test_what_is_in_the_place_of_cifar10_stays(tmp_path, monkeypatch):
    (tmp_path / 'mine/train').mkdir(parents=True)
    (tmp_path / 'mine/train/notes.txt').write_text('mine')
    archive(tmp_path / 'given.tar.gz', per_class(2))
    monkeypatch.setattr(cifar10, 'COUNTS', dict(train=20, test=20))
    with pytest.raises(UserError, match='mine is there already'):
        cifar10.build(tmp_path / 'given.tar.gz', tmp_path / 'mine', show_progress=False)
    assert (tmp_path / 'mine/train/notes.txt').read_text() == 'mine'
    for _ in range(2):  # the second time it is there
        assert cifar10.build(tmp_path / 'given.tar.gz', tmp_path / 'new', show_progress=False) == tmp_path / 'new'
    assert len(list((tmp_path / 'new').glob('*/*/*.png'))) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ['given.tar.gz', 'mine', 'new']


@pytest.mark.parametrize('other', ['cifar10/train/cat/0.png', 'cifar10/train/cat/1.txt', 'cifar10/train/cat/._1.png'])
def test_only_pictures_with_names_of_their_own_count(tmp_path, monkeypatch, other):
    members = list(per_class(2).items())
    place = [name for name, _ in members].index('cifar10/train/cat/1.png')
    members[place] = other, members[place][1]
    archive(tmp_path / 'given.tar.gz', members)
    monkeypatch.setattr(cifar10, 'COUNTS', dict(train=20, test=20))
    with pytest.raises(UserError, match='has 19 train pictures, CIFAR-10 has 20'):
        cifar10.build(tmp_path / 'given.tar.gz', tmp_path / 'new', show_progress=False)


def test_an_official_batch_is_read():
    content = batch([3, 0])
    planes = content[b'data'].reshape(2, 3, 32, 32)
    for name, split in (('data_batch_5', 'train'), ('test_batch', 'test')):
        pictures = list(cifar10._official(name, pickle.dumps(content)))
        assert [place for place, _, _ in pictures] == [f'{split}/cat', f'{split}/airplane']
        assert len({file for _, file, _ in pictures}) == 2
        for (_, _, png), rgb in zip(pictures, planes):
            bgr = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
            np.testing.assert_array_equal(bgr[..., ::-1].transpose(2, 0, 1), rgb)


def test_names_of_official_batches_do_not_collide():
    names = [n for i in range(1, 6) for _, n, _ in cifar10._official(f'data_batch_{i}', pickle.dumps(batch()))]
    assert len(set(names)) == 10


# ---- prepare_data: digits -------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def scenes(data):
    return data / 'data/digits/scenes'


def test_digits_are_the_same_to_the_byte(data, tmp_path):
    first, second = data / 'data/digits', digits.build(tmp_path / 'again', show_progress=False)
    files = {p.relative_to(first) for p in first.rglob('*') if p.is_file()}
    assert files == {p.relative_to(second) for p in second.rglob('*') if p.is_file()}
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digits, 'COUNTS', {'cls': dict(train=30, test=30), 'scenes': dict(train=2, test=2)})


@pytest.mark.parametrize('version', ['{"seed": 17', '{"seed": 1, "counts": {}, "sizes": {}}'])
def test_an_older_version_is_replaced(tmp_path, few, version):
    root, same = (digits.build(tmp_path / name, show_progress=False) for name in ('digits', 'same'))
    (root / 'complete.json').write_text(version)
    missing, more = root / 'scenes/train/00001.png', root / 'cls/train/0/99999.png'
    missing.rename(more)  # a test digit of another seed would be among those to train with
    digits.build(root, show_progress=False)
    files = {p.relative_to(root) for p in root.rglob('*') if p.is_file()}
    assert sorted(p.name for p in (root / 'cls/test').iterdir()) == list(digits.CLASSES)  # in so few some are empty
    assert files == {p.relative_to(same) for p in same.rglob('*') if p.is_file()}
    assert all((root / file).read_bytes() == (same / file).read_bytes() for file in files)


def test_what_is_in_the_place_of_digits_stays(tmp_path, few):
    (tmp_path / 'cls/train/cat').mkdir(parents=True)
    with pytest.raises(UserError, match='is there already'):
        digits.build(tmp_path, show_progress=False)
    assert [p.name for p in tmp_path.rglob('*')] == ['cls', 'train', 'cat']


@pytest.mark.parametrize('arguments', [['digits', '--sheet', 'a.txt'], ['coco', '--source', '.', '--sheet', 'a.png']])
def test_a_sheet_is_a_picture_of_the_digits(error_of, arguments):
    holds(error_of(PREPARE, *arguments), f'--sheet {arguments[-1]}', 'digits')


def test_training_and_test_share_no_digit():
    parts = {name: {image.tobytes() for image in images} for name, (images, _) in digits.split_digits().items()}
    assert len(parts['train']) > 1200 and len(parts['test']) > 450
    assert parts['train'].isdisjoint(parts['test'])


def test_digit_classes_open_with_mmpretrain(data):
    from mmpretrain.datasets import CustomDataset

    for split, number in (('train', 6000), ('test', 1000)):
        dataset = CustomDataset(data_root=str(data / 'data/digits/cls'), data_prefix=split)
        assert len(dataset) == number and tuple(dataset.CLASSES) == digits.CLASSES
        assert cv2.imread(dataset.get_data_info(0)['img_path']).shape == (32, 32, 3)
        assert set(dataset.get_gt_labels()) == set(range(10))


@pytest.mark.parametrize(('split', 'number'), [('train', 600), ('test', 150)])
def test_boxes_open_with_mmdet_and_pycocotools(scenes, split, number):
    from mmdet.datasets import CocoDataset
    from pycocotools.coco import COCO

    dataset = CocoDataset(
        data_root=str(scenes),
        ann_file=f'annotations/{split}.json',
        data_prefix=dict(img=f'{split}/'),
        metainfo=dict(classes=digits.CLASSES),
        filter_cfg=dict(filter_empty_gt=True),
    )
    coco = COCO(str(scenes / 'annotations' / f'{split}.json'))
    assert len(dataset) == len(coco.imgs) == number
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(digits.CLASSES)
    for info in dataset:
        boxes = coco.loadAnns(coco.getAnnIds(info['img_id']))
        assert [i['bbox_label'] for i in info['instances']] == [b['category_id'] for b in boxes]
        for instance, box in zip(info['instances'], boxes):
            left, top, width, height = box['bbox']
            assert instance['bbox'] == [left, top, left + width, top + height]
    assert cv2.imread(dataset[0]['img_path']).shape == (96, 96, 3)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_boxes_fit_the_masks(scenes, split):
    content = json.loads((scenes / 'annotations' / f'{split}.json').read_text())
    boxes = {image['id']: [] for image in content['images']}
    for box in content['annotations']:
        boxes[box['image_id']].append(box)
    for image in content['images']:
        mask = cv2.imread(str(scenes / 'masks' / split / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (image['height'], image['width']) and mask.dtype == np.uint8
        assert boxes[image['id']]
        for box in boxes[image['id']]:
            left, top, width, height = box['bbox']
            assert left >= 0 and top >= 0 and left + width <= image['width'] and top + height <= image['height']
            inside = mask[top : top + height, left : left + width]
            assert set(np.unique(inside)) <= {0, box['category_id'] + 1}
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))  # tight
            mask[top : top + height, left : left + width] = 0
        assert not mask.any()  # no digit without a box


def test_masks_open_with_mmseg(scenes):
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    for split, number in (('train', 600), ('test', 150)):
        dataset = BaseSegDataset(
            data_root=str(scenes),
            data_prefix=dict(img_path=split, seg_map_path=f'masks/{split}'),
            img_suffix='.png',
            seg_map_suffix='.png',
            metainfo=dict(classes=('background', *digits.CLASSES)),
            pipeline=[LoadImageFromFile(), LoadAnnotations()],
        )
        assert len(dataset) == number
        sample = dataset[0]
        assert sample['img'].shape == (96, 96, 3) and sample['gt_seg_map'].shape == (96, 96)
        assert 2 <= len(np.unique(sample['gt_seg_map'])) and sample['gt_seg_map'].max() <= 10
