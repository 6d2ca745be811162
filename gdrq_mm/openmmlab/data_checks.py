"""Checks of data sets: bad data ends in one message that names the file.

Before training if that is cheap: what annotation files say, whether pictures and masks exist, whether the heads have
enough classes for the labels. Else when a sample is loaded: whether picture and mask can be decoded, are of one size,
and the labels of the mask are classes.
"""

from __future__ import annotations

import logging
import numbers
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from torch.utils.data import DataLoader

from ..core.errors import UserError
from ..data.checks import DAMAGED, check_annotations, few, read_annotations, wrong_mask
from ..data.layout import refuse_missing
from .processes import shield_workers


def check_loader(loader: DataLoader, cfg: Config, known: dict[str, Sequence[str]]) -> None:
    """Shield the workers of a data loader from signals, and check its data set; `known`: classes of others."""
    shield_workers(loader)
    check_dataset(loader.dataset, labels_of(cfg.model))
    if cfg.get('default_scope') != 'mmpretrain':
        return  # the others look labels up by name, and a detector may be asked for any names
    classes = (getattr(loader.dataset, 'metainfo', None) or {}).get('classes')
    inner: Any = loader.dataset
    while not isinstance(inner, BaseDataset) and hasattr(inner, 'dataset'):
        inner = inner.dataset
    refuse_other_labels(known, _name(inner) if isinstance(inner, BaseDataset) else type(inner).__name__, classes)


def refuse_other_labels(known: dict[str, Sequence[str]], name: str, classes: Any) -> None:
    """Note the classes of a data set or a checkpoint; `known` are those of before.

    mmpretrain numbers the folders of each split on its own: where one is missing, all later labels are others.

    Raises:
        UserError: a class has another label there than in one of before.
    """
    classes = list(classes) if isinstance(classes, (list, tuple)) else []
    for other, theirs in known.items():
        labels = {each: label for label, each in enumerate(theirs)}
        for label, each in enumerate(classes if list(theirs) != classes else ()):
            if labels.get(each, label) != label and theirs.count(each) == classes.count(each) == 1:  # ImageNet: 'crane'
                raise UserError(f'{name}: the class {each!r} has the label {label}, and {labels[each]} in {other}')
    known[name] = classes


class DataError(UserError):
    """A UserError of a loader's worker process: torch makes it anew, with a traceback before the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].removeprefix(f'{__name__}.DataError: '))


@contextmanager
def checked_reading(cfg: Config) -> Iterator[None]:
    """Check annotations while data sets are built: reading them once more would take long on big data."""

    def serialize(dataset: BaseDataset) -> Any:
        _refuse_empty(dataset, len(dataset.data_list))  # mmengine would fail to concatenate nothing
        return original(dataset)

    original = BaseDataset._serialize_data
    with ExitStack() as stack:
        stack.enter_context(_replaced(BaseDataset, '_serialize_data', serialize))
        if cfg.get('default_scope') == 'mmdet':
            _check_mmdet(stack, _evaluated_files(cfg))
        yield


def _evaluated_files(cfg: Config) -> set[str]:
    """Annotation files that evaluators read by themselves."""
    found: set[str] = set()
    for name in ('val_evaluator', 'test_evaluator'):
        given = cfg.get(name) or []
        for each in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(each, dict) and isinstance(each.get('ann_file'), str):
                found.add(os.path.abspath(each['ann_file']))
    return found


def _check_mmdet(stack: ExitStack, evaluated: set[str]) -> None:
    from mmdet.datasets import CocoDataset, XMLDataset
    from mmdet.datasets.api_wrappers import COCO

    def read(dataset: CocoDataset, path: str) -> COCO:
        coco = COCO()
        again = os.path.abspath(path) in evaluated
        coco.dataset = read_annotations(path, dataset.ann_file, again)
        classes = dataset.metainfo['classes']
        warning = check_annotations(coco.dataset, dataset.ann_file, classes, again)
        if warning:
            print_log(warning, logger='current', level=logging.WARNING)
        if not (dataset.test_mode or coco.dataset['annotations']):
            raise UserError(f'{dataset.ann_file} has no annotations to train with')
        coco.createIndex()
        coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs  # mmdet's names, set when it is made
        return coco

    def parse(dataset: XMLDataset, info: dict[str, Any]) -> Any:
        try:
            return original(dataset, info)
        except (ET.ParseError, AttributeError, ValueError) as error:
            raise UserError(f'{info["xml_path"]} is not an annotation of Pascal VOC: {error}') from None

    original = XMLDataset.parse_data_info
    stack.enter_context(_replaced(CocoDataset, 'COCOAPI', read))
    stack.enter_context(_replaced(XMLDataset, 'parse_data_info', parse))


@contextmanager
def _replaced(cls: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(cls, name)
    setattr(cls, name, function)
    try:
        yield
    finally:
        setattr(cls, name, before)


def _refuse_empty(dataset: BaseDataset, number: int) -> None:
    if not number:
        raise UserError(f'{_name(dataset)} has no pictures that can be used')


def _name(dataset: BaseDataset) -> str:
    places = (dataset.ann_file, *dataset.data_prefix.values(), dataset.data_root)
    return f'{type(dataset).__name__} of {next(filter(None, places), "")}'


UNREADABLE = (*DAMAGED, AssertionError, AttributeError, cv2.error)
"""What mmcv, OpenCV and Pillow raise on a damaged file; other errors are the config's."""


