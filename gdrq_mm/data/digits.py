"""The embedded data set: scenes of real handwritten digits on textured backgrounds.

The digits are those that scikit-learn ships (UCI Optical Recognition of Handwritten Digits, 8x8, 1,797 images). Scenes
are drawn with a fixed seed, so all machines get the same pixels. Training and test scenes have no digit in common.

    cls/{train,test}/<digit>/*.png            32x32, one digit a picture         (mmpretrain: CustomDataset)
    scenes/{train,test}/*.png                 96x96, 2 to 5 digits a picture
    scenes/annotations/{train,test}.json      boxes, COCO JSON                   (mmdet: CocoDataset)
    scenes/masks/{train,test}/*.png           0 background, 1 + digit            (mmseg: BaseSegDataset)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits

from ..core.errors import UserError
from .layout import building, tracked, write_picture

SEED = 1797
TEST_DIGITS = 500
COUNTS = {'cls': {'train': 6000, 'test': 1000}, 'scenes': {'train': 600, 'test': 150}}
SIZES = {'cls': 32, 'scenes': 96}
DONE = 'complete.json'
CLASSES = tuple(str(digit) for digit in range(10))


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A background (size, size, 3) of smooth colours, stripes and noise, with values from about 0 to 255."""
    coarse = rng.uniform(20, 160, (4, 4, 3)).astype(np.float32)
    picture = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    picture += (rng.uniform(0, 25) * stripes)[..., None] + rng.normal(0, 8, picture.shape)
    return picture


