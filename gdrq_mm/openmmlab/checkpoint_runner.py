"""mmengine's Runner with checkpoints that run no code, that are checked when they are loaded, and written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from mmengine.dist import all_gather_object, get_world_size, master_only
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import EpochBasedTrainLoop, Runner, find_latest_checkpoint

from ..core.convert import Report
from ..core.errors import UserError
from ..core.topology import Plan
from .accumulation import accumulated, is_between_steps, restore
from .checkpoints import checkpoint_digest, last_written, read_checkpoint, written_whole
from .data_checks import refuse_other_labels
from .data_only import data_only
from .hooks import OscillationHook, StopHook, WorkDirHook
from .loading import go_on
from .models import bare_model, quantization_of
from .recipe import changed_settings, trained_as, training_of
from .weights import dataset_meta_of, load_weights, meta_of, plan_of, renamed


class CheckpointRunner(Runner):
    """What QuantRunner does with checkpoints.

    Files that the libraries read for it are read as data, see data_only.py. `unsafe_load = True` in the config lets
    checkpoints and data files run what they hold (tools: --unsafe-load).
    """

    report: Report
    _train_loop: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.training: dict[str, Any] = {}
        """What the checkpoint says of the run that wrote it: seed, epochs, iterations, and where it started from."""
        self.needed_share = 0.5
        """Share of the parameters that a checkpoint to start from must have: another head may start anew."""
        self.changed: list[str] = []
        """In what the recipe was changed when the training was resumed; a record states the last recipe."""
        self.run_id = ''
        """The training that the checkpoints in the work directory belong to; a resumed one keeps it."""
        self.known_classes: dict[str, Sequence[str]] = {}
        """Data set, or checkpoint that is tested, -> its classes; see `refuse_other_labels`."""
        self.resumed = False
        self.validated_at = -1
        """The iteration after which validation began last."""
        self.resumed_unvalidated = False
        """Whether the checkpoint that was resumed had been saved before the validation of its state."""
        self._read: dict[str, dict[str, Any]] = {}  # file name -> a checkpoint that waits to be loaded
        with data_only(bool((kwargs.get('cfg') or {}).get('unsafe_load'))):
            super().__init__(*args, **kwargs)

    def dump_config(self) -> None:
        """Write the config into the work directory, but not over itself: a test has taken out of it what trains."""
        own = Path(self.cfg.filename or '')
        written = Path(self.work_dir) / own.name
        if not (own.is_file() and written.is_file() and own.samefile(written)):
            super().dump_config()

    @property
    def _unsafe(self) -> bool:
        return bool(self.cfg.get('unsafe_load'))

    @property
    def _starts(self) -> bool:
        """Whether a new training begins, from a checkpoint or not."""
        return self._train_loop is not None and not self._resume

    def _early_stopping(self) -> list[EarlyStoppingHook]:
        return [hook for hook in self.hooks if isinstance(hook, EarlyStoppingHook)]

    def known_plan(self, model: nn.Module) -> Plan | None:
        """The plan of the checkpoint that is resumed or tested. A training that starts from one makes its own."""
        file = self._load_from or (find_latest_checkpoint(self.work_dir) if self._resume else None)
        if file is None or self._starts:
            return None
        self._read[file] = read_checkpoint(file, self._unsafe)
        return plan_of(model, self._read[file], file)

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', strict: bool = False, revise_keys: Any = ((r'^module.', ''),)
    ) -> dict:
        """Load weights, on the CPU first; nothing in the file runs, and a checkpoint of another model is refused.

        The config in its meta data, which mmengine would parse as Python when it resumes, is left out.
        """
        filename = str(filename)
        checkpoint = self._read.pop(filename, None) or read_checkpoint(filename, self._unsafe)
        state = renamed(checkpoint.get('state_dict', checkpoint), revise_keys)
        checkpoint = {**(checkpoint if 'state_dict' in checkpoint else {}), 'state_dict': state}
        if 'meta' in checkpoint:
            checkpoint['meta'] = {k: v for k, v in meta_of(checkpoint).items() if k not in ('cfg', 'config')}
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        use = 'start' if self._starts else 'resume' if self._resume else 'test'
        share = self.needed_share if self._starts else 1.0
        quantization = quantization_of(self.cfg)
        left_out = load_weights(bare_model(self.model), checkpoint, filename, quantization, share, use, strict)
        if left_out:
            self.logger.info(f'Thresholds of {filename} are left out: {left_out}.')
        meta = self._meta = meta_of(checkpoint)
        if use == 'test' and self.cfg.get('default_scope') == 'mmpretrain':
            refuse_other_labels(self.known_classes, filename, dataset_meta_of(checkpoint, filename).get('classes'))
        started = dict(file=Path(filename).name, sha256=checkpoint_digest(filename), start=meta.get('start'))
        self.training = dict(start=started if self._starts else meta.get('start'), **training_of(meta))
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, which is whole or not there, with the plan and the `quantization` dict in its `meta`.

        It holds how long early stopping has waited, which mmengine forgets; a resumed run would wait anew.
        Between two optimizer steps it also holds what was accumulated since the last one, so all processes call this.
        """
        meta = {**(kwargs.get('meta') or {}), 'start': self.training.get('start'), 'run': self.run_id}
        meta['changed'] = self.changed
        meta.update(plan=self.report.plan.to_dict(), **trained_as(self.cfg, self.iter > 0, get_world_size()))
        if isinstance(self._train_loop, EpochBasedTrainLoop):
            meta['batches'] = len(self._train_loop.dataloader)
        meta['validated'] = meta.get('iter') == self.validated_at
        meta['patience'] = {hook.monitor: [hook.wait_count, float(hook.best_score)] for hook in self._early_stopping()}
        if kwargs.get('save_optimizer', True) and is_between_steps(self.optim_wrapper):
            meta['accumulated'] = accumulated(bare_model(self.model))
        self._write_checkpoint(out_dir, filename, *args, **{**kwargs, 'meta': meta})

    @master_only
    def _write_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        with written_whole(out_dir, filename, self.work_dir) as temporary:
            super().save_checkpoint(out_dir, temporary, *args, **kwargs)

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume; data loading goes on with the seed of the checkpoint, in the middle of an epoch too."""
        with data_only(self._unsafe):
            super().resume(*args, **kwargs)
        iterations = all_gather_object(self.iter)
        if len(set(iterations)) > 1:
            raise UserError(f'the processes resume from different checkpoints, after {iterations} iterations')
        go_on(self.train_loop, self.seed, self._meta.get('batches'))
        if 'accumulated' in self._meta:
            restore(bare_model(self.model), self._meta['accumulated'])
            self.logger.info('What was accumulated before the checkpoint, which lies between two steps, is restored.')
        self._note_changes()
        patience = self._meta.get('patience', {})
        for hook in self._early_stopping():
            hook.wait_count, hook.best_score = patience.get(hook.monitor, (hook.wait_count, hook.best_score))
        self.resumed, self.run_id = True, str(self._meta.get('run', ''))
        self.resumed_unvalidated = not self._meta.get('validated', False)

    def _note_changes(self) -> None:
        """Keep, and warn of, settings of the training that are not those of the checkpoint that is resumed."""
        before = training_of(self._meta)
        now = trained_as(self.cfg, True, get_world_size())['recipe']
        lines = changed_settings(before.get('recipe', {}), now, self.by_fractions())
        if lines:
            self.logger.warning(
                f'The training is resumed with other settings: {"; ".join(lines)}. What the optimizer and its schedule '
                'keep, as learning rates, is that of the checkpoint.'
            )
        self.changed = [*before.get('changed', []), *(f'after iteration {self.iter}: {line}' for line in lines)]

    def by_fractions(self) -> bool:
        """Whether what was trained before a checkpoint depends on the length of the whole training."""
        return any(isinstance(hook, OscillationHook) for hook in self.hooks)

    def load_or_resume(self) -> None:
        """Load the checkpoint of the config, if it names one."""
        with data_only(self._unsafe):
            super().load_or_resume()

    def val(self) -> dict:
        """Validate."""
        with data_only(self._unsafe):
            return super().val()

    def test(self) -> dict:
        """Test."""
        with data_only(self._unsafe):
            return super().test()

    def test_another(self, checkpoint: str) -> dict:
        """Test another checkpoint of the same training."""
        self._load_from, self._has_loaded = checkpoint, False
        return self.test()

    def train(self) -> nn.Module:
        """Train; a file that cannot be read or written on the way, as on a full disk, ends it with what is left."""
        try:
            with data_only(self._unsafe):
                return super().train()
        except OSError as error:
            if not self.iter:
                raise
            raise UserError(f'{str(error).splitlines()[0]}; {last_written(self.work_dir)}') from error
        finally:
            for hook in self.hooks:
                if isinstance(hook, (StopHook, WorkDirHook)):
                    hook.after_train(self)
