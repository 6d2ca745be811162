"""The plan of a model: what feeds what, recorded during one eager prediction. No torch.fx, no tracing.

Forward hooks see which module reads and returns which tensor. A TorchFunctionMode sees the operands of additions, the
factors of products and the inputs of activation functions; nn.MultiheadAttention is written out meanwhile. Each version
of a tensor has a number, so the result of an in-place ReLU is another one than its input. References to tensors are
weak: recording keeps no tensor alive.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import Projection, names_written_out, written_out
from .modules import hooked, modes_kept
from .products import KINDS, Product, multiply, name_of, operations

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
"""Functions that add two tensors."""
_ACTIVATIONS = set(
    'celu elu gelu hardsigmoid hardswish leaky_relu logsigmoid mish prelu rrelu selu sigmoid silu softplus tanh'.split()
)
"""Names of functions that a runtime cannot express by the clip of a quantizer, as it does ReLU."""
_SAME_VALUES = {
    *'transpose permute t view reshape flatten unflatten squeeze unsqueeze contiguous to float type_as'.split(),
    *'dropout masked_fill'.split(),
}
"""Names of functions that leave what softmax made between 0 and 1, in evaluation."""
_NORMALIZE = {nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward}
"""What batch norms do that do nothing else; a subclass may activate too, and is no part of a convolution then."""


@dataclass(frozen=True)
class Addition:
    """One addition of two tensors of the same shape."""

    module: str
    """Module whose forward adds."""
    operands: tuple[tuple[str, ...], tuple[str, ...]]
    """For each operand the modules that returned it, innermost first; empty if a function made it."""


@dataclass
class Plan:
    """What one prediction tells about a model. Names are those of `named_modules()`, the first one of a shared module.

    It depends on the model alone: not on the picture, and not on how often the picture makes a part of it run. A
    checkpoint holds it as plain data (:meth:`to_dict`).
    """

    calls: dict[str, int] = field(default_factory=dict)
    """How often each module was called, in the order of the first call."""
    inputs: dict[str, int] = field(default_factory=dict)
    """Number of the tensor that a module read at its first call; the same number is the same tensor."""
    norms: dict[str, str] = field(default_factory=dict)
    """Convolution -> the batch normalization that can be folded into it: each reads and is read by nothing else."""
    additions: list[Addition] = field(default_factory=list)
    activated: list[str] = field(default_factory=list)
    """Modules all of whose results an activation function other than ReLU and ReLU6 reads."""
    products: list[Product] = field(default_factory=list)
    """Products of two tensors in the forward of a module, as in attention, in the order of each module's forward."""
    by_function: list[str] = field(default_factory=list)
    """Layers that are not called, though their weight is read: by a function, as torchvision's Swin reads that of
    `attn.qkv`, or by `layer.forward(x)`."""
    last: list[str] = field(default_factory=list)
    """Layers that make the model's outputs; empty: the one that was called last."""
    training_only: list[str] = field(default_factory=list)
    """Modules that are not deployed, with what is in them, such as auxiliary heads."""
    macs: dict[str, int] = field(default_factory=dict, compare=False)
    """Multiply-accumulates of each convolution, linear layer and product for the picture that was recorded."""

    def deployed(self, name: str) -> bool:
        """Whether a module or parameter of this name is part of the deployed model."""
        return not any(name == top or name.startswith(f'{top}.') for top in self.training_only)

    def unknown_to(self, model: nn.Module) -> str | None:
        """The first module of this plan that a model does not have, its attention written out; None: it has all."""
        known = names_written_out(model)
        products = (each.module for each in self.products)
        named = (*self.calls, *self.inputs, *self.norms, *self.norms.values(), *self.activated, *self.by_function)
        others = (*self.last, *self.training_only, *products)
        return next((name for name in (*named, *others) if name not in known), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what :meth:`from_dict` takes."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(content: Any) -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: `content` is not of that form.
        """
        names = [f.name for f in dataclasses.fields(Plan)]
        if isinstance(content, Mapping):
            content = {'products': [], 'by_function': [], **content}  # which older plans do not have
        if not isinstance(content, Mapping) or set(content) != set(names):
            raise ValueError(f'a plan has {", ".join(names)}')
        for name in ('calls', 'inputs', 'macs'):
            if not _is_dict(content[name], int):
                raise ValueError(f'{name} of the plan is not a dict of integers')
        if not _is_dict(content['norms'], str):
            raise ValueError('norms of the plan is not a dict of names')
        for name in ('activated', 'by_function', 'last', 'training_only'):
            if not _is_names(content[name]):
                raise ValueError(f'{name} of the plan is not a list of names')
        additions, products = content['additions'], content['products']
        for name, value in (('additions', additions), ('products', products)):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f'{name} of the plan is not a list')
        for each in additions:
            sides = each.get('operands') if isinstance(each, Mapping) and isinstance(each.get('module'), str) else None
            if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(_is_names, sides)):
                raise ValueError('an addition of the plan is not a module with two lists of names')
        found = [Addition(a['module'], tuple(tuple(side) for side in a['operands'])) for a in additions]  # type: ignore[arg-type]
        copied = {n: dict(v) if isinstance(v, Mapping) else list(v) for n, v in content.items()}
        copied.update(additions=found, products=[Product.from_dict(each) for each in products])
        return Plan(**copied)  # type: ignore[arg-type]


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _is_dict(value: Any, kind: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and type(v) is kind for k, v in value.items())


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, whole: bool) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.owners = {id(p): name for name, m in model.named_modules() for p in m.parameters(recurse=False)}
        self.softmaxed: set[int] = set()
        self.multiplied: dict[str, int] = {}
        self.convs = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        self.plan = Plan()
        self.whole = whole
        self.repeated = 0
        """How many modules deep we are in a part that ran before: it tells nothing new."""
        self.images = 0
        self.stack: list[str] = []
        self.running: list[str] = []
        """Modules whose forward runs, innermost last; also those whose forward is called as a method."""
        self.numbers = WeakTensorKeyDictionary()
        self.count = 0
        self.producers: dict[int, list[str]] = {}
        self.made_by: dict[int, str] = {}
        self.reads: dict[str, int] = {}
        self.norms: dict[str, Counter[str]] = {}
        """Convolution -> how often each batch normalization read a result of it."""
        self.activated: dict[str, set[int]] = {}

    def number(self, tensor: Tensor) -> int:
        """The number of this version of a tensor."""
        versions: dict[int, int] = self.numbers.setdefault(tensor, {})  # type: ignore[assignment]
        version = -1 if tensor.is_inference() else tensor._version
        if version not in versions:
            self.count += 1
            versions[version] = self.count
        return versions[version]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.repeated:
            return multiply(func, args, kwargs, self._multiply) if func in KINDS else func(*args, **kwargs)
        pair = [*args, *(kwargs[key] for key in ('input', 'other') if key in kwargs)][:2]
        if func in ADDITIONS and len(pair) > 1 and all(isinstance(a, Tensor) for a in pair):
            self._add(*pair)
        if getattr(func, '__name__', '').rstrip('_') in _ACTIVATIONS and pair and isinstance(pair[0], Tensor):
            for producer in self.producers.get(self.number(pair[0]), [])[:1]:
                self.activated.setdefault(producer, set()).add(self.number(pair[0]))
        given = list(_tensors([args, kwargs]))
        numbers = {self.number(a) for a in given}
        out = multiply(func, args, kwargs, self._multiply) if func in KINDS else func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._follow(getattr(func, '__name__', ''), pair[:1], out)
        if func is Tensor.__setitem__ or next(_tensors(out), None) is not None:  # a size or a type is no reading
            self._read(numbers)
            owners = (self.owners.get(id(a)) for a in given)
            found = [n for n in owners if n is not None and n not in (*self.stack, *self.plan.by_function)]
            self.plan.by_function.extend(dict.fromkeys(found))
        return out

    def _read(self, numbers: Iterable[int]) -> None:
        """Count readings of what convolutions have made."""
        for name in (self.made_by[n] for n in numbers if n in self.made_by):
            self.reads[name] = self.reads.get(name, 0) + 1

    def _add(self, a: Tensor, b: Tensor) -> None:
        if a.shape == b.shape and a.dim() > 2 and a.is_floating_point():
            one, other = (tuple(self.producers.get(self.number(t), ())) for t in (a, b))
            found = Addition(self.stack[-1] if self.stack else '', (one, other))
            between = not self.whole and not any(self.stack)  # windows that are put together: as many as there are
            if not between or ((one or other) and found not in self.plan.additions):
                self.plan.additions.append(found)

    def _multiply(self, factors: Sequence[Tensor], equation: str, softmax: bool) -> Sequence[Tensor]:
        """Note a product of the innermost module."""
        module = self.running[-1] if self.running else ''
        number = self.multiplied[module] = self.multiplied.get(module, -1) + 1
        self.images = self.images or max(len(factors[0]), 1)
        counted = name_of(module, number)
        self.plan.macs[counted] = self.plan.macs.get(counted, 0) + operations(factors, equation) // self.images
        if not self.repeated and number >= sum(each.module == module for each in self.plan.products):
            note = ''
            if len(factors) > 2:
                note = f'einsum of {len(factors)} factors'
            elif any(id(x if x._base is None else x._base) in self.constants for x in factors):
                note = 'one factor is a parameter'
            elif not self.whole and not module:
                note = 'between the parts of the model'
            first, second, *_ = (self.number(x) in self.softmaxed for x in factors)
            kind = 'einsum' if equation else 'matmul'
            self.plan.products.append(Product(module, number, kind, (softmax or first, second), note))
        return factors

    def _follow(self, function: str, first: Sequence[Any], out: Tensor) -> None:
        """Note which tensors softmax has made."""
        source = first[0] if first and isinstance(first[0], Tensor) else None
        known = source is not None and self.number(source) in self.softmaxed
        if function == 'softmax' or (known and function in _SAME_VALUES):
            self.softmaxed.add(self.number(out))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module]
        outermost = not self.whole and name != '' and not any(self.stack)
        if self.repeated or (outermost and name in self.plan.calls):
            self.repeated += 1
            return
        self.stack.append(name)
        self.plan.calls[name] = self.plan.calls.get(name, 0) + 1
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if tensors:
            self.images = self.images or max(len(tensors[0]), 1)
            number = self.number(tensors[0])
            if name or self.whole:  # else the picture, of which the parts may read windows
                self.plan.inputs.setdefault(name, number)
            if type(module).forward in _NORMALIZE or getattr(module, 'only_normalizes', False):
                for producer in self.producers.get(number, [])[:1]:
                    if producer in self.convs:
                        self.norms.setdefault(producer, Counter())[name] += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        name = self.names[module]
        if isinstance(out, Tensor) and _multiplies(module):
            x = (*args, *kwargs.values())[0]
            self.plan.macs[name] = self.plan.macs.get(name, 0) + _macs(module, x, out, self.images)
        if self.repeated:
            self.repeated -= 1
            return
        self.stack.pop()
        if self.whole and not self.stack:
            self._read({self.number(each) for each in _tensors(out)})
        if isinstance(out, Tensor):
            number = self.number(out)
            self.producers.setdefault(number, []).append(name)
            if name in self.convs:
                self.made_by[number] = name

    def finish(self) -> Plan:
        """The plan, from what was seen."""
        calls = self.plan.calls
        alone = {
            conv: norm
            for conv, norms in self.norms.items()
            for norm, times in norms.items()
            if times == calls[conv] and self.reads.get(conv, 0) <= calls[conv]
        }
        read = Counter[str]()
        for conv, norm in alone.items():
            read[norm] += calls[conv]
        self.plan.norms = {conv: norm for conv, norm in alone.items() if read[norm] == calls[norm]}
        self.plan.by_function = [name for name in self.plan.by_function if name not in calls]
        self.plan.activated = [name for name, results in self.activated.items() if len(results) == calls.get(name)]
        order = {number: i for i, number in enumerate(dict.fromkeys(self.plan.inputs.values()))}
        self.plan.inputs = {name: order[number] for name, number in self.plan.inputs.items()}
        return self.plan


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _multiplies(module: nn.Module) -> bool:
    """Whether it is a layer whose multiply-accumulates are known: linear, or a convolution, deformable ones too."""
    weight = getattr(module, 'weight', None)
    other = 'Conv' in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.dim() > 2
    return other or isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, Projection))


def _macs(module: nn.Module, x: Tensor, out: Tensor, images: int) -> int:
    each = x if isinstance(module, nn.modules.conv._ConvTransposeNd) else out
    return each.numel() * module.weight[0].numel() // images  # type: ignore[operator, union-attr, index]


def _handles(recorder: _Recorder) -> Iterator[Any]:
    for module in recorder.names:
        if not isinstance(module, torch.jit.ScriptModule):  # it takes neither hooks nor another forward
            yield module.register_forward_pre_hook(recorder.enter, with_kwargs=True)
            yield module.register_forward_hook(recorder.leave, with_kwargs=True)
            yield _Forward(module, recorder)


class _Forward:
    """Tells a recorder that the forward of a module runs: heads of mmseg call it without the hooks."""

    def __init__(self, module: Any, recorder: _Recorder) -> None:
        self.module, self.before = module, vars(module).get('forward')
        module.forward = functools.partial(self.run, recorder, recorder.names[module], module.forward)

    @staticmethod
    def run(recorder: _Recorder, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        recorder.running.append(name)
        recorder.multiplied[name] = -1
        try:
            return forward(*args, **kwargs)
        finally:
            recorder.running.pop()

    def remove(self) -> None:
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before


def record(
    model: nn.Module,
    predict: Callable[[], Any],
    whole: bool = True,
    last: Iterable[str] = (),
    training_only: Iterable[str] = (),
) -> Plan:
    """Run `predict` once, in evaluation mode and without gradients, and tell what feeds what in `model`.

    The model's training flags and random state are left as they were.

    Args:
        whole: `predict` calls the model's forward once, and every call in it counts. False: the forward runs parts of
            the model as often as the picture wants (sliding windows), and only the first run of each part counts.
        last, training_only: what is known of the model beside the prediction, see :class:`Plan`.
    """
    with modes_kept(model), written_out(model), torch.no_grad(), torch.random.fork_rng():
        recorder = _Recorder(model, whole)
        with hooked(_handles(recorder)), recorder:
            model.eval()
            predict()
    plan = recorder.finish()
    plan.last, plan.training_only = list(last), list(training_only)
    return plan
