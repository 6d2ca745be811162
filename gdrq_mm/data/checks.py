"""Checks of annotations, pictures and masks; an error names the file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..core.errors import UserError

KEYS = {
    'images': {'id', 'file_name', 'width', 'height'},
    'categories': {'id', 'name'},
    'annotations': {'id', 'image_id', 'category_id', 'bbox', 'area'},
}
"""The keys of a COCO file that mmdet reads."""


KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(('id', 'image_id', 'category_id'), ((int, float, str), 'a number or a name')),
    **dict.fromkeys(('width', 'height', 'area'), ((int, float), 'a number')),
    **dict.fromkeys(('file_name', 'name'), ((str,), 'a text')),
}
"""What stands under a key: Python types, and the same in words."""


LARGEST = 2**31
"""Pixels: no side of a box is as long. Python's integers may be too large for a float."""
DAMAGED = (OSError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on a file that it cannot read, and on one that would fill the memory."""


def read_annotations(path: str | Path, name: str | Path | None = None, evaluated: bool = False) -> dict[str, Any]:
    """The content of a COCO file; with `evaluated` one that pycocotools will read, as text without a mark in front.

    Raises:
        UserError: it is not JSON, lacks what mmdet reads, or has null or text where a number belongs. `annotations` may
            be missing: prediction needs none.
    """
    name = name or path
    try:
        data = Path(path).read_bytes()
        content = json.loads(data.decode() if evaluated else data)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name} is not JSON: {error}') from None
    if not isinstance(content, dict):
        raise UserError(f'{name} is a {type(content).__name__}, not a COCO dict with {", ".join(KEYS)}')
    content.setdefault('annotations', [])
    for part, keys in KEYS.items():
        if not isinstance(content.get(part), list):
            raise UserError(f'{name} has no list {part!r}')
        for number, entry in enumerate(content[part]):
            if not isinstance(entry, dict) or not keys <= entry.keys():
                lacking = ', '.join(sorted(keys - set(entry))) if isinstance(entry, dict) else f'all keys: {entry!r}'
                raise UserError(f'{name}: entry {number} of {part!r} lacks {lacking}')
            for key, value in entry.items():
                types, words = KINDS.get(key, ((object,), ''))
                if not isinstance(value, types) or (isinstance(value, float) and not math.isfinite(value) and words):
                    one = dict(images='image', categories='category', annotations='annotation')[part]
                    raise UserError(f'{name}: {one} {entry["id"]} has {key}={value!r}, which is not {words}')
    return content


def check_annotations(
    content: dict[str, Any], name: str | Path, classes: Iterable[str] | None = None, evaluated: bool = False
) -> str:
    """Check that images, categories and annotations of a COCO file fit together.

    Args:
        evaluated: predictions are compared with it, for which pycocotools wants `iscrowd` of each annotation.

    Returns:
        A warning with the number of boxes that mmdet ignores; '' if there are none.

    Raises:
        UserError: an id, or the name of a category that is used, stands twice, an annotation has an unknown image or
            category or a malformed box, or a class is not among the categories.
    """
    for part in KEYS:
        _refuse_twice(name, part, 'id', content[part])
    classes = None if classes is None else [*classes]
    used = [each for each in content['categories'] if classes is None or each['name'] in classes]
    _refuse_twice(name, 'categories', 'name', used)
    images = {image['id']: image for image in content['images']}
    categories = {category['id']: category['name'] for category in content['categories']}
    unknown = [c for c in classes or () if c not in categories.values()]
    if unknown:
        raise UserError(
            f'{name}: {len(unknown)} classes of metainfo are not among its categories: {few(unknown)}; '
            f'categories are {few(categories.values())}'
        )
    empty = []
    for entry in content['annotations']:
        if entry['image_id'] not in images:
            raise UserError(f'{name}: annotation {entry["id"]} is of image {entry["image_id"]}, which it does not have')
        if entry['category_id'] not in categories:
            category = entry['category_id']
            raise UserError(f'{name}: annotation {entry["id"]} is of category {category}, which it does not have')
        if evaluated and entry.get('iscrowd') not in (0, 1):
            crowd = entry.get('iscrowd')
            raise UserError(f'{name}: annotation {entry["id"]} has iscrowd={crowd}; evaluation needs 0 or 1')
        box = entry['bbox']
        if not _is_box(box):
            raise UserError(
                f'{name}: annotation {entry["id"]} has bbox={box}, which is not [x, y, width, height] '
                'with a width and a height of at least 0'
            )
        (x, y, width, height), image = box, images[entry['image_id']]
        inside = x < image['width'] and y < image['height'] and x + width > 0 and y + height > 0
        if not inside or width < 1 or height < 1 or entry['area'] <= 0:
            empty.append(entry['id'])
    if empty:
        share = f'{len(empty)} of {len(content["annotations"])} boxes are left out'
        return f'{name}: {share}, smaller than a pixel or outside their picture: annotation {few(empty)}'
    return ''


def _refuse_twice(name: str | Path, part: str, key: str, entries: Iterable[dict[str, Any]]) -> None:
    seen: set[Any] = set()
    for entry in entries:
        if entry[key] in seen:
            raise UserError(f'{name}: two entries of {part!r} have {key}={entry[key]!r}')
        seen.add(entry[key])


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and abs(v) < LARGEST for v in box)
        and min(box[2:]) >= 0
    )


def few(names: Iterable[Any]) -> str:
    """The first five names, for a message."""
    names = [str(name) for name in names]
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def read_picture(path: Path) -> np.ndarray:
    """A picture, BGR.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        picture = cv2.imread(str(path))
    except cv2.error as error:  # it is too large
        raise UserError(f'{path} cannot be read: {error}'.splitlines()[0]) from None
    if picture is None:
        raise UserError(f'{path} cannot be read: damaged or not a picture')
    return picture


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of a picture, which is not decoded.

    Raises:
        UserError: it is none, or is larger than any that can be decoded.
    """
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except DAMAGED as error:
        raise UserError(f'{path} cannot be read: {error}') from None


def read_mask(path: Path, shape: tuple[int, ...], classes: int, ignored: Iterable[int]) -> np.ndarray:
    """An index mask.

    Raises:
        UserError: it cannot be decoded, has another shape, or has labels that are neither classes nor ignored.
    """
    try:
        with Image.open(path) as file:
            mask = np.asarray(file)
    except DAMAGED as error:
        raise UserError(f'{path} cannot be read: {error}') from None
    wrong = wrong_mask(mask, shape, classes, ignored)
    if wrong:
        raise UserError(f'{path} {wrong}')
    return mask


def wrong_mask(mask: np.ndarray, shape: tuple[int, ...], classes: int, ignored: Iterable[int]) -> str:
    """What is wrong with an index mask; '' if nothing is."""
    if mask.shape != tuple(shape):
        return f'is a mask of shape {mask.shape}, and its picture is {tuple(shape)}'
    wrong = mask >= classes  # ten times faster than np.unique, although it takes several passes
    for label in ignored:
        wrong &= mask != label
    if not wrong.any():
        return ''
    allowed = f'0 to {classes - 1} and {few(sorted(ignored))} (ignored)'
    return f'has the labels {few(np.unique(mask[wrong]))}; allowed are {allowed}'
