"""The runner of a quantized config: mmengine's Runner, with layers replaced when the model is built."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import all_gather_object, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseTTAModel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..core.config import FLOAT_BITS, Quantization, unused_options
from ..core.convert import Report
from ..core.errors import UserError, building
from ..core.files import file_digest
from ..core.modules import mute_leaves
from ..core.quantizers import Quantizer, Stage, learned_parameters
from ..report.layers import layer_table, totals
from .checkpoints import (
    ALLOWED,
    check_finite,
    check_fits,
    check_resumable,
    last_written,
    other_quantization,
    read_checkpoint,
    without_quantizers,
)
from .distributed import no_device, synchronized
from .hooks import (
    CalibrationHook,
    FiniteLossHook,
    NormHook,
    StageHook,
    StatisticsHook,
    StopHook,
    ThresholdHook,
    WholeCheckpointHook,
)
from .hooks.stop import shield_workers
from .loading import check_dataset, checked_reading, ignored_labels
from .models import bare_model, drop_pretrained, prepare_model, read_quantization
from .seeding import SeedHook, kept_random_state, reseed_dataloader, seed_dataloader, skip_batches
from .tasks import dataset_of


@RUNNERS.register_module()
class QuantRunner(Runner):
    """Builds the model of a config, quantizes it by the config's `quantization` dict, trains and tests it.

    Without that dict the model stays float; seeding, exact resume and safe checkpoints are the same, so that a float
    baseline differs in nothing else. `memory_format = 'channels_last'` in the config is faster on a CPU.

    A config names it by `runner_type = 'gdrq_mm.openmmlab.QuantRunner'`. Layers are replaced in `build_model`, before
    DDP and the optimizer see the model; thresholds start in `before_train`, after the weights are loaded.
    """

    _train_loop: Any
    _hooks: list[Hook]
    quantization: Quantization | None = None
    report: Report | None = None
    training: dict[str, Any] = {}
    """What the checkpoint says of the run that wrote it: seed, epochs, iterations, and where it started from."""
    needed_share = 0.5
    """Share of the parameters that a checkpoint to start from must have: another head may start anew."""
    unsafe_load = False
    """Unpickle whatever a checkpoint holds (tools: --unsafe-load)."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """Build a runner; a pretrained init that `load_from` replaces is dropped, so it is not downloaded."""
        read_quantization(cfg)
        if not isinstance(cfg.get('auto_scale_lr') or {}, dict):
            raise UserError(f'auto_scale_lr={cfg.auto_scale_lr!r} is not a dict')
        if cfg.get('load_from') or cfg.get('resume'):
            drop_pretrained(cfg.model)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """mmengine's; without a GPU the processes talk through gloo, and each slurm job has a port of its own."""
        if self._launcher == 'slurm':
            os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 10000))
        if torch.cuda.is_available():
            super().setup_env(env_cfg)
            return
        with no_device():
            super().setup_env({**env_cfg, 'dist_cfg': {**(env_cfg.get('dist_cfg') or {}), 'backend': 'gloo'}})

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel if there are several processes.

        Raises:
            UserError: another wrapper is asked for. FSDP cuts weights into pieces, but thresholds are of whole filters.
        """
        name = (model_wrapper_cfg or {}).get('type', 'MMDistributedDataParallel')
        kind = MODEL_WRAPPERS.get(name) if isinstance(name, str) else name
        if not (isinstance(kind, type) and issubclass(kind, DistributedDataParallel)):
            raise UserError(f'model_wrapper_cfg.type={name!r} is not supported; take MMDistributedDataParallel')
        if self.distributed and not torch.cuda.is_available():
            unused = self.cfg.get('find_unused_parameters', False)
            model_wrapper_cfg = model_wrapper_cfg or dict(broadcast_buffers=False, find_unused_parameters=unused)
            model_wrapper_cfg = {**model_wrapper_cfg, 'device_ids': None}  # mmengine's default are CUDA devices
        sync_bn = self.cfg.pop('sync_bn', None)  # done in build_model
        try:
            return super().wrap_model(model_wrapper_cfg, model)
        finally:
            if sync_bn is not None:
                self.cfg.sync_bn = sync_bn

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """The model of the config, quantized if the config says so."""
        built = super().build_model(model)
        # Before the layers change: wrap_model does both too, but would drop what is attached to BN
        built = synchronized(built, self.cfg.get('sync_bn')) if self.distributed else revert_sync_batchnorm(built)
        self.quantization = read_quantization(self.cfg)
        self.report = prepare_model(built, self.cfg, lambda: self._predict(built))
        return built

    def _predict(self, model: nn.Module) -> None:
        """One prediction on the first real sample that the config has; its loaders are kept for the loops."""
        for name in ('_val_dataloader', '_test_dataloader', '_train_dataloader'):
            if getattr(self, name, None) is None:
                continue
            loader = self._loader(name)
            with kept_random_state():
                batch = loader.collate_fn([loader.dataset[0]])
                if name == '_train_dataloader':
                    mute_leaves(model.train())
                    data = model.data_preprocessor(batch, training=False)  # type: ignore[operator]
                    model(**data, mode='loss')
                else:
                    if isinstance(model, BaseTTAModel):  # its loader gives a list with an entry for each augmentation
                        batch = {key: value[0] for key, value in batch.items()}
                    bare_model(model).test_step(batch)
            return

    def _loader(self, name: str) -> DataLoader:
        """A data loader of the config, built once and handed to its loop."""
        loader = getattr(self, name)
        if isinstance(loader, dict):
            diff = self._randomness_cfg.get('diff_rank_seed', False)
            try:
                with building(f'{name[1:]}.dataset={dataset_of(loader).get("type")!r}'):
                    loader = self.build_dataloader(loader, seed=self.seed, diff_rank_seed=diff)
            except FileNotFoundError as error:
                raise UserError(f'{name[1:]}: the data set cannot be read: {error}') from None
            setattr(self, name, loader)
        return loader

    def build_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """A data loader; what is wrong with its data is told with the name of the file."""
        with checked_reading(self.cfg.get('default_scope')):
            loader = super().build_dataloader(*args, **kwargs)
        shield_workers(loader)
        check_dataset(loader.dataset, ignored_labels(self.cfg.model))
        return loader

    def train(self) -> nn.Module:
        """Train; a file that cannot be read or written on the way, as on a full disk, ends it with what is left."""
        try:
            return super().train()
        except OSError as error:
            if not self.iter:
                raise
            raise UserError(f'{str(error).splitlines()[0]}; {last_written(self.work_dir)}') from error
        finally:
            for hook in self.hooks:
                if isinstance(hook, StopHook):
                    hook.after_train(self)

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume; data loading goes on with the seed of the checkpoint, in the middle of an epoch too."""
        super().resume(*args, **kwargs)
        iterations = all_gather_object(self.iter)
        if len(set(iterations)) > 1:
            raise UserError(f'the processes resume from different checkpoints, after {iterations} iterations')
        reseed_dataloader(self.train_dataloader, self.seed)
        loop = self.train_loop
        if isinstance(loop, EpochBasedTrainLoop) and loop.iter > loop.epoch * len(loop.dataloader):
            skip_batches(loop.dataloader, loop.iter - loop.epoch * len(loop.dataloader))

    def _init_model_weights(self) -> None:
        """Initial weights; a pretrained file is not executed (mmengine falls back to a loader that does)."""
        if self.unsafe_load:
            super()._init_model_weights()
            return
        before = os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
        try:
            with torch.serialization.safe_globals(ALLOWED):
                super()._init_model_weights()
        except pickle.UnpicklingError as error:
            files = re.findall(r"'checkpoint': '([^']*)'", str(self.cfg.model))
            raise UserError(
                f'init_cfg: checkpoint {" or ".join(files)} is damaged or holds more than tensors and data, and was '
                f'not loaded: {str(error).splitlines()[0][:80]} (--unsafe-load runs what it holds)'
            ) from None
        finally:
            if before is None:
                del os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD']
            else:
                os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = before

    def build_train_loop(self, loop: Any) -> Any:
        """The training loop on seeded data."""
        if isinstance(loop, dict):
            seed_dataloader(self._loader('_train_dataloader'), self.seed)
        with building('train_cfg'):
            return super().build_train_loop(loop)

    def build_evaluator(self, evaluator: Any) -> Any:
        """The metrics."""
        with building('the evaluator'):
            return super().build_evaluator(evaluator)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """The schedules of learning rate and momentum."""
        with building('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """The optimizer; what quantizers learn takes weight decay and learning rate as its method says."""
        learned = learned_parameters(bare_model(self.model))
        if learned and isinstance(optim_wrapper, dict) and 'optimizer' in optim_wrapper:
            optim_wrapper = copy.deepcopy(optim_wrapper)
            given = optim_wrapper.get('paramwise_cfg') or {}
            keys = {n: dict(lr_mult=q.lr_mult, decay_mult=q.decay_mult) for n, q in learned.items()}
            if optim_wrapper['optimizer'].get('weight_decay') is None:  # then mmengine refuses a multiple of it
                keys = {n: dict(lr_mult=q.lr_mult) for n, q in learned.items()}
            # ConfigDict stores copies: what its setdefault returns is not what it holds
            optim_wrapper['paramwise_cfg'] = {**given, 'custom_keys': {**given.get('custom_keys', {}), **keys}}
        with building(f'optim_wrapper={optim_wrapper}' if isinstance(optim_wrapper, dict) else 'optim_wrapper'):
            return super().build_optim_wrapper(optim_wrapper)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """The config's hooks, and those of ours that it does not set itself."""
        super().register_hooks(default_hooks, custom_hooks)
        ours: list[Hook] = [SeedHook(), FiniteLossHook(), NormHook(), StopHook()]
        if self.quantization is not None:
            schedule = self.quantization.schedule
            ours.append(CalibrationHook(self.quantization.calibration_batches))
            ours.append(StageHook(schedule.reshape, schedule.freeze))
            ours += [ThresholdHook(), StatisticsHook()]
        for hook in self.hooks:
            if type(hook) is CheckpointHook:
                hook.__class__ = WholeCheckpointHook
        for hook in ours:
            if not any(isinstance(theirs, type(hook)) for theirs in self.hooks):
                self.register_hook(hook)

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', strict: bool = False, revise_keys: Any = ((r'^module.', ''),)
    ) -> dict:
        """Load weights; nothing in the file is executed, and a checkpoint of another model is refused."""
        checkpoint = read_checkpoint(str(filename), map_location, self.unsafe_load)
        checkpoint = checkpoint if 'state_dict' in checkpoint else dict(state_dict=checkpoint)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model = bare_model(self.model)
        starting = self._train_loop is not None and not self._resume
        check_fits(model, checkpoint, filename, share=self.needed_share if starting else 1.0)
        if self._resume:
            check_resumable(checkpoint, filename)
        mismatch = other_quantization(model, checkpoint)
        if mismatch and not starting:
            raise UserError(f'checkpoint {filename} was trained with another quantization config: {mismatch}')
        if mismatch:
            self.logger.info(f'Thresholds of {filename} are left out: {mismatch}.')
            checkpoint = without_quantizers(checkpoint)
        meta = checkpoint.get('meta') or {}
        start = dict(file=Path(filename).name, sha256=file_digest(filename)) if starting else meta.get('start')
        self.training = dict(start=start, **{key: meta.get(key) for key in ('seed', 'epoch', 'iter')})
        checkpoint = _load_checkpoint_to_model(model, checkpoint, strict, revise_keys=list(revise_keys))
        check_finite(model, filename)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return checkpoint

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save under a temporary name, then move into place: the file is whole or not there.

        Raises:
            UserError: it cannot be written, as on a full disk; older checkpoints are as they were.
        """
        rules = {name: m.rule for name, m in bare_model(self.model).named_modules() if isinstance(m, Quantizer)}
        ours = dict(start=self.training.get('start'), quantizers=rules)
        kwargs['meta'] = {**(kwargs.get('meta') or {}), **ours}
        if '://' in out_dir:
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        temporary = f'.{filename}.tmp'
        source = os.path.join(out_dir, temporary)
        try:
            super().save_checkpoint(out_dir, temporary, *args, **kwargs)
            with open(source, 'rb') as file:
                os.fsync(file.fileno())
            os.replace(source, os.path.join(out_dir, filename))
        except OSError as error:
            path = os.path.join(out_dir, filename)
            raise UserError(
                f'checkpoint {path} cannot be written: {error.strerror}; {last_written(self.work_dir)}'
            ) from error
        finally:
            with suppress(OSError):  # a folder may have become read-only
                Path(source).unlink(missing_ok=True)

    def load_calibrated(self) -> None:
        """Load float weights, all of them, and find thresholds on training batches.

        No other hook is called, now or later: an average of the weights (EMA) does not know the thresholds.
        """
        calibration = next(hook for hook in self.hooks if isinstance(hook, CalibrationHook))
        self._hooks = []
        self._train_loop = self.build_train_loop(self._train_loop)
        self.needed_share = 1.0
        self.load_or_resume()
        calibration.before_train(self)

    def calibrate(self, path: str) -> None:
        """Load the weights, find thresholds on training batches, and write the quantized checkpoint without training.

        Raises:
            UserError: the config quantizes nothing.
        """
        if self.quantization is None:
            raise UserError('the config has no quantization: there is nothing to calibrate')
        self.load_calibrated()
        self.log_layers()
        folder, name = os.path.split(path)
        self.save_checkpoint(folder or '.', name, save_optimizer=False, save_param_scheduler=False)

    def log_layers(self) -> None:
        """Log the table of layers with what became of each."""
        if self.report is not None:
            self.logger.info('Layers:\n' + layer_table(bare_model(self.model), self.report))
        unused = unused_options(self.cfg.quantization) if self.quantization else []
        if unused:
            self.logger.info(f'Not used, as the method is another one: {", ".join(unused)}.')

    def describe(self) -> dict[str, Any]:
        """What a run record says of the model: methods, bits, stage, sizes."""
        model, config = bare_model(self.model), self.quantization
        stages = {m.stage for m in model.modules() if isinstance(m, Quantizer)} - {Stage.FLOAT}
        assert self.report is not None
        return dict(
            methods=[config.weight.method, config.activation.method] if config else ['float', 'float'],
            options=config.choices() if config else {},
            bits=[config.weight.bits, config.activation.bits] if config else [FLOAT_BITS, FLOAT_BITS],
            first_last_bits=config.first_last_bits if config else FLOAT_BITS,
            deployable=config.deployable if config else None,
            stage=max(stages).name.lower() if stages else 'float',
            **dataclasses.asdict(totals(model, self.report)),
        )
