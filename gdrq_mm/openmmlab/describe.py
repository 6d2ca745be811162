"""The run record of a config: what was tested, on which data, from which checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.config import Config

from ..core.config import Quantization
from ..core.convert import Report
from ..core.quantizers import Quantizer, Stage
from ..report.layers import totals
from ..report.provenance import git_revision, hardware, versions
from ..report.record import VERSION, plain
from .checkpoints import checkpoint_digest
from .recipe import settings_of, without
from .tasks import dataset_of, task_of, type_name, wrappers_of

LARGEST = 100_000
"""What an evaluator returned beside numbers is kept up to so many characters."""


def make_record(
    cfg: Config,
    checkpoint: str,
    metrics: Mapping[str, Any],
    model: Mapping[str, Any],
    training: Mapping[str, Any],
) -> dict:
    """A record of one test run.

    Args:
        cfg: the config that was run.
        checkpoint: path or address of the checkpoint that was tested.
        metrics: what the evaluator returned.
        model: what QuantRunner.describe() says of the model: sizes in bytes, bits, methods.
        training: what QuantRunner.training says of the run that wrote the checkpoint: seed, length, start checkpoint,
            recipe, and its `quantization` dict, which is what the record states; an older checkpoint has none.
    """
    quantization = plain(training.get('quantization', cfg.get('quantization')))
    if quantization != plain(cfg.get('quantization')):
        model = {**model, **settings_of(None if quantization is None else Quantization.from_dict(quantization))}
    numbers, others = _metrics(metrics)
    return dict(
        record_version=VERSION,
        time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        task=task_of(cfg),
        model=dict(name=model_name(cfg), config_sha256=_digest(_architecture(_bare(cfg.model))), **model),
        data=_data(cfg),
        metrics=numbers,
        **(dict(other_metrics=others) if others else {}),
        quantization=_with_short_teacher(quantization),
        config=dict(file=_relative(cfg.filename), text=_config_text(cfg)),
        checkpoint=dict(file=_relative(checkpoint), sha256=checkpoint_digest(checkpoint)),
        training={key: value for key, value in training.items() if key != 'quantization'},
        git=git_revision(),
        versions=versions(),
        hardware=hardware(),
    )


def _with_short_teacher(quantization: Any) -> Any:
    """The `quantization` dict for a record, which is published: with the teacher as :func:`_relative` tells it."""
    distill = (quantization or {}).get('distill')
    if not distill or not distill.get('teacher'):
        return quantization
    return {**quantization, 'distill': {**distill, 'teacher': _relative(distill['teacher'])}}


def compared_by(cfg: Config) -> tuple[str, str]:
    """What the records of two configs must have in common to be compared: the model, and data and evaluation."""
    data = _data(cfg)
    return _digest(_architecture(_bare(cfg.model))), f'{data["name"]} {data["evaluation_sha256"]}'


def mean_of(record: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a record states of several checkpoints of one training: mean metrics, and those of each.

    Args:
        record: that of the last checkpoint.
        others: path of a checkpoint -> what the evaluator returned for it.
    """
    each = [{**record['checkpoint'], 'metrics': record['metrics']}]
    for checkpoint, metrics in others.items():
        file = dict(file=_relative(checkpoint), sha256=checkpoint_digest(checkpoint))
        each.append({**file, 'metrics': _metrics(metrics)[0]})
    found = [one['metrics'] for one in each]
    if record['task'] == 'det':  # a detector that detects nothing has no metrics: all of them are 0
        found = [metrics or dict.fromkeys(next(filter(None, found), {}), 0.0) for metrics in found]
    names = [name for name in found[0] if all(name in metrics for metrics in found)]
    return dict(metrics={n: statistics.fmean(metrics[n] for metrics in found) for n in names}, checkpoints=each)


def describe_model(model: nn.Module, config: Quantization | None, report: Report) -> dict[str, Any]:
    """What a run record says of a bare model: methods, bits, stage, sizes."""
    stages = {m.stage for m in model.modules() if isinstance(m, Quantizer)} - {Stage.FLOAT}
    return dict(
        **settings_of(config),
        stage=max(stages).name.lower() if stages else 'float',
        **dataclasses.asdict(totals(model, report)),
    )


