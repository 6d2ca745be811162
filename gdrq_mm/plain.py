"""The door for plain torch: a training loop calls these functions, and OpenMMLab's hooks call what they call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor

from .core.attention import names_written_out
from .core.calibrate import calibrate as _calibrate
from .core.calibrate import wrong_statistics
from .core.config import Quantization, Schedule, settings_of
from .core.convert import Report, has_filters, quantize_model
from .core.convert import to_float as _to_float
from .core.errors import UserError, extras_named
from .core.modules import detached_copy, quant_layers, uncompiled
from .core.quantizers import Stage, learned_parameters
from .core.reading import read_torch
from .core.step import after_step as after_step  # offered as it is
from .core.step import set_stage
from .core.topology import Plan, record
from .core.typed import FLOAT_BITS, near

if TYPE_CHECKING:
    from .core.mixed.allocation import Allocation
    from .deploy.export import ExportReport


def quantize(
    model: nn.Module,
    config: str | Mapping[str, Any],
    example: Any,
    last: str | Iterable[str] = (),
    show: bool = True,
) -> Report:
    """Replace the layers of a float model by quantized ones, in place.

    Call it after BN is made synchronized, before the optimizer is made and before the model is wrapped
    (DistributedDataParallel, torch.compile).
    Parameters stay the same objects, and names in the state dict stay the same.

    Args:
        model: any module with convolutions or linear layers.
        config: bits such as 'w4a4', a method with bits such as 'lsq_w2a4', or the `quantization` dict of a config
            (gdrq_mm/core/config.py explains each key).
        example: an input of the model for one prediction, from which is learned what feeds what: a tensor, a tuple of
            arguments, or a dict of keyword arguments.
        last: names of the layers that make the outputs; they get `first_last_bits`. By default the layer called last.
        show: print the table of layers: what was quantized and what not, and why.

    Returns:
        What became of each layer, and the plan of the model.

    Raises:
        UserError: the config is wrong, or the model has nothing to quantize or is quantized already.
    """
    if _bare(model) is not model:
        raise UserError(f'quantize takes the model before it is wrapped, not a {type(model).__name__}')
    if quant_layers(model):
        raise UserError('the model is quantized already')
    settings = copy.deepcopy(settings_of(config))
    quantization = Quantization.from_dict(settings)
    if quantization.schedule != Schedule():
        raise UserError(
            'schedule is for configs of OpenMMLab; in a loop of your own gq.freeze(model) lets thresholds stand still, '
            'and gdrq_mm.core.step.set_stage(model, stage) sets any stage'
        )
    if quantization.control or quantization.distill is not None:
        raise UserError(
            'control and distill are for configs of OpenMMLab; in a loop of your own train the float model, or add '
            'gdrq_mm.core.distill.Distillation to the loss'
        )
    last, known = [last] if isinstance(last, str) else list(last), names_written_out(model)
    modules = dict(model.named_modules())
    for name in last:
        if name not in known:
            raise UserError(f'quantize: last={name!r} is no layer of the model{near(name, known)}')
        module = modules.get(name)  # None: a layer of attention that is not written out yet
        if module is not None and not has_filters(module):
            raise UserError(f'quantize: last={name!r} is a {type(module).__name__}, which has no weights to quantize')
    with uncompiled():
        plan = record(model, lambda: _run(model, example), last=last)
    report = _quantized(model, settings, plan)
    if show:
        from .report.layers import layer_table

        print(layer_table(model, report))
    return report


def allocate(
    model: nn.Module,
    config: str | Mapping[str, Any],
    example: Any,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    budget: Mapping[str, float],
    bits: Sequence[int] | None = None,
    last: str | Iterable[str] = (),
    show: bool = True,
) -> Allocation:
    """Choose bits for each layer of a trained float model, within a budget; the model stays as it is.

    A choice costs what its rounding errors raise the loss by, judged by the squared gradients of a few batches; an
    integer program takes the least sum. Then quantize the model by `allocation.config(...)` of the `config` given here.

    Args:
        config, example, last: as for :func:`quantize`; what the config says of single layers is kept.
        batches: the first `calibration_batches` of them are used (8 by default).
        loss: of the model and a batch, the mean over its pictures. How many there are tells the length of the batch, or
            of its first entry if it is a tuple or a list.
        budget: 'size' in bytes, or up to 1 as a share of the float model; the same of 'bitops', multiply-accumulates
            times the bits of weight and input. With a size alone, inputs keep the bits of the config.
        bits: to choose from; by default 2, 3, 4 and 8, as far as the method has them.
        show: print how the bits compare with uniform ones.

    Raises:
        UserError: the config is wrong, or no bits fit the budget: then the message names the least.
    """
    from .core.mixed.allocation import Chooser
    from .core.mixed.budgets import read_budgets
    from .core.mixed.program import monotone
    from .core.mixed.sensitivity import loss_sensitivity
    from .report.layers import totals

    limits = read_budgets(budget)
    if 'ms' in limits:
        raise UserError('allocate: a budget in ms needs times of layers; tools/allocate.py measures them')
    copied = detached_copy(model)
    report = quantize(copied, config, example, last, show=False)
    quantization = Quantization.from_dict(settings_of(config))
    device = next(copied.parameters()).device
    used = [_moved(batch, device) for batch in islice(batches, quantization.calibration_batches)]
    _calibrate(copied, used, lambda batch: loss(copied, batch), trains_next=False)
    size = totals(copied, report).float_bytes
    chooser = Chooser(copied, quantization, report, size, bits, inputs='bitops' in limits)
    chooser.check(limits)
    chooser.candidates.calibrate(used, lambda batch: loss(copied, batch))
    sensitivities = loss_sensitivity(
        chooser.candidates, used, lambda batch: loss(copied, batch), lambda batch: _pictures_of(batch) or 1
    )
    found = chooser.allocate(monotone(sensitivities), limits)
    if show:
        print('\n'.join(found.summary('expected rise of the loss')))
    return found


def calibrate(model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None = None) -> None:
    """Start the thresholds from the first batches; then every quantizer rounds.

    Modes are set and restored; BN statistics stay. With several processes every one of them calls it, and all find the
    same thresholds.

    Args:
        batches: such as a data loader; the first `calibration_batches` of them are used (8 by default).
        predict: runs one batch. By default the model gets the batch, or its first entry if it is a tuple or a list, as
            loaders give (images, labels).

    Raises:
        UserError: the model is not quantized, no batch came, or an input is not finite.
    """
    settings, plan = _remembered(model)
    device = next(model.parameters()).device

    def run(batch: Any) -> None:
        _run(model, _moved(_first(batch), device))

    count = Quantization.from_dict(settings).calibration_batches
    wrong = _calibrate(model, islice(batches, count), predict or run)
    layers = quant_layers(_bare(model))
    if missed := [name for name in layers if name in plan.calls and FLOAT_BITS in _bits_in_use(layers[name])]:
        warnings.warn(
            f'no batch reached {", ".join(missed)}, which the example of quantize did: they stay float. A model that '
            'keeps a layer in a plain list or a closure calls the float layer of before',
            stacklevel=2,
        )
    if wrong:
        warnings.warn(wrong_statistics(wrong, by_batch=True), stacklevel=2)


def parameter_groups(model: nn.Module, weight_decay: float = 0.0, lr: float | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer: what quantizers learn has the learning rate and weight decay that its method asks for.

    Args:
        weight_decay: that of the other parameters.
        lr: that of the other parameters; only needed if a method's option `lr_mult` is not 1.

    Raises:
        UserError: `lr` is needed and missing.
    """
    learned = learned_parameters(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, 1.0): []}
    for name, parameter in model.named_parameters():
        quantizer = learned.get(name)
        multiples = (quantizer.lr_mult, quantizer.decay_mult) if quantizer is not None else (1.0, 1.0)
        groups.setdefault(multiples, []).append(parameter)
    found = []
    for (lr_mult, decay_mult), parameters in groups.items():
        group: dict[str, Any] = dict(params=parameters, weight_decay=weight_decay * decay_mult)
        if lr is not None:
            group['lr'] = lr * lr_mult
        elif lr_mult != 1:
            raise UserError(f'parameter_groups: a quantizer has lr_mult={lr_mult:g}; give lr as well')
        found.append(group)
    return found


