"""Sensitivities of the layers of a config's model, and the file that keeps them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.runner import Runner
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_whole
from ..core.mixed.choices import Candidates
from ..core.mixed.sensitivity import loss_sensitivity
from .analysis import evaluate, metric_of, progress_of, take_samples
from .hooks.calibration import own_loader
from .models import bare_model
from .seeding import kept_random_state
from .tasks import task_of

VERSION = 1
"""Version of the file's layout."""
Table = dict[str, dict[int, float]]
"""Choice -> bits -> sensitivity."""


class SensitivityFile:
    """What was measured so far, as JSON: written anew after each value that took long, so that work goes on there.

    Args:
        path: of the file; it may exist.
        about: what the values depend on: the checkpoint by its hash, the `quantization` dict, how they were measured.

    Raises:
        UserError: the file is damaged, or of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(sensitivities_version=VERSION, **about)
        self.values: Table = {}
        self.notes: dict[str, Any] = {}
        """What else was found on the way, such as the metric of the float model."""
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text())
            self.values = {
                str(choice): {int(bits): float(value) for bits, value in options.items()}
                for choice, options in found.pop('values').items()
            }
            self.notes = dict(found.pop('notes'))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{self.path} is no file of sensitivities: {type(error).__name__} {error}') from None
        for key, value in json.loads(json.dumps(self.about)).items():
            if found.get(key) != value:
                raise UserError(
                    f'{self.path} has the sensitivities of another {key}: {_short(found.get(key))}, not '
                    f'{_short(value)}; name another file with --sensitivities'
                )

    def missing(self, candidates: Candidates) -> list[tuple[str, int]]:
        """Choices and bits that have no value yet."""
        pairs = ((choice.name, bits) for choice in candidates.choices for bits in choice.bits)
        return [(name, bits) for name, bits in pairs if bits not in self.values.get(name, {})]

    def write(self) -> None:
        """Write the file whole."""
        text = json.dumps(dict(**self.about, notes=self.notes, values=self.values), indent=1)
        write_whole(self.path, (text + '\n').encode())

    def table(self, candidates: Candidates) -> Table:
        """The values of these candidates."""
        return {choice.name: {b: self.values[choice.name][b] for b in choice.bits} for choice in candidates.choices}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + '...'


def batches_of(runner: Runner, count: int) -> list[Any]:
    """The first training batches, drawn as calibration draws them."""
    with kept_random_state():
        return list(islice(own_loader(runner), count))


def loss_of(runner: Runner, batch: Any) -> Tensor:
    """The loss of the task for a training batch, which stays as it is."""
    model = bare_model(runner.model)
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    return model.parse_losses(model(**data, mode='loss'))[0]


def measure_loss(runner: Runner, candidates: Candidates, file: SensitivityFile, batches: Iterable[Any]) -> None:
    """Fill a file with the expected rise of the loss, see core/mixed/sensitivity.py."""
    if file.missing(candidates):
        with kept_random_state():
            found = loss_sensitivity(candidates, batches, lambda b: loss_of(runner, b), lambda b: len(b['inputs']))
        for name, options in found.items():
            file.values.setdefault(name, {}).update(options)
        file.write()


def measure_metric(
    runner: Runner,
    candidates: Candidates,
    file: SensitivityFile,
    samples: int | None,
    metric: str | None,
    show_progress: bool = True,
) -> None:
    """Fill a file with what the metric loses when only one choice is quantized; a test run for each of its bits.

    Args:
        samples: how many test pictures to use, evenly spaced; None: all.
        metric: key of the metric; None: the main one of the task.

    Raises:
        UserError: the evaluator does not compute the metric.
    """
    task = task_of(runner.cfg)
    if samples is not None:
        take_samples(runner.test_loop, samples)
    missing = file.missing(candidates)
    first = [] if 'float' in file.notes else ['everything float']
    with progress_of(runner, len(missing) + len(first), show_progress) as start:
        for title in first:
            start(title)
            with candidates.alone('', 0):
                values = evaluate(runner)
            key, name, factor = metric_of(values, metric, task)
            file.notes = dict(metric=key, title=name, factor=factor, float=float(values[key]) * factor)
            file.write()
        key, factor = file.notes['metric'], file.notes['factor']
        for name, bits in missing:
            start(f'{name} with {bits} bits')
            with candidates.alone(name, bits):
                value = float(evaluate(runner).get(key, 0.0)) * factor
            file.values.setdefault(name, {})[bits] = file.notes['float'] - value
            file.write()
