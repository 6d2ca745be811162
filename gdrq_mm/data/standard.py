"""Large data sets that the user has, linked to where OpenMMLab's own configs expect them.

data/VOCdevkit/VOC2007, VOC2012                                   boxes (mmdet), masks (mmseg)
data/coco/annotations/instances_{train,val}2017.json              boxes (mmdet)
data/coco/{train,val}2017/*.jpg
data/cityscapes/leftImg8bit/{train,val}/<city>/*.png              masks (mmseg)
data/cityscapes/gtFine/{train,val}/<city>/*_labelTrainIds.png     made here, beside links to the other files
data/imagenet/{train,val}/<class>/*.JPEG                          classes (mmpretrain), or with meta/{train,val}.txt

The source must have the same folders; the archives of each data set unpack to them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.errors import UserError
from .checks import check_annotations, read_annotations, read_mask, size_of
from .layout import building, link, read_list, require, source_folder, tracked, write_picture

VOC_LISTS = {
    'VOC2007': ('Main/trainval', 'Main/test'),
    'VOC2012': ('Main/trainval', 'Segmentation/train', 'Segmentation/val'),
}
VOC_FILES = {
    'Main': ('Annotations/{}.xml', 'JPEGImages/{}.jpg'),
    'Segmentation': ('SegmentationClass/{}.png', 'JPEGImages/{}.jpg'),
}
"""List -> the files that each of its lines stands for."""

CITYSCAPES_CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of each train id (cityscapesscripts.helpers.labels); other labels are ignored, 255."""

IMAGENET_CLASSES = 1000


def voc(source: str | Path, root: str | Path) -> Path:
    """Pascal VOC: one year or both; detection (voc0712) needs both, segmentation 2012.

    Raises:
        UserError: there is neither year, or a file is missing that is in the lists of a year.
    """
    source, root = source_folder(source, 'VOCdevkit'), Path(root)
    years = [year for year in VOC_LISTS if (source / year).is_dir()]
    require('Pascal VOC', [source / year for year in years or VOC_LISTS])
    for year in years:
        lists = {name: source / year / 'ImageSets' / f'{name}.txt' for name in VOC_LISTS[year]}
        require(year, lists.values())
        files = {
            source / year / pattern.format(number)
            for name, path in lists.items()
            for number in read_list(path)
            for pattern in VOC_FILES[name.split('/')[0]]
        }
        with tracked(sorted(files), year) as each:
            require(year, each)
    if 'VOC2012' in years and not (source / 'VOC2012/SegmentationClassAug').is_dir():
        print(f'Note: {source}/VOC2012 has no SegmentationClassAug, and segmentation (voc12aug) trains on it.')
    return link(source, root, years)


def coco(source: str | Path, root: str | Path) -> Path:
    """COCO 2017.

    Raises:
        UserError: a folder or a picture is missing, or an annotation file is wrong.
    """
    source, root = source_folder(source), Path(root)
    files = {split: source / 'annotations' / f'instances_{split}.json' for split in ('train2017', 'val2017')}
    require('COCO', [*files.values(), *(source / split for split in files)])
    with tracked(files.items(), 'COCO') as each:
        for split, path in each:
            content = read_annotations(path, evaluated=split == 'val2017')
            if not content['images']:
                raise UserError(f'{path} has no images')
            warning = check_annotations(content, path, evaluated=split == 'val2017')
            if warning:
                print(warning)
            require(f'COCO, {split}', [source / split / image['file_name'] for image in content['images']])
    return link(source, root, ['annotations', *files])


def cityscapes(source: str | Path, root: str | Path) -> Path:
    """Cityscapes, fine annotations of train and val.

    Raises:
        UserError: a mask is missing or damaged, has wrong labels, or is not of the size of its picture.
    """
    source, root = source_folder(source), Path(root)
    train_ids = np.full(256, 255, np.uint8)
    train_ids[list(CITYSCAPES_CLASSES)] = range(len(CITYSCAPES_CLASSES))
    folders = [source / 'leftImg8bit' / split for split in ('train', 'val')]
    masks: dict[Path, Path] = {}
    for folder in folders:
        pictures = sorted(folder.glob('*/*_leftImg8bit.png'))
        if not pictures:
            raise UserError(f'Cityscapes: {folder} has no pictures (<city>/*_leftImg8bit.png)')
        for picture in pictures:
            name = picture.name.replace('leftImg8bit', 'gtFine_labelIds')
            masks[picture] = source / 'gtFine' / folder.name / picture.parent.name / name
    require('Cityscapes', masks.values())
    with building(root) as out:
        (out / 'leftImg8bit').symlink_to((source / 'leftImg8bit').resolve())
        with tracked(masks.items(), 'Cityscapes') as each:
            for picture, mask in each:
                place = out / mask.parent.relative_to(source)
                place.mkdir(parents=True, exist_ok=True)
                labels = read_mask(mask, size_of(picture), max(CITYSCAPES_CLASSES) + 1, [255])
                made = mask.name.replace('labelIds', 'labelTrainIds')
                for file in mask.parent.glob(mask.name.replace('labelIds.png', '*')):
                    if file.name != made:
                        (place / file.name).symlink_to(file.resolve())
                write_picture(place / made, train_ids[labels])
    return root


def imagenet(source: str | Path, root: str | Path) -> Path:
    """ImageNet (ILSVRC 2012).

    Raises:
        UserError: a split has neither 1,000 class folders with pictures nor a list in meta/ whose pictures exist.
    """
    source, root = source_folder(source), Path(root)
    splits = ('train', 'val')
    require('ImageNet', [source / split for split in splits])
    classes = {}
    for split in splits:
        listed = source / 'meta' / f'{split}.txt'
        if listed.is_file():
            names = [line.rsplit(' ', 1)[0] for line in read_list(listed, lines=True)]
            with tracked([source / split / name for name in names], f'ImageNet, {split}') as each:
                require(f'ImageNet, {split}', each)
            continue
        folders = sorted(folder for folder in (source / split).iterdir() if folder.is_dir())
        if len(folders) != IMAGENET_CLASSES:
            raise UserError(
                f'ImageNet: {source / split} has {len(folders)} class folders, not {IMAGENET_CLASSES}, '
                f'and there is no list {listed}'
            )
        with tracked(folders, f'ImageNet, {split}') as each:
            empty = [folder.name for folder in each if not any(folder.iterdir())]
        if empty:
            raise UserError(f'ImageNet: {len(empty)} class folders of {source / split} are empty: {empty[0]}, ...')
        classes[split] = {folder.name for folder in folders}
    if len(classes) == len(splits) and classes['train'] != classes['val']:
        more = sorted(classes['train'] - classes['val'])
        raise UserError(f'ImageNet: {len(more)} class folders of train are missing in val: {more[0]}, ...')
    return link(source, root, [*splits, *(['meta'] if (source / 'meta').is_dir() else [])])
