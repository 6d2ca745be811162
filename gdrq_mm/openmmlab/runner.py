"""The runner of a quantized config: mmengine's Runner, with layers replaced when the model is built."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapperDict
from mmengine.registry import OPTIMIZERS, RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch.utils.data import DataLoader

from ..core.compat import COMPILES
from ..core.config import Quantization, Schedule, unused_options
from ..core.errors import UserError
from ..report.layers import layer_table
from .amp import check_amp
from .checkpoint_runner import CheckpointRunner
from .checkpoints import read_checkpoint
from .compat import init_without_gpu
from .data_checks import check_loader, checked_reading
from .data_only import data_only
from .describe import describe_model
from .distill import name_teacher
from .distributed import synchronized, wrapper_config
from .hooks import CalibrationHook, NormHook, OscillationHook, ThresholdHook, hooks_of, with_whole_checkpoints
from .hooks.calibration import batch_size_of
from .loading import loader_of, trials_of
from .mistakes import not_found, registered
from .models import bare_model, drop_pretrained, prepare_model, read_quantization
from .rates import set_rates
from .seeding import SeedHook, seed_dataloader
from .weights import is_quantized

BY_FRACTIONS = {'inq', 'tsq'}
"""Methods that go by the fraction of the training that is done."""


AFTER_STEP = (NormHook, ThresholdHook, OscillationHook)
"""Hooks that change a model after an optimizer step."""


@RUNNERS.register_module()
class QuantRunner(CheckpointRunner):
    """Builds the model of a config, quantizes it by the config's `quantization` dict, trains and tests it.

    Without that dict the model stays float; seeding, exact resume and safe checkpoints are the same, so that a float
    baseline differs in nothing else. `memory_format = 'channels_last'` in the config is faster on a CPU.

    A config names it by `runner_type = 'gdrq_mm.openmmlab.QuantRunner'`. Layers are replaced in `build_model`, before
    DDP and the optimizer see the model; thresholds start in `before_train`, after the weights are loaded.
    """

    _hooks: list[Hook]
    _train_dataloader: Any
    quantization: Quantization | None

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """Build a runner; a pretrained init that a checkpoint replaces is dropped, so it is not downloaded.

        `resume = True` in a config may find no checkpoint: then the training begins, and needs what it starts from.
        """
        read_quantization(cfg)
        if cfg.get('train_cfg') and not cfg.get('resume'):
            name_teacher(cfg)
        for name in ('auto_scale_lr', 'default_hooks', 'env_cfg', 'model_wrapper_cfg', 'randomness'):
            if not isinstance(cfg.get(name) or {}, dict):
                raise UserError(f'{name}={cfg[name]!r} is not a dict')
        if cfg.get('quantization') and cfg.get('efficient_conv_bn_eval'):
            raise UserError('efficient_conv_bn_eval changes convolutions by tracing them in float: remove it')
        if cfg.get('load_from') or (cfg.get('resume') and find_latest_checkpoint(cfg.work_dir)):
            drop_pretrained(cfg.model)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """mmengine's; without a GPU the processes talk through gloo, and each slurm job has a port of its own."""
        if self._launcher == 'slurm':
            os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ['SLURM_JOB_ID']) % 10000))
        init_without_gpu(self._launcher, env_cfg.get('dist_cfg') or {})
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model in DistributedDataParallel if there are several processes."""
        sync_bn = self.cfg.pop('sync_bn', None)  # done in build_model
        try:
            return super().wrap_model(wrapper_config(self.cfg, model_wrapper_cfg), model)
        finally:
            if sync_bn is not None:
                self.cfg.sync_bn = sync_bn

    def build_model(self, model: nn.Module | dict) -> nn.Module:
        """The model of the config, quantized if the config says so."""
        built = super().build_model(model)
        # Before the layers change: wrap_model does both too, but would drop what is attached to BN
        built = synchronized(built, self.cfg.get('sync_bn')) if self.distributed else revert_sync_batchnorm(built)
        self.quantization = read_quantization(self.cfg)
        plan = self.known_plan(bare_model(built))
        self.report = prepare_model(built, self.cfg, trials_of(self, built), plan)
        return built

    def _init_model_weights(self) -> None:
        """mmengine's; a file of pretrained weights that is not there is told in one line."""
        try:
            super()._init_model_weights()
        except FileNotFoundError as error:
            raise UserError(f'init_cfg: {error}') from error

    def build_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """A data loader; what is wrong with its data is told with the name of the file."""
        with data_only(self._unsafe), checked_reading(self.cfg):
            loader = super().build_dataloader(*args, **kwargs)
        check_loader(loader, self.cfg, self.known_classes)
        return loader

    def build_train_loop(self, loop: Any) -> Any:
        """The training loop on seeded data."""
        if isinstance(loop, dict):
            seed_dataloader(loader_of(self, '_train_dataloader'), self.seed)
        return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """The optimizer; what quantizers learn takes weight decay and learning rate of its layer as its method says."""
        optimizer = optim_wrapper.get('optimizer') if isinstance(optim_wrapper, dict) else None
        kind = optimizer.get('type') if isinstance(optimizer, dict) else None
        if isinstance(kind, str) and registered(kind, OPTIMIZERS) is None:  # mmengine calls the None
            raise UserError(f'optim_wrapper.optimizer: {not_found(kind, OPTIMIZERS)}')
        if isinstance(optim_wrapper, dict):
            check_amp(optim_wrapper.get('type'))
        built = super().build_optim_wrapper(optim_wrapper)
        if isinstance(built, OptimWrapperDict):
            raise UserError('optim_wrapper makes several optimizers; this runner takes one')
        if built is not optim_wrapper:  # mmengine asks again for one that is built already
            paramwise = optim_wrapper.get('paramwise_cfg') or {}
            set_rates(built, bare_model(self.model), paramwise.get('custom_keys') or {})
        return built

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """The config's hooks, and those of ours that it does not set itself."""
        if not isinstance(custom_hooks or [], (list, tuple)):
            raise UserError(f'custom_hooks={custom_hooks!r} is not a list')
        super().register_hooks(with_whole_checkpoints(default_hooks), custom_hooks)
        if self._train_loop is None:  # in a test EarlyStoppingHook fails, as it looks for the training loop
            self._hooks = [hook for hook in self._hooks if hook not in self._early_stopping()]
        for hook in [SeedHook(), *hooks_of(self.quantization)]:
            if not any(isinstance(theirs, type(hook)) for theirs in self.hooks):
                self.register_hook(hook)
        # An average of the weights is made of what stands after the step, whatever the priority of its hook
        averages = [hook for hook in self._hooks if isinstance(hook, EMAHook)]
        others = [hook for hook in self._hooks if hook not in averages]
        last = max((number for number, hook in enumerate(others, 1) if isinstance(hook, AFTER_STEP)), default=0)
        early = [hook for hook in averages if self._hooks.index(hook) < last]
        for hook in early:
            self._hooks.remove(hook)
        self._hooks[last:last] = early

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict | None = None) -> None:
        """mmengine's, with the batch size of the config: a data loader with a sampler of batches knows none."""
        loader = self._train_dataloader
        if isinstance(loader, DataLoader):
            self._train_dataloader = dict(batch_size=batch_size_of(loader, self.cfg.get('train_dataloader') or {}))
        try:
            super().scale_lr(optim_wrapper, auto_scale_lr)
        finally:
            self._train_dataloader = loader

    def _maybe_compile(self, target: str) -> None:
        """mmengine's `compile=True`, without the optimizer: it would be traced anew for each learning rate."""
        if self.cfg.get('compile') and not COMPILES:
            raise UserError(f'compile needs torch 2.6 or newer for a quantized model, this is {torch.__version__}')
        super()._maybe_compile(target)
        if self.cfg.get('compile'):
            self.optim_wrapper.update_params = torch.compiler.disable(self.optim_wrapper.update_params)

    def load_calibrated(self) -> None:
        """Load float weights, all of them, and find thresholds on training batches.

        No other hook is called, now or later: an average of the weights (EMA) does not know the thresholds.
        """
        calibration = next(hook for hook in self.hooks if isinstance(hook, CalibrationHook))
        self._hooks = []
        self._train_loop = self.build_train_loop(self._train_loop)
        self.needed_share = 1.0
        self.load_or_resume()
        calibration.trains_next = False
        with data_only(self._unsafe):
            calibration.before_train(self)

    def by_fractions(self) -> bool:
        """Of stages, or of methods that go by them, such as inq."""
        config = self.quantization
        if config is not None:
            methods = {config.weight.method, config.activation.method}
            if config.schedule != Schedule() or not BY_FRACTIONS.isdisjoint(methods):
                return True
        return super().by_fractions()

    def calibrate(self, path: str) -> None:
        """Load the weights, find thresholds on training batches, and write the quantized checkpoint without training.

        Raises:
            UserError: the config quantizes nothing, or the weights are those of a quantized model: it is calibrated.
        """
        if self.quantization is None or self.quantization.control:
            without = 'has no quantization' if self.quantization is None else 'is a control'
            raise UserError(f'the config {without}: there is nothing to calibrate')
        start = self._load_from
        if start is not None and is_quantized(read_checkpoint(start, bool(self.cfg.get('unsafe_load')))):
            raise UserError(f'checkpoint {start} is of a quantized model; calibration starts from the float one')
        self.load_calibrated()
        self.log_layers()
        folder, name = os.path.split(path)
        meta = dict(epoch=0, iter=0)  # mmengine would count an epoch
        self.save_checkpoint(folder or '.', name, save_optimizer=False, save_param_scheduler=False, meta=meta)

    def log_layers(self) -> None:
        """Log the table of layers with what became of each."""
        self.logger.info('Layers:\n' + layer_table(bare_model(self.model), self.report))
        unused = unused_options(self.cfg.quantization) if self.quantization else []
        if unused:
            self.logger.info(f'Not used, as the method is another one: {", ".join(unused)}.')

    def describe(self) -> dict[str, Any]:
        """What a run record says of the model: methods, bits, stage, sizes."""
        return describe_model(bare_model(self.model), self.quantization, self.report)