def freeze(model: nn.Module) -> None:
    """Let thresholds stand still from now on, as at the end of a training. `model.eval()` does so for BN statistics.

    Raises:
        UserError: the model is not quantized.
    """
    if not quant_layers(model):
        raise UserError('the model is not quantized: call gdrq_mm.quantize first')
    set_stage(model, Stage.FREEZE)


def to_float(model: nn.Module) -> None:
    """The inverse of :func:`quantize`, in place: layers of torch, with the float weights that training rounds.

    Parameters stay the same objects; what quantizers learned is gone. Hooks that others registered stay.

    Raises:
        UserError: the model is not quantized, or is wrapped (DistributedDataParallel, torch.compile).
    """
    if _bare(model) is not model:
        raise UserError(f'to_float takes the model itself, not a {type(model).__name__} around it')
    _remembered(model)
    _to_float(model)
    del model.gdrq_quantization


def checkpoint(model: nn.Module) -> dict[str, Any]:
    """What :func:`load` needs to build this model again: weights, thresholds, settings and plan, as plain data.

    Save it with torch.save.

    Raises:
        UserError: the model is not quantized.
    """
    settings, plan = _remembered(model)
    return dict(state_dict=_bare(model).state_dict(), meta=dict(quantization=settings, plan=plan.to_dict()))


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """A trained quantized model from a file.

    Args:
        model: the float model, as its class builds it. It is changed; use what is returned.
        path: what torch.save wrote of :func:`checkpoint`: the model can be trained on. Or the packed file that
            :func:`export` wrote: its layers compute with integers, in torch, and it can only predict.

    Raises:
        UserError: the file is missing, damaged, or that of another model.
    """
    if quant_layers(model):
        raise UserError('load takes the float model, this one is quantized')
    from .deploy.from_packed import load_packed
    from .deploy.packed import is_packed

    if is_packed(path):
        with extras_named():
            return load_packed(model, path)[0]
    content = read_torch(path)
    try:
        if not isinstance(content, Mapping):
            raise TypeError(f'it holds a {type(content).__name__}')
        settings, plan = content['meta']['quantization'], Plan.from_dict(content['meta']['plan'])
        state = content['state_dict']
    except KeyError as error:
        hint = 'save gdrq_mm.checkpoint(model), not model.state_dict()'
        raise UserError(f'{path} is no checkpoint of gdrq_mm.checkpoint: it has no {error}; {hint}') from None
    except (TypeError, ValueError) as error:
        raise UserError(f'{path} is no checkpoint of gdrq_mm.checkpoint: {error}') from None
    _quantized(model, settings, plan)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f'checkpoint {path} does not fit the model: {reason}') from None
    return model


