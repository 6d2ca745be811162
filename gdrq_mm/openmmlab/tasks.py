"""What differs between classification, detection and segmentation when a config is tested."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from ..core.errors import UserError

TASKS = {'mmpretrain': 'cls', 'mmdet': 'det', 'mmseg': 'seg'}
"""Default scope of a config -> task."""


def task_of(cfg: Config) -> str:
    """'cls', 'det' or 'seg'.

    Raises:
        UserError: the config's default_scope is none of the three libraries.
    """
    scope = cfg.get('default_scope')
    if not isinstance(scope, str) or scope not in TASKS:
        raise UserError(f'default_scope={scope!r} of the config is not one of {", ".join(TASKS)}')
    return TASKS[scope]


def dataset_of(loader: Mapping[str, Any]) -> Any:
    """The innermost data set of a data loader's config."""
    dataset = (loader or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def pipeline_of(cfg: Config) -> list[Any]:
    """The transforms of the test data, or where there are none of the validation data; those of a wrapper come last.

    Of several data sets it is the pipeline of the first one.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        if cfg.get(name):
            return _transforms(cfg[name].get('dataset'))
    return []


def _transforms(dataset: Any) -> list[Any]:
    if not isinstance(dataset, Mapping):
        return []
    inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
    return [*_transforms(inner), *(dataset.get('pipeline') or ())]


def _leaves(dataset: Any) -> Iterator[Any]:
    """The data sets in a wrapped one."""
    inner = [each for each in (dataset.get('dataset'), *(dataset.get('datasets') or ())) if each]
    for each in inner:
        yield from _leaves(each)
    if not inner:
        yield dataset


def type_name(part: Any) -> str:
    """The name of what a part of a config is, without its scope or module; a pure Python config has the class."""
    kind = part.get('type', '') if isinstance(part, Mapping) else type(part)
    return (kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))).split('.')[-1]


def use_tta(cfg: Config) -> None:
    """Test-time augmentation: with the config's `tta_model` and `tta_pipeline`, else by a flip, as OpenMMLab does.

    Raises:
        UserError: a segmentation config has neither, or --show is given for classification.
    """
    task = task_of(cfg)
    datasets = list(_leaves(cfg.test_dataloader.dataset))
    dataset = datasets[0]
    if not isinstance(dataset.get('pipeline'), list):
        raise UserError(f'--tta: the pipeline of the test data is {dataset.get("pipeline")!r}, not a list')
    if task == 'cls' and cfg.default_hooks.get('visualization', {}).get('enable'):
        raise UserError(
            "--tta cannot be combined with --show or --show-dir: mmpretrain's hook draws single inputs only"
        )
    if task == 'seg' and not ('tta_model' in cfg and 'tta_pipeline' in cfg):
        raise UserError('--tta needs tta_model and tta_pipeline in the config')
    if 'tta_model' not in cfg:
        det = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
        cfg.tta_model = det if task == 'det' else dict(type='mmpretrain.AverageClsScoreTTA')
    if 'tta_pipeline' not in cfg:
        pack = copy.deepcopy(dataset.pipeline[-1])
        if task == 'det':
            flip = ('flip', 'flip_direction')
            pack.meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', *flip)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        cfg.tta_pipeline = [*dataset.pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [pack]])]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def show_predictions(cfg: Config, show: bool, folder: str | None, wait_time: float) -> None:
    """Switch on the library's visualization hook, which draws predictions in a window or into a folder."""
    task = task_of(cfg)
    name = {'cls': 'VisualizationHook', 'det': 'DetVisualizationHook', 'seg': 'SegVisualizationHook'}[task]
    hook = cfg.default_hooks.setdefault('visualization', ConfigDict(type=name))
    hook.show, hook.wait_time = show, wait_time
    if task == 'cls':
        hook.enable, hook.out_dir, hook.interval = True, folder, 1
    elif task == 'det':
        hook.draw, hook.test_out_dir = (
            True,
            folder and os.path.abspath(folder),
        )  # a relative path would be taken below the work directory
    else:
        hook.draw, hook.interval = True, 1
        if folder is not None:
            cfg.visualizer.save_dir = folder


def dump_before_build(cfg: Config, out: str) -> None:
    """`--out` for segmentation: let mmseg's metric write its predictions as PNGs of class indices into a folder."""
    if task_of(cfg) == 'seg':
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=out, keep_results=True)
    elif not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out} does not end in .pkl or .pickle')


def dump_after_build(cfg: Config, runner: Runner, out: str) -> None:
    """`--out` for classification and detection: write all predictions into a pickle, for offline evaluation."""
    task = task_of(cfg)
    if task == 'det':
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=out))
    elif task == 'cls':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=out))
