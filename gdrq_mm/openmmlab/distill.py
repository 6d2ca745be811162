"""Distillation of a config: its teacher, and which outputs of the three libraries' models are compared."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch.nn as nn
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

from ..core.distill import Distance, Distillation, of_classes, of_features, of_probabilities
from ..core.errors import UserError
from .checkpoints import read_checkpoint
from .heads import TRAINING_ONLY, last_layers
from .models import drop_pretrained, use_memory_format
from .weights import is_quantized, load_weights

CLASS_LAYERS = ('*cls*', '*obj*', '*conf*')
"""Names, behind the last dot but a number, of the last layers of a detector that score classes and objects."""


def name_teacher(cfg: Config) -> None:
    """Write the teacher that `distill` leaves open, the checkpoint in `load_from`, into the config.

    A training that is resumed has another `load_from`, and the same teacher.
    """
    quantization = cfg.get('quantization')
    distill = quantization.get('distill') if isinstance(quantization, dict) else None
    if isinstance(distill, dict) and not distill.get('teacher') and cfg.get('load_from'):
        distill['teacher'] = cfg.load_from


def distances_of(model: Any) -> dict[str, Distance]:
    """Name of a module -> the distance of its outputs, for a bare model of the three libraries.

    Classifiers and segmentors: the logits. Detectors: the feature maps of the neck, and the scores of dense heads that
    are sigmoids; regions differ from one model to the other, so what a second stage says of them is not compared.

    Raises:
        UserError: nothing is known to compare.
    """
    found: dict[str, Distance] = {}
    detects = hasattr(model, 'bbox_head') or hasattr(model, 'rpn_head') or hasattr(model, 'roi_head')
    if detects and getattr(model, 'neck', None) is not None:
        found['neck'] = of_features
    for name in last_layers(model):
        part = name.partition('.')[0]
        if part in TRAINING_ONLY or part in ('roi_head', 'mask_head'):
            continue
        if not detects:
            found[name] = of_probabilities if _is_sigmoid(model, name) else of_classes
        elif _scores(name) and _is_sigmoid(model, name):
            found[name] = of_probabilities
    if not found:
        raise UserError(f'quantization.distill: no output of a {type(model).__name__} is known that could be compared')
    return found


def _scores(name: str) -> bool:
    parts = [part for part in name.split('.')[1:] if not part.isdigit()]
    return any(fnmatch.fnmatchcase(parts[-1] if parts else '', pattern) for pattern in CLASS_LAYERS)


def _is_sigmoid(model: nn.Module, name: str) -> bool:
    """Whether a layer's scores are sigmoids, as a loss of its head says: of one in a list of heads, or with several."""
    parts = name.split('.')
    heads: list[Any] = [model.get_submodule('.'.join(parts[:count])) for count in range(1, len(parts) + 1)]
    found = [getattr(head, key, None) for head in heads for key in ('loss_cls', 'loss_decode', 'loss_module')]
    losses = [each for loss in found for each in (loss if isinstance(loss, nn.ModuleList) else [loss])]
    inner = [each for loss in losses for each in (loss.modules() if isinstance(loss, nn.Module) else [loss])]
    sigmoid = [getattr(loss, 'use_sigmoid', False) for loss in inner]  # LabelSmoothLoss has one in it
    return any(sigmoid) or any(getattr(head, 'use_sigmoid_cls', False) for head in heads) or '_obj' in name


def distillation_of(model: Any, cfg: Config, unsafe: bool = False) -> Distillation:
    """The distillation that a config asks for, of its model, which is bare.

    Raises:
        UserError: there is no teacher, it cannot be read, or it is of another model.
    """
    distill = cfg.quantization.distill
    path = distill.get('teacher')
    if not path:
        raise UserError('quantization.distill needs a teacher: a float checkpoint in load_from or distill.teacher')
    architecture = cfg.model.copy()
    drop_pretrained(architecture)
    teacher: Any = revert_sync_batchnorm(MODELS.build(architecture))
    try:
        checkpoint = read_checkpoint(str(path), unsafe)
        if is_quantized(checkpoint):
            raise UserError(f'{path} is a quantized model; distill.teacher names the float checkpoint')
        load_weights(teacher, checkpoint, str(path), None)
    except UserError as error:
        raise UserError(f'quantization.distill: {error}') from None
    teacher.to(next(model.parameters()).device)
    use_memory_format(teacher, cfg)
    settings = {key: value for key, value in distill.items() if key != 'teacher'}

    def predict(inputs: Any, data_samples: Any = None) -> None:
        if not hasattr(teacher, 'rpn_head'):
            teacher(inputs, data_samples, mode='tensor')
            return
        maps = teacher.extract_feat(inputs)
        if teacher.with_rpn:
            teacher.rpn_head(maps)

    return Distillation(model, teacher, distances_of(model), **settings, predict=predict)