def export(model: nn.Module, example: Tensor, out: str | Path, target: str = 'both') -> ExportReport:
    """Write the trained model as integers: ONNX and a packed file, compared with the model layer by layer.

    Args:
        model: trained or calibrated; its forward takes one tensor.
        example: a batch to trace and to compare with; the graph takes any number of such inputs.
        out: folder to write; it must not exist.
        target: 'onnxruntime' or 'openvino' where one of them need not run it, 'both' of those that are installed.

    Returns:
        What was written and how it compares in each installed runtime.

    Raises:
        UserError: a layer cannot be merged or exported, or a runtime disagrees; nothing is written then.
    """
    _, plan = _remembered(model)
    if not isinstance(example, Tensor):
        raise UserError(f'export: example is a {type(example).__name__}, not a tensor')
    if not example.numel():
        raise UserError('export: example is empty, there is nothing to compare with')
    with extras_named():
        from .deploy.export import export as write

        return write(_bare(model), plan, example, Path(out), target)


def _bits_in_use(layer: Any) -> list[int]:
    """Bits in use of the quantizers that a layer has."""
    return [quant.bits_in_use for quant in (layer.weight_quant, layer.input_quant) if quant is not None]


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _pictures_of(batch: Any) -> int:
    """The length of the first tensor of a batch that is no scalar; 0 without any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next(filter(None, map(_pictures_of, parts)), 0)


def _moved(batch: Any, device: Any) -> Any:
    """A batch with its tensors on a device."""
    if type(batch) is dict:
        return {key: _moved(each, device) for key, each in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_moved(each, device) for each in batch]
        return type(batch)(*parts) if hasattr(batch, '_fields') else type(batch)(parts)  # a namedtuple, or others
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _run(model: nn.Module, example: Any) -> Any:
    if isinstance(example, tuple):
        return model(*example)
    return model(**example) if isinstance(example, Mapping) else model(example)


def _bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, '_orig_mod'):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    return model


def _quantized(model: nn.Module, settings: dict[str, Any], plan: Plan) -> Report:
    """Quantize a model, which remembers how."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UserError(f'the model is on several devices, {", ".join(devices)}; its quantizers need it on one')
    report = quantize_model(model, Quantization.from_dict(settings), plan)
    model.to(next(model.parameters()).device)  # quantizers are made on the CPU
    model.gdrq_quantization = settings, plan  # type: ignore[assignment]
    return report


def _remembered(model: nn.Module) -> tuple[dict[str, Any], Plan]:
    found: Any = getattr(_bare(model), 'gdrq_quantization', None)
    if found is None:
        raise UserError('the model is not quantized: call gdrq_mm.quantize first')
    return found
