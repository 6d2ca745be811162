"""BCCD blood cells (Shenggan Cheng, MIT licence) in COCO's format, from a clone of its repository.

JPEGImages/*.jpg                                  364 pictures, 640x480
annotations/{train,val,trainval,test}.json        boxes, COCO JSON           (mmdet: CocoDataset)

The official split is kept: 205 train, 87 val, 72 test. A box is xmin, ymin, xmax - xmin, ymax - ymin; boxes without an
area are left out (there are two, in BloodImage_00338 and BloodImage_00343).

The source is a clone, or its folder BCCD.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .checks import check_annotations, read_picture
from .layout import building, read_list, require, source_folder, tracked

CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = ('train', 'val', 'trainval', 'test')


def _coco(source: Path, names: list[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for name in names:
        path = source / 'Annotations' / f'{name}.xml'
        try:
            root = ET.parse(path).getroot()
            width, height = (int(root.findtext(f'size/{side}', '')) for side in ('width', 'height'))
            images.append(dict(id=len(images) + 1, file_name=f'{name}.jpg', width=width, height=height))
            for item in root.iter('object'):
                sides = ('xmin', 'ymin', 'xmax', 'ymax')
                left, top, right, bottom = (int(item.findtext(f'bndbox/{side}', '')) for side in sides)
                if right <= left or bottom <= top:
                    continue
                boxes.append(
                    dict(
                        id=len(boxes) + 1,
                        image_id=len(images),
                        category_id=CLASSES.index(item.findtext('name', '')) + 1,
                        bbox=[left, top, right - left, bottom - top],
                        area=(right - left) * (bottom - top),
                        iscrowd=0,
                    )
                )
        except (ET.ParseError, ValueError) as error:
            raise UserError(f'{path} is not an annotation of BCCD: {error}') from None
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
    return dict(images=images, annotations=boxes, categories=categories)


def build(source: str | Path, root: str | Path) -> Path:
    """Copy the pictures and write the COCO JSON of each official split.

    Raises:
        UserError: a file of the repository is missing or cannot be read, or a picture is not of the size in its XML.
    """
    source, root = source_folder(source, 'BCCD'), Path(root)
    splits = {split: source / 'ImageSets' / 'Main' / f'{split}.txt' for split in SPLITS}
    require('BCCD', [*splits.values()])
    names = {split: read_list(path) for split, path in splits.items()}
    everything = sorted({name for each in names.values() for name in each})
    require('BCCD', [source / 'Annotations' / f'{name}.xml' for name in everything])
    require('BCCD', [source / 'JPEGImages' / f'{name}.jpg' for name in everything])
    with building(root) as folder:
        for part in ('JPEGImages', 'annotations'):
            (folder / part).mkdir()
        for split in SPLITS:
            content = _coco(source, names[split])
            if warning := check_annotations(content, splits[split]):
                print(warning)
            (folder / 'annotations' / f'{split}.json').write_text(json.dumps(content))
        with tracked(_coco(source, everything)['images'], 'BCCD') as images:
            for image in images:
                picture = source / 'JPEGImages' / image['file_name']
                height, width = read_picture(picture).shape[:2]
                if (width, height) != (image['width'], image['height']):
                    said = f'{image["width"]}x{image["height"]}'
                    raise UserError(f'{picture} is {width}x{height}, and {said} in its annotation')
                shutil.copyfile(picture, folder / 'JPEGImages' / picture.name)
    return root