class _Checked:
    """A transform that loads a file, with errors that name it."""

    def __init__(self, transform: Any, classes: int, ignored: frozenset[int]) -> None:
        self.transform, self.classes, self.ignored = transform, classes, ignored

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        path = data.get('seg_map_path') if 'img' in data else None  # the picture is loaded first
        path = path or data.get('img_path')
        try:
            loaded = self.transform(data)
        except DataError:
            raise
        except UserError as error:  # of data_only: it names the file
            raise DataError(str(error)) from error
        except UNREADABLE as error:
            reason = getattr(error, 'strerror', None) or f'damaged or not a picture ({error})'.splitlines()[0]
            raise DataError(f'{path} cannot be read: {reason}') from error
        mask = (loaded or {}).get('gt_seg_map')
        if mask is not None and self.classes and 'ori_shape' in data:
            wrong = wrong_mask(mask, data['ori_shape'][:2], self.classes, self.ignored)
            if wrong:
                raise DataError(f'{path} {wrong}')
        return loaded


@dataclass(frozen=True)
class Labels:
    """What the heads of a model know of labels.

    Attributes:
        classes: of the head that has most; 0 if the config does not say. A single class is 0 too: mmseg's heads learn
            the labels 0 and 1 with one output, mmdet's RPN learns one class from all labels.
        ignored: labels that a head leaves out.
    """

    classes: int = 0
    ignored: frozenset[int] = frozenset()


def labels_of(model: Any) -> Labels:
    """What the heads in a model's config, a dict or a list of them, know of labels."""
    found = [
        labels_of(each)
        for each in (model.values() if isinstance(model, dict) else model)
        if isinstance(each, (dict, list, tuple))
    ]
    if isinstance(model, dict) and isinstance(model.get('num_classes'), int):
        classes = model['num_classes']
        found.append(Labels(classes if classes > 1 else 0, frozenset({model.get('ignore_index', 255)} - {None})))
    return Labels(max((each.classes for each in found), default=0), frozenset().union(*(e.ignored for e in found)))


def check_dataset(dataset: Any, labels: Labels) -> None:
    """Check that the files of a data set exist and its labels are known, and let it name a file that it cannot load.

    Raises:
        UserError: it is empty, some do not exist, or the model has too few classes.
    """
    inner = getattr(dataset, 'datasets', None) or [d for d in [getattr(dataset, 'dataset', None)] if d is not None]
    for each in inner:
        check_dataset(each, labels)
    if not isinstance(dataset, BaseDataset):
        return
    _refuse_empty(dataset, len(dataset))
    names = list(dataset.metainfo.get('classes') or ())
    _refuse_other_order(dataset, names)
    classes = len(names)
    fits = dataset.test_mode or not labels.classes or 0 < classes <= labels.classes
    listed = not dataset.ann_file and 'seg_map_path' not in dataset.get_data_info(0)  # by the folders of its pictures
    if not (listed and fits):
        elsewhere = any(getattr(t, 'backend_args', None) for t in dataset.pipeline.transforms)
        _check_samples(dataset, labels.classes, not (listed or elsewhere))
    if not fits:
        classes = min(classes, labels.classes)
    _wrap(dataset.pipeline, classes if hasattr(dataset, 'reduce_zero_label') else 0, labels.ignored)  # mmseg's have it


def _refuse_other_order(dataset: BaseDataset, names: list[str]) -> None:
    """Refuse `classes` that are those of mmpretrain's folders in another order: labels are those of the folders."""
    folders = list(getattr(dataset, 'folder_to_idx', ()))
    if folders != names and sorted(folders) == sorted(names):
        raise UserError(f'{_name(dataset)}: metainfo.classes is not in the order of its folders, {few(folders)}')


def _check_samples(dataset: BaseDataset, classes: int, files: bool) -> None:
    """Refuse labels that no head knows and, with `files`, files that are not there.

    Labels of masks are seen when they are loaded. Of data to test with only those of pictures are looked at.
    """
    folders: dict[str, set[str]] = {}  # listing a folder is faster than asking for each file
    missing = []
    for number in range(len(dataset)):
        info = dataset.get_data_info(number)
        found = _labels(info, dataset.test_mode)
        wrong = [label for label in found if not 0 <= label < classes]
        if classes and wrong:
            raise UserError(
                f'{_name(dataset)}: {info.get("img_path", f"sample {number}")} has the label {wrong[0]}, '
                f'and num_classes={classes} in the model allows 0 to {classes - 1}'
            )
        for path in (info.get('img_path'), info.get('seg_map_path')) if files else ():
            if not isinstance(path, str) or '://' in path:
                continue
            folder, file = os.path.split(path)
            if folder not in folders:
                folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if file not in folders[folder]:
                missing.append(path)
    refuse_missing(_name(dataset), missing)


def _labels(info: dict[str, Any], test_mode: bool) -> list[int]:
    label = info.get('gt_label')
    found = [label] if isinstance(label, numbers.Integral) else label if isinstance(label, (list, tuple)) else []
    boxes = [] if test_mode else [box for box in info.get('instances') or () if not box.get('ignore_flag')]
    return [*found, *(box.get('bbox_label', 0) for box in boxes)]


def _wrap(pipeline: Any, classes: int, ignored: frozenset[int]) -> None:
    for number, transform in enumerate(pipeline.transforms):
        if type(transform).__name__.startswith('Load'):
            pipeline.transforms[number] = _Checked(transform, classes, ignored)
        for inner in getattr(transform, 'subroutines', ()):  # TestTimeAug
            _wrap(inner, classes, ignored)
