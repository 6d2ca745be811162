"""From one picture to a batch: through the pipeline of the config's test data, without what loads its annotations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import FUNCTIONS, DefaultScope

from ..core.errors import UserError
from .data_checks import UNREADABLE
from .tasks import pipeline_of, type_name

PIXELS = 'uint8 BGR pixels of shape (H, W, 3)'


def picture_pipeline(cfg: Config) -> list[Any]:
    """The transforms of the test data for a picture that has no annotations.

    Raises:
        UserError: the test data have no pipeline.
    """
    transforms = pipeline_of(cfg)
    if not transforms:
        raise UserError('the test data have no pipeline: test_dataloader.dataset.pipeline is missing')
    return [copy.deepcopy(each) for each in transforms if not _loads(type_name(each), 'Annotation', 'Proposal')]


def batch_of(cfg: Config, image: str | Path | np.ndarray) -> Any:
    """What the test data loader would make of one picture.

    Args:
        image: path, or uint8 BGR pixels (H, W, 3), which stand for a file that holds them.

    Raises:
        UserError: the file does not exist or cannot be read, or the pixels are none.
    """
    if not isinstance(image, (str, Path, np.ndarray)):
        raise UserError(f'a {type(image).__name__} is no picture: give a path, or {PIXELS}')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        transforms = Compose(picture_pipeline(cfg)).transforms
        number = next((i for i, each in enumerate(transforms) if _loads(type(each).__name__)), None)
        if number is not None:
            transforms[number] = _loader(transforms[number], image)
        data = dict(img_id=0) if isinstance(image, np.ndarray) else dict(img_id=0, img_path=str(image))
        for transform in transforms:
            data = transform(data)
        return _collate_of(cfg)([data])


PROBES = ((90, 160), (160, 90), (64, 64), (37, 301))
"""Heights and widths of pictures with which a rule is compared with the pipeline (ours)."""
ORDER = ('resize', 'crop', 'pad')
SAMPLED = ('nearest', 'bilinear', 'bicubic', 'lanczos')
"""Ways to scale a picture that other libraries have under the same name."""


def input_rule(cfg: Config) -> dict[str, Any]:
    """How the pipeline of the test data turns a picture into an input, for programs that have no OpenMMLab.

    Returns:
        What is done in this order; each may be None. `resize`: to `width` and `height`, or so that a picture that keeps
        its shape fits into `long` and `short`, one of which may be missing, and how that is rounded; with an
        `interpolation`. `crop`: `width` and `height` out of the middle. `pad`: at the right and the bottom with a
        `value`, to `width` and `height`, or to a `square`. Instead of these `refused`: why there is no such rule.
    """
    rule: dict[str, Any] = dict.fromkeys(ORDER)
    try:
        for each in picture_pipeline(cfg):
            for name, what in _rule_of(each).items():
                if any(rule[later] for later in ORDER[ORDER.index(name) :]):
                    raise ValueError(f'{type_name(each)} comes late')
                rule[name] = what
        for height, width in PROBES:
            made = batch_of(cfg, np.zeros((height, width, 3), np.uint8))['inputs'][0].shape[1:]
            expected = size_by(rule, width, height)[::-1]
            if tuple(made) != expected:
                raise ValueError(f'a picture of {height} x {width} becomes {made[0]} x {made[1]}')
    except Exception as error:  # of transforms, on pictures that they may not be made for: an export goes on without
        return dict(refused=f'the pipeline of the test data: {error}')
    return rule


def _rule_of(transform: Any) -> dict[str, Any]:
    """What a transform adds to :func:`input_rule`; raises ValueError for one that it does not know."""
    kind, options = type_name(transform), {k: v for k, v in transform.items() if k not in ('type', '_scope_')}
    if _loads(kind):
        if str(options.get('color_type', 'color')) != 'color':
            raise ValueError(f'color_type={options["color_type"]!r}')
        return {}
    if kind.startswith('Pack'):
        return {}
    if kind == 'Resize' and options.get('scale') is not None:
        width, height = _pair(options['scale'])
        long, short = max(width, height), min(width, height)
        size = (
            dict(long=long, short=short, round='nearest')
            if options.get('keep_ratio')
            else dict(width=width, height=height)
        )
        return dict(resize=size | _sampled(options))
    if kind == 'ResizeEdge' and options.get('edge', 'short') in ('short', 'long'):
        return dict(resize={options.get('edge', 'short'): options['scale'], 'round': 'down'} | _sampled(options))
    if kind == 'CenterCrop' and not options.get('auto_pad'):
        width, height = _pair(options['crop_size'])
        return dict(crop=dict(width=width, height=height))
    if kind == 'Pad' and options.get('padding_mode', 'constant') == 'constant' and options.get('size_divisor') is None:
        return dict(pad=_padding(options))
    raise ValueError(f'{kind} with {", ".join(options) or "its defaults"} is not known to programs without OpenMMLab')


def _pair(value: Any) -> tuple[int, int]:
    """Width and height of a size that may be one number."""
    width, height = (value, value) if isinstance(value, int) else value
    return int(width), int(height)


def _sampled(options: dict[str, Any]) -> dict[str, str]:
    kind = options.get('interpolation', 'bilinear')
    if kind not in SAMPLED:
        raise ValueError(f'interpolation={kind!r}')
    return dict(interpolation=kind)


def _padding(options: dict[str, Any]) -> dict[str, Any]:
    value = options.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, Mapping) else value
    values = {*value} if isinstance(value, (list, tuple)) else {value}
    if len(values) > 1:
        raise ValueError(f'pad_val={value!r}')
    size = dict(square=True) if options.get('pad_to_square') else dict(zip(('width', 'height'), _pair(options['size'])))
    return {**size, 'value': values.pop()}


def size_by(rule: Mapping[str, Any], width: int, height: int) -> tuple[int, int]:
    """Width and height of an input that is made of a picture by an :func:`input_rule`."""
    resize, crop, pad = rule['resize'], rule['crop'], rule['pad']
    if resize and 'width' in resize:
        width, height = resize['width'], resize['height']
    elif resize:
        edges = dict(long=max(width, height), short=min(width, height))
        name = min(edges.keys() & resize.keys(), key=lambda each: resize[each] / edges[each])
        to, edge = resize[name], edges[name]  # as mmcv and mmpretrain compute it, to the last bit
        near = resize['round'] == 'nearest'
        sides = (int(s * (to / edge) + 0.5) if near else int(to * s / edge) for s in (width, height))
        width, height = (max(side, 1) for side in sides)
    if crop:
        width, height = min(width, crop['width']), min(height, crop['height'])
    if pad:
        square = max(width, height) if pad.get('square') else 0
        width, height = max(width, square, pad.get('width', 0)), max(height, square, pad.get('height', 0))
    return width, height


def _loads(kind: str, *words: str) -> bool:
    return kind.startswith('Load') and (not words or any(word in kind for word in words))


def _loader(transform: Any, image: str | Path | np.ndarray) -> Callable[[dict[str, Any]], Any]:
    """The transform that loads pictures, for this one."""
    if isinstance(image, np.ndarray) or type(transform).__name__ == 'LoadImageFromNDArray':
        return functools.partial(_from_pixels, transform, image)

    def load(data: dict[str, Any]) -> Any:
        _check_file(image)
        try:
            return transform(data)
        except UNREADABLE:
            raise UserError(f'picture {image} cannot be read: damaged or not a picture') from None

    return load


def _from_pixels(transform: Any, image: str | Path | np.ndarray, data: dict[str, Any]) -> dict[str, Any]:
    """What a transform would load from a file with these pixels."""
    color = getattr(transform, 'color_type', 'color')
    pixels = read_image(image, any_kind=color == 'unchanged')
    if color.startswith('grayscale') and pixels.ndim == 3:
        file = cv2.imencode('.png', pixels)[1].tobytes()
        pixels = mmcv.imfrombytes(file, flag=color, backend=getattr(transform, 'imdecode_backend', None))
    if getattr(transform, 'to_float32', False):
        pixels = pixels.astype(np.float32)
    return {**data, 'img': pixels, 'img_shape': pixels.shape[:2], 'ori_shape': pixels.shape[:2]}


def _collate_of(cfg: Config) -> Callable[[list[Any]], Any]:
    """The function that makes batches of the test data, read as mmengine's Runner reads it."""
    function = (cfg.get('test_dataloader') or {}).get('collate_fn') or dict(type='pseudo_collate')
    if not isinstance(function, dict):
        return function
    options = {key: value for key, value in function.items() if key not in ('type', '_scope_')}
    kind = function['type']
    return functools.partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **options)


def read_image(image: str | Path | np.ndarray, any_kind: bool = False) -> np.ndarray:
    """A picture as BGR pixels, (H, W, 3).

    Args:
        image: path, or such pixels; (H, W) is gray.
        any_kind: pixels may have any number of channels and any finite values, as files have that are read unchanged.

    Raises:
        UserError: the file cannot be read, or the pixels are none.
    """
    if isinstance(image, np.ndarray):
        gray = image.ndim == 2
        right = image.dtype == np.uint8 and (gray or image.shape[2:] == (3,))
        if any_kind:
            right = image.dtype.kind in 'uif' and image.ndim in (2, 3) and bool(np.isfinite(image).all())
        if not image.size or not right:
            raise UserError(f'an array of shape {image.shape} and type {image.dtype} is no picture: give {PIXELS}')
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if gray and not any_kind else image
    _check_file(image)
    pixels = cv2.imread(str(image))
    if pixels is None:
        raise UserError(f'picture {image} cannot be read: damaged or not a picture')
    return pixels


def _check_file(image: str | Path) -> None:
    if not Path(image).is_file():
        raise UserError(f'picture {image} {"is a folder" if Path(image).is_dir() else "does not exist"}')
