"""Checkpoints that a crash at any moment leaves usable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...core.errors import UserError
from ...core.files import write_whole
from ..checkpoints import POINTER
from .work_dir import only_user


class _RemovesLater:
    """A storage backend of mmengine that collects what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.outdated: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.outdated.append(path)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, but old checkpoints go when the new one is written, and the pointer is never half.

    mmengine removes the outdated checkpoint first, so that a full disk or a crash can leave none, and writes
    `last_checkpoint` in place.

    Example:
        default_hooks = dict(checkpoint=dict(type='CheckpointHook'))   # QuantRunner makes it one of these
    """

    file_backend: Any

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.out_dir != runner.work_dir and '://' not in self.out_dir:
            Path(self.out_dir).mkdir(parents=True, exist_ok=True)
            self.lock = only_user(Path(self.out_dir))  # two work directories of one name share it

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        with self._old_ones_last():
            self._make_room(runner, step)
            name = self.filename_tmpl.format(step)
            self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
            runner.message_hub.update_info('last_ckpt', self.last_ckpt)
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
            if is_main_process():
                write_whole(Path(runner.work_dir) / POINTER, os.fsencode(self.last_ckpt))

    def _make_room(self, runner: Runner, step: int) -> None:
        """Count the checkpoint of a step among those to keep; the oldest goes if there are more."""
        if self.max_keep_ckpts <= 0 or list(self.keep_ckpt_ids)[-1:] == [step]:
            return
        kept = [*self.keep_ckpt_ids, step]
        for outdated in kept[: -self.max_keep_ckpts]:
            if is_main_process():
                self.file_backend.remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(outdated)))
        self.keep_ckpt_ids.extend([step])  # its length is limited
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        missing = [key for key in getattr(self, 'key_indicators', None) or [] if key not in (*metrics, 'auto')]
        if missing and metrics:  # a detector that detects nothing has none
            known = ', '.join(map(str, metrics))
            raise UserError(f'default_hooks.checkpoint.save_best={missing[0]!r}: the metrics are {known}')
        with self._old_ones_last():
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _old_ones_last(self) -> Iterator[None]:
        """Remove what is outdated when all in here went well; a file that was written anew stays."""
        backend = self.file_backend
        later = self.file_backend = _RemovesLater(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        best = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
        for path in later.outdated:
            if path not in (self.last_ckpt, *best) and backend.isfile(path):
                backend.remove(path)