def _metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The metrics that are numbers, and what else an evaluator returned, such as a confusion matrix, as plain data."""
    numbers: dict[str, float] = {}
    others: dict[str, Any] = {}
    for key, value in metrics.items():
        one = plain(value)
        while isinstance(one, list) and len(one) == 1:
            one = one[0]
        if isinstance(one, (int, float)) or one in ('nan', 'inf', '-inf'):  # as `plain` writes them
            numbers[key] = float(one)
        else:
            size = len(str(one))
            others[key] = one if size <= LARGEST else f'{type(value).__name__} of {size} characters, left out'
    return numbers, others


def model_name(cfg: Config) -> str:
    """A short name such as 'ResNet_CIFAR-18', 'FasterRCNN ResNet-50' or 'PSP ResNetV1c-50'."""
    model = _bare(cfg.model)
    backbone = model.get('backbone') or {}
    name = type_name(backbone)
    size = backbone.get('depth') or backbone.get('arch')
    name = f'{name}-{size}' if isinstance(size, (int, str)) else name
    heads = model.get('decode_head') or model  # mmseg's models differ in it only
    whole = type_name(heads[-1] if isinstance(heads, list) else heads).removesuffix('Head')
    return name if whole == 'ImageClassifier' else f'{whole} {name}'.strip()


WRITING = ('output_dir', 'keep_results')
"""Settings of mmseg's metric that write predictions, as `gdrq test --out` does."""


def _data(cfg: Config) -> dict[str, Any]:
    """What decides whether two records can be compared: data set, split and evaluation settings."""
    dataset = plain(dataset_of(cfg.test_dataloader))
    evaluators = plain(cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator])
    root, around = _root(dataset), wrappers_of(cfg.test_dataloader)
    settings = _paths_below({k: v for k, v in dataset.items() if k not in ('data_root', '_scope_')}, root)
    parts = Path(root).parts
    below = parts[len(parts) - parts[::-1].index('data') :] if 'data' in parts else parts[-1:]
    kind = type_name(dataset_of(cfg.test_dataloader))
    return dict(
        name='/'.join(below) or kind,
        type=kind,
        root=_relative(root),
        # Records made on different machines are comparable: paths count from the data folder on.
        evaluation_sha256=_digest(
            [settings, _paths_below(without(evaluators, WRITING), root), *([plain(around)] if around else [])]
        ),
    )


def _root(dataset: Mapping[str, Any]) -> str:
    """The folder of a data set: its data_root, else what its absolute paths have in common; '' if there are none."""
    if dataset.get('data_root'):
        return str(dataset['data_root'])
    roots = [_root(inner) for inner in dataset.get('datasets') or [] if isinstance(inner, dict)]
    found = list(filter(None, roots)) or [text for text in _strings(dataset) if text.startswith('/')]
    if not found:
        return ''
    common = os.path.commonpath(found) if len({text.startswith('/') for text in found}) == 1 else found[0]
    return os.path.dirname(common) if Path(common).suffix else common


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _paths_below(value: Any, root: str) -> Any:
    """A value in which paths below a folder begin at that folder."""
    if isinstance(value, dict):
        return {key: _paths_below(inner, root) for key, inner in value.items() if key != 'data_root'}
    if isinstance(value, list):
        return [_paths_below(inner, root) for inner in value]
    inside = isinstance(value, str) and root and f'{value}/'.startswith(f'{root.rstrip("/")}/')
    return value[len(root) :].lstrip('/') if inside else value


def _bare(model: Any) -> Any:
    """The model config inside that of test-time augmentation."""
    while 'module' in model:
        model = model['module']
    return model


def _config_text(cfg: Config) -> str:
    shown = copy.deepcopy(cfg)
    shown.work_dir, shown.load_from = _relative(cfg.get('work_dir')), _relative(cfg.get('load_from'))
    # A record is published: it must not show the folders of a machine.
    return re.sub(r"'(/[^'\n]+)'", lambda match: repr(_relative(match[1])), shown.pretty_text)


def _architecture(model: Any) -> Any:
    """A model config without the keys that do not change the architecture: initial weights, settings of training."""
    if isinstance(model, Mapping):
        return {k: _architecture(v) for k, v in model.items() if k not in ('init_cfg', '_scope_', 'train_cfg')}
    return [_architecture(v) for v in model] if isinstance(model, (list, tuple)) else model


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relative(path: str | None) -> str | None:
    """A path relative to the working directory, or only its name outside of it; an address stays as it is."""
    if not path or '://' in path:
        return path
    relative = os.path.relpath(path)
    return Path(path).name if relative.startswith('..') else relative