def draw(picture: np.ndarray, digit: np.ndarray, x: int, y: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a digit (8, 8, values 0 to 16) into the picture; returns the mask of its pixels, (H, W) bool."""
    strength = cv2.resize(digit.astype(np.float32) / 16, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    turn = cv2.getRotationMatrix2D((size / 2 - 0.5, size / 2 - 0.5), rng.uniform(-12, 12), 1)
    strength = cv2.warpAffine(strength, turn, (size, size))[..., None]
    place = picture[y : y + size, x : x + size]
    colour = rng.uniform(130, 255, 3)
    place[:] = place * (1 - strength) + colour * strength
    mask = np.zeros(picture.shape[:2], bool)
    mask[y : y + size, x : x + size] = strength[..., 0] > 0.35
    return mask


def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Digit images (N, 8, 8) and labels (N,) of the training and the test split."""
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    parts = {'test': order[:TEST_DIGITS], 'train': order[TEST_DIGITS:]}
    return {name: (digits.images[index], digits.target[index]) for name, index in parts.items()}


def build(root: str | Path, show_progress: bool = True) -> Path:
    """Write the whole data set into `root`, unless it is there. Returns `root`.

    The file `complete.json` says what was built. Another version is replaced; any other content stays.

    Raises:
        UserError: `root` has something else in it, or cannot be written.
    """
    root = Path(root)
    wanted = json.dumps({'seed': SEED, 'counts': COUNTS, 'sizes': SIZES})
    found = _version(root)
    if found == wanted:
        return root
    ours = found.startswith('{"seed": ')  # what an older version of this function built, or did not finish
    if ours and {path.name for path in root.iterdir()} <= {*COUNTS, DONE}:
        for part in COUNTS:
            shutil.rmtree(root / part, ignore_errors=True)
        (root / DONE).unlink(missing_ok=True)
    try:
        with building(root) as folder:
            for split, (images, labels) in split_digits().items():
                _build_cls(folder, split, images, labels, show_progress)
                _build_scenes(folder, split, images, labels, show_progress)
            (folder / DONE).write_text(wanted)
    except UserError:
        if _version(root) != wanted:  # else another process has built it meanwhile
            raise
    return root


def _version(root: Path) -> str:
    """What was built in a folder; '' if nothing was."""
    try:
        return (root / DONE).read_text()
    except (OSError, UnicodeDecodeError):
        return ''


def _write(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture.dtype != np.uint8:
        picture = np.round(picture.clip(0, 255)).astype(np.uint8)
    write_picture(path, picture)


def _build_cls(root: Path, split: str, images: np.ndarray, labels: np.ndarray, show: bool) -> None:
    rng = np.random.default_rng([SEED, split == 'test', 0])
    size = SIZES['cls']
    for name in CLASSES:  # labels are the order of the folders
        (root / 'cls' / split / name).mkdir(parents=True)
    with tracked(range(COUNTS['cls'][split]), f'digits, {split} pictures', disable=not show) as numbers:
        for number in numbers:
            index = number % len(images)
            picture = texture(rng, size)
            side = int(rng.integers(20, 29))
            x, y = rng.integers(0, size - side + 1, 2)
            draw(picture, images[index], int(x), int(y), side, rng)
            _write(root / 'cls' / split / str(labels[index]) / f'{number:05}.png', picture)


def _build_scenes(root: Path, split: str, images: np.ndarray, labels: np.ndarray, show: bool) -> None:
    rng = np.random.default_rng([SEED, split == 'test', 1])
    size = SIZES['scenes']
    pictures: list[dict] = []
    boxes: list[dict] = []
    with tracked(range(COUNTS['scenes'][split]), f'digits, {split} scenes', disable=not show) as numbers:
        for number in numbers:
            picture, classes = texture(rng, size), np.zeros((size, size), np.uint8)
            taken = np.zeros((size, size), bool)
            for _ in range(int(rng.integers(2, 6))):
                side = int(rng.integers(22, 41))
                x, y = (int(v) for v in rng.integers(0, size - side + 1, 2))
                if taken[y : y + side, x : x + side].any():
                    continue  # digits do not overlap
                taken[y : y + side, x : x + side] = True
                index = int(rng.integers(len(images)))
                mask = draw(picture, images[index], x, y, side, rng)
                classes[mask] = labels[index] + 1
                rows, columns = np.nonzero(mask)
                left, top = int(columns.min()), int(rows.min())
                width, height = int(columns.max()) - left + 1, int(rows.max()) - top + 1
                boxes.append(
                    dict(
                        id=len(boxes) + 1,
                        image_id=number,
                        category_id=int(labels[index]),
                        bbox=[left, top, width, height],
                        area=width * height,
                        iscrowd=0,
                    )
                )
            pictures.append(dict(id=number, file_name=f'{number:05}.png', width=size, height=size))
            _write(root / 'scenes' / split / f'{number:05}.png', picture)
            _write(root / 'scenes' / 'masks' / split / f'{number:05}.png', classes)
    categories = [dict(id=digit, name=name) for digit, name in enumerate(CLASSES)]
    annotations = root / 'scenes' / 'annotations' / f'{split}.json'
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(dict(images=pictures, annotations=boxes, categories=categories)))


def _read(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    if picture is None:
        raise OSError(f'cannot read {path}')
    return picture


def picture_sheet(root: str | Path, path: str | Path, zoom: int = 2) -> None:
    """Draw one picture of each class, and test scenes with their boxes and masks, into one PNG."""
    root = Path(root)
    singles = [_read(min((root / 'cls' / 'test' / name).iterdir())) for name in CLASSES]
    found = json.loads((root / 'scenes' / 'annotations' / 'test.json').read_text())
    rows = [np.hstack([cv2.resize(p, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC) for p in singles])]
    palette = cv2.applyColorMap(np.linspace(0, 255, 11).astype(np.uint8), cv2.COLORMAP_TURBO).reshape(11, 3)
    scenes, masks = [], []
    for picture in found['images'][:5]:
        scene = _read(root / 'scenes' / 'test' / picture['file_name'])
        mask = _read(root / 'scenes' / 'masks' / 'test' / picture['file_name'])[..., 0]
        for box in found['annotations']:
            if box['image_id'] == picture['id']:
                x, y, width, height = box['bbox']
                cv2.rectangle(scene, (x, y), (x + width - 1, y + height - 1), (0, 255, 0))
        scenes.append(scene)
        masks.append(np.where(mask[..., None] > 0, palette[mask], 40).astype(np.uint8))
    rows += [np.hstack(scenes), np.hstack(masks)]
    sheet = cv2.resize(np.vstack(rows), None, fx=zoom, fy=zoom, interpolation=cv2.INTER_NEAREST)
    _write(Path(path), sheet)
