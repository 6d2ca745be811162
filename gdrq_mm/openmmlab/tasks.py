"""What differs between classification, detection and segmentation when a config is tested."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.fileio import list_from_file
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from ..core.errors import UserError
from ..core.files import check_file, check_writable
from .mistakes import registered

TASKS = {'mmpretrain': 'cls', 'mmdet': 'det', 'mmseg': 'seg'}
"""Default scope of a config -> task."""

DRAWING = {
    'cls': ('VisualizationHook', 'UniversalVisualizer'),
    'det': ('DetVisualizationHook', 'DetLocalVisualizer'),
    'seg': ('SegVisualizationHook', 'SegLocalVisualizer'),
}
"""Task -> the hook that draws predictions, and the visualizer by which it does."""


def task_of(cfg: Config) -> str:
    """'cls', 'det' or 'seg'.

    Raises:
        UserError: the config's default_scope is none of the three libraries.
    """
    scope = cfg.get('default_scope')
    if not isinstance(scope, str) or scope not in TASKS:
        raise UserError(f'default_scope={scope!r} of the config is not one of {", ".join(TASKS)}')
    return TASKS[scope]


def scope_of(cfg: Config) -> str | None:
    """The library that a model's class is of, or is derived from; None where the config names no class."""
    kind = cfg.model.get('type')
    packages = [each.__module__.partition('.')[0] for each in getattr(kind, '__mro__', ())]
    return next((package for package in packages if package in TASKS), None)


def dataset_of(loader: Mapping[str, Any]) -> Any:
    """The innermost data set of a data loader's config."""
    return _datasets_of(loader)[-1]


def wrappers_of(loader: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings of the data sets around the innermost one of a data loader, such as the fold of a KFoldDataset."""
    around = _datasets_of(loader)[:-1]
    return [{key: value for key, value in each.items() if key not in ('dataset', '_scope_')} for each in around]


def _datasets_of(loader: Mapping[str, Any]) -> list[Any]:
    """The data set of a data loader's config, and those inside of it, the innermost last."""
    found = [(loader or {}).get('dataset') or {}]
    while 'dataset' in found[-1]:
        found.append(found[-1]['dataset'])
    return found


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


def metainfo_of(cfg: Config) -> dict[str, Any]:
    """What the data set to test or to validate with says of itself, such as `classes`: its class, then the config."""
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    dataset = next(_leaves(loader.get('dataset') or {}))
    found = registered(dataset.get('type'), DATASETS, cfg.default_scope)
    given = dict(dataset.get('metainfo') or {})
    if dataset.get('classes') is not None:  # mmpretrain's
        given = {'classes': dataset['classes'], **given}
    for key, value in given.items():
        if isinstance(value, str) and Path(value).expanduser().is_file():  # names in a file, as mmengine reads them
            given[key] = list_from_file(str(Path(value).expanduser()))
    return {**(getattr(found, 'METAINFO', None) or {}), **given}


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
    if task == 'cls' and _drawing_hook(cfg).get('enable'):
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
    if folder is not None:
        check_writable(Path(folder), '--show-dir')
    task, hook = task_of(cfg), _drawing_hook(cfg)
    cfg.visualizer = visualizer_of(cfg)
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
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'visualization': hook}


def _drawing_hook(cfg: Config) -> ConfigDict:
    """The config of the hook that draws predictions."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    return hook or ConfigDict(type=DRAWING[task_of(cfg)][0])


def visualizer_of(cfg: Config) -> ConfigDict:
    """The visualizer of a config; where it has none, that of the library, which writes files."""
    backends = [dict(type='LocalVisBackend')]
    return cfg.get('visualizer') or ConfigDict(type=DRAWING[task_of(cfg)][1], vis_backends=backends)


def metrics_of(cfg: Config) -> list[Any]:
    """The metrics of a test, however the evaluator is written."""
    found = cfg.test_evaluator.get('metrics') if isinstance(cfg.test_evaluator, dict) else None
    metrics = found or cfg.test_evaluator
    return metrics if isinstance(metrics, list) else [metrics]


def dump_before_build(cfg: Config, out: str) -> None:
    """`--out` for segmentation: let mmseg's metric write its predictions as PNGs of class indices into a folder."""
    if task_of(cfg) == 'seg':
        check_writable(Path(out), '--out')
        for metric in metrics_of(cfg):
            metric.update(output_dir=out, keep_results=True)
    elif not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out} does not end in .pkl or .pickle')
    else:
        check_file(out, '--out')


class _DumpHook(Hook):
    """Writes all predictions of a test; an evaluator of several data sets asks its own metrics only."""

    def __init__(self, dump: DumpResults) -> None:
        self.dump = dump

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        samples = [each.to_dict() if isinstance(each, BaseDataElement) else each for each in outputs or ()]
        self.dump.process(data_batch, samples)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.dump.evaluate(len(runner.test_loop.dataloader.dataset))  # type: ignore[union-attr]


def dump_after_build(cfg: Config, runner: Runner, out: str) -> None:
    """`--out` for classification and detection: write all predictions into a pickle, for offline evaluation."""
    task = task_of(cfg)
    if task == 'det':
        from mmdet.evaluation import DumpDetResults

        runner.register_hook(_DumpHook(DumpDetResults(out_file_path=out)))
    elif task == 'cls':
        runner.register_hook(_DumpHook(DumpResults(out_file_path=out)))
