"""A trained model for your own program: build it, predict, draw. The libraries' inference functions accept it too."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, DefaultScope, init_default_scope
from mmengine.structures import PixelData

from ..core.errors import UserError
from ..deploy.from_packed import load_packed
from ..deploy.packed import is_packed
from .checkpoints import read_checkpoint
from .cli import read_config
from .compat import check_environment
from .data_only import data_only
from .mistakes import registered
from .models import drop_pretrained, prepare_model, quantization_of, read_quantization
from .pictures import batch_of, picture_pipeline, read_image
from .tasks import metainfo_of, task_of, visualizer_of
from .weights import dataset_meta_of, load_weights, plan_of

NOISE = (240, 320)
"""Size of the picture from which an inference model learns what feeds what; pipelines resize it as they like."""
LEGIBLE = 320
"""Pictures are drawn with a shorter side of about so many pixels at least, else labels cannot be read."""


def init_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    unsafe_load: bool = False,
) -> Any:
    """A float or quantized model that is ready to predict.

    mmdet's `inference_detector`, mmseg's `inference_model` and mmpretrain's `inference_model` accept it. Their own
    `init_*` functions would build a plain model and evaluate it in float.

    Args:
        config: path of a config, or the config.
        checkpoint: path or address; without it the weights are random. A packed file (`gdrq export --format
            packed`) gives the integers of the trained model, computed by torch.
        device: such as 'cuda:0'; by default a GPU if there is one.
        cfg_options: settings to override, such as {'model.test_cfg.score_thr': 0.1}.
        unsafe_load: unpickle whatever the checkpoint, and others that the model loads, hold; that runs their code.

    Raises:
        UserError: the config or the checkpoint cannot be read, they do not fit, or there is no such device.
    """
    check_environment()
    place = _device(device)
    if isinstance(config, Config):
        cfg = copy.deepcopy(config)
        cfg.merge_from_dict(cfg_options or {})
    else:
        cfg = read_config(config, cfg_options)
    task = task_of(cfg)
    init_default_scope(cfg.default_scope)
    drop_pretrained(cfg.model)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with data_only(unsafe_load):
        model: Any = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))  # mmdet's heads write to it
    model.cfg = model._config = cfg
    if task == 'seg':  # what mmseg's inference_model reads
        cfg.test_pipeline = picture_pipeline(cfg)
    if task == 'cls':  # what mmpretrain's reads, and how it finds its inferencer
        model._config = copy.deepcopy(cfg)
        model._config.test_dataloader = dict(dataset=dict(pipeline=picture_pipeline(cfg)))
        model._metainfo = SimpleNamespace(results=[SimpleNamespace(task='Image Classification')])
    model.dataset_meta = model._dataset_meta = {}
    if checkpoint is not None and is_packed(checkpoint):
        _load_packed(model, checkpoint)
    else:
        content = None if checkpoint is None else read_checkpoint(str(checkpoint), unsafe_load)
        plan = None if content is None else plan_of(model, content, str(checkpoint))
        noise = np.random.default_rng(0).integers(0, 256, (*NOISE, 3), np.uint8)
        model.plan = prepare_model(model, cfg, [lambda: infer(model, noise)], plan).plan
        model.eval()
        if content is not None:
            load_weights(model, content, str(checkpoint), quantization_of(cfg))
            model.dataset_meta = model._dataset_meta = dataset_meta_of(content, str(checkpoint))
    if not model.dataset_meta.get('classes'):
        model.dataset_meta.update(metainfo_of(cfg))
    return model.to(place)


def _device(name: str | None) -> torch.device:
    """A device by its name, by default a GPU if there is one.

    Raises:
        UserError: there is no such device here.
    """
    try:
        return torch.empty(0, device=name or get_device()).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by what torch was built with
        raise UserError(f'device {name!r} cannot be used: {error}'.splitlines()[0]) from None


def _load_packed(model: Any, path: str | Path) -> None:
    quantization = read_quantization(model.cfg)
    if quantization is None:
        raise UserError(f'packed file {path} holds a quantized model, the config has no quantization')
    _, model.dataset_meta = load_packed(model, path, quantization)
    model._dataset_meta = model.dataset_meta


def infer(model: Any, image: str | Path | np.ndarray) -> Any:
    """The prediction for one picture, as the data sample of the model's library.

    The picture goes through the pipeline of the config's test data.

    Args:
        image: path, or uint8 BGR pixels (H, W, 3).

    Raises:
        UserError: the file cannot be read, or the pixels are none.
    """
    batch = batch_of(model.cfg, image)
    with DefaultScope.overwrite_default_scope(model.cfg.default_scope), torch.no_grad():
        return model.test_step(batch)[0]


def draw(model: Any, image: str | Path | np.ndarray, prediction: Any, score_thr: float = 0.3) -> np.ndarray:
    """The picture with its class, boxes or mask drawn onto it, RGB; a small one is enlarged first.

    Args:
        image: as for :func:`infer`.
        prediction: what :func:`infer` returned.
        score_thr: boxes below it are left out.

    Raises:
        UserError: the prediction has no boxes, as that of a panoptic detector.
    """
    pixels = read_image(image)
    factor = max(1, round(LEGIBLE / min(pixels.shape[:2])))
    pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)[..., ::-1].copy()
    task, visualizer = task_of(model.cfg), _visualizer(model)
    if task == 'cls':
        visualizer.visualize_cls(pixels, prediction, classes=model.dataset_meta.get('classes'), draw_gt=False)
    elif task == 'det':
        prediction = copy.deepcopy(prediction.cpu())
        if 'pred_instances' not in prediction:
            raise UserError(f'{type(model).__name__} predicts {", ".join(prediction.keys())} and no boxes to draw')
        found = prediction.pred_instances
        found.bboxes *= factor
        if 'masks' in found:
            found.masks = found.masks.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        visualizer.add_datasample('', pixels, prediction, draw_gt=False, pred_score_thr=score_thr)
    else:
        prediction = prediction.cpu().clone()
        labels = prediction.pred_sem_seg.data
        visualizer.dataset_meta = _with_colors(model.dataset_meta, int(labels.max()) + 1)
        prediction.pred_sem_seg = PixelData(data=labels.repeat_interleave(factor, -1).repeat_interleave(factor, -2))
        visualizer.add_datasample('', pixels, prediction, draw_gt=False, with_labels=False)
    return visualizer.get_image()


def _visualizer(model: Any) -> Any:
    """The visualizer of a model's config. Not by its registry, which would return that of an earlier model."""
    options = dict(visualizer_of(model.cfg))
    scope = options.pop('_scope_', None) or model.cfg.default_scope
    visualizer_class = registered(options.pop('type'), VISUALIZERS, scope)
    visualizer = visualizer_class(**{**options, 'name': 'infer', 'vis_backends': None})
    visualizer.dataset_meta = model.dataset_meta
    return visualizer


def _with_colors(meta: dict[str, Any], number: int) -> dict[str, Any]:
    """What is known of a data set, with names and colors for `number` classes where it has none: mmseg needs them."""
    classes = meta.get('classes') or [str(label) for label in range(number)]
    palette = meta.get('palette') or []
    if len(palette) < len(classes):
        palette = np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
    return {**meta, 'classes': classes, 'palette': palette}
