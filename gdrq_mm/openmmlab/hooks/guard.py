"""Stop at a loss, a gradient or a weight that is not finite, and say where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.nn.utils import get_total_norm

from ...core.errors import UserError
from ...core.modules import moving_quantizers
from ...core.quantizers.following import collected
from ..checkpoints import last_written
from ..models import bare_model


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End training with one message when a loss, a gradient, a weight or an activation is NaN or infinite.

    Looked at with every optimizer step, by one norm over all gradients and one over all weights and statistics. A step
    with such gradients is not taken, so the weights are still those that caused them. The message names the input, the
    parameter, or the first layer whose output is not finite. All processes stop at the same step. A step that
    GradScaler leaves out is none. Checkpoints written before stay as they are.

    Example:
        custom_hooks = [dict(type='FiniteLossHook')]   # QuantRunner adds it by itself
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self.loss = self.gradients = ''
        self.batch: Any = None

    def before_train(self, runner: Runner) -> None:
        names = {id(p): name for name, p in bare_model(runner.model).named_parameters()}
        optimizer = runner.optim_wrapper.optimizer

        def check(*args: Any) -> None:
            if getattr(optimizer, 'found_inf', None) is not None:
                return  # a fused optimizer leaves such a step out by itself: GradScaler has told it
            parameters = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
            bad = _not_finite((names.get(id(p), 'a parameter'), p.grad) for p in parameters)
            if bad:
                # It flows back from layer to layer, so the last is where it began; clipping spreads it to all.
                where = bad[-1] if len(bad) < len(parameters) else 'each parameter'
                self.gradients = f'the gradient of {where} is not finite at iteration {runner.iter}'
                for parameter in parameters:
                    parameter.grad = None

        optimizer.register_step_pre_hook(check)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        # mmengine's RuntimeInfoHook has read these values already, so this does not make a GPU wait once more.
        values = {name: float(torch.as_tensor(value).detach()) for name, value in (outputs or {}).items()}
        bad = [f'{name}={value}' for name, value in values.items() if not math.isfinite(value)]
        if bad and not self.loss:
            self.loss, self.batch = f'{", ".join(bad)} at iteration {runner.iter}', data_batch
        if not runner.optim_wrapper.should_update():  # the other processes ask each other at their steps only
            return
        model = bare_model(runner.model)
        other = self.gradients
        if not (self.loss or other):
            spoilt = _spoilt(model)
            other = spoilt and f'{spoilt} after iteration {runner.iter}'
        stop = torch.tensor(int(bool(self.loss or other)))
        all_reduce(stop, 'max')
        if not stop:
            return
        with runner.optim_wrapper.optim_context(model):  # in all processes, as a head may wait for the others
            cause = origin(model, self.batch if self.loss else data_batch)
        reason = f': {cause}' if cause and cause not in other else ''
        found = all_gather_object((self.loss and self.loss + reason, other and other + reason))
        causes = [loss for loss, _ in found if loss] or [other for _, other in found if other]
        _stop(runner, '; '.join(dict.fromkeys(causes)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # What hooks changed after the step, and an average of the weights, which is in the model now
        spoilt = _spoilt(bare_model(runner.model))
        if spoilt:
            _stop(runner, f'{spoilt} at iteration {runner.iter}')


def _stop(runner: Runner, what: str) -> None:
    raise UserError(f'{what}; training stops, {last_written(runner.work_dir)}')


def _spoilt(model: nn.Module) -> str:
    """The first parameter, BN statistic or input of a quantizer that is not finite; '' if there is none.

    A quantized model can have a finite loss with infinite weights and activations: clipping hides them.
    """
    norms = ((n, b) for n, b in model.named_buffers() if n.endswith(('running_mean', 'running_var')))
    following = moving_quantizers(model)
    inputs = collected(following.values()) if following else torch.zeros(0)
    bad = _not_finite([*model.named_parameters(), *norms, ('inputs', inputs)])
    if bad == ['inputs']:
        bad = _not_finite((f'the input of {name}', row) for name, row in zip(following, inputs))
    return f'{bad[0]} has values that are not finite' if bad else ''


def _not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors with values that are not finite; one norm over all of them if there are none."""
    named = {name: tensor.detach() for name, tensor in tensors if tensor is not None}
    if bool(get_total_norm(list(named.values())).isfinite()):
        return []
    return [name for name, tensor in named.items() if not bool(tensor.isfinite().all())]  # squares can overflow


@torch.no_grad()
def origin(model: nn.Module, batch: Any) -> str:
    """Where values that are not finite come from, in the loss of a model on a batch; '' if there are none.

    The forward pass is run once more, in training mode: BN statistics move. Random layers draw anew, so what came by
    chance may not be found.
    """
    first: list[str] = []
    names = {module: name for name, module in model.named_modules() if name}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if not first and not _finite(output):
            first.append(f'the output of {names[module]} ({type(module).__name__}) is the first that is not finite')

    handles = [module.register_forward_hook(look) for module in names]
    try:
        model(**model.data_preprocessor(batch, True), mode='loss')  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    weights = _not_finite(model.named_parameters())
    if weights:
        return f'{weights[0]} has values that are not finite'
    if not _finite(batch):
        return f'the input batch has values that are not finite{_files(batch)}'
    return first[0] if first else ''


def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors with floats in nested containers, data samples among them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, BaseDataElement):
        yield from _tensors(value.all_values())
    elif isinstance(value, Mapping):
        yield from _tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, 'tensor'):  # boxes of mmdet
        yield from _tensors(value.tensor)


def _files(batch: Any) -> str:
    """Names the pictures whose values are not finite, if the batch knows them."""
    if not (isinstance(batch, Mapping) and isinstance(batch.get('data_samples'), (list, tuple))):
        return ''
    pairs = zip(batch.get('inputs', ()), batch['data_samples'])
    bad = [sample for picture, sample in pairs if not _finite([picture, sample])]
    paths = [str(sample.img_path) for sample in bad if 'img_path' in sample]
    return f' ({", ".join(paths[:3])})' if paths else ''
