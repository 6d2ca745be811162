"""Products of two activations, as query x key and weights x value of attention: recorded, and quantized where they are.

They are no modules but calls in the forward of one, `q @ k.transpose(-2, -1)` for example. A mode of torch sees these
calls, in the recording (topology.py) and in a module whose factors are quantized, counted in the order of its forward.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .compat import is_compiling
from .errors import UserError
from .typed import FLOAT_BITS

KINDS: dict[Any, str] = {
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), 'matmul'),
    Tensor.__rmatmul__: 'rmatmul',
    **dict.fromkeys((torch.bmm, Tensor.bmm), 'bmm'),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), 'baddbmm'),
    torch.einsum: 'einsum',
    nn.functional.scaled_dot_product_attention: 'attention',
}
"""Functions that multiply two activations -> how."""
_NAMES = {
    'matmul': ('input', 'other'),
    'rmatmul': ('other', 'input'),
    'bmm': ('input', 'mat2'),
    'baddbmm': ('input', 'batch1', 'batch2'),
    'attention': ('query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal'),
}
"""Names of their arguments, in order."""
Pair = Callable[[Sequence[Tensor], str, bool], Sequence[Tensor]]
"""Given the factors, the equation of einsum or '', and whether the first one is made by softmax: those to multiply."""


@dataclass(frozen=True)
class Attention:
    """Products of two activations (the dict `quantization.attention`)."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8, 32] = 8
    """Bits of both factors, with `deployable`; 32: products stay float."""


def name_of(module: str, number: int) -> str:
    """The name of the quantizers of a product."""
    return f'{module}.product_quant.{number}'.lstrip('.')


@dataclass(frozen=True)
class Product:
    """A product in the forward of a module."""

    module: str
    number: int
    """Among the products of one forward of the module, from 0."""
    kind: str
    softmax: tuple[bool, bool]
    """Of each factor, whether it is made by softmax, so that it lies between 0 and 1."""
    note: str = ''
    """Why it stays float; '': it need not."""

    @property
    def name(self) -> str:
        """That of its quantizers."""
        return name_of(self.module, self.number)

    @staticmethod
    def from_dict(content: Any) -> Product:
        """The inverse of dataclasses.asdict; of old plans the name of a module.

        Raises:
            ValueError: `content` is not of that form.
        """
        if isinstance(content, str):
            return Product(content, 0, 'product', (False, False), 'recorded before products were quantized')
        given = dict(content) if isinstance(content, Mapping) else {}
        softmax = given.pop('softmax', None)
        types = {key: type(value) for key, value in given.items()}
        flags = isinstance(softmax, (list, tuple)) and [type(each) for each in softmax] == [bool, bool]
        if not flags or types != dict(module=str, number=int, kind=str, note=str):
            raise ValueError('a product of the plan is not module, number, kind, softmax and note')
        return Product(softmax=tuple(softmax), **given)  # type: ignore[arg-type]


def multiply(func: Any, args: Any, kwargs: Mapping[str, Any], pair: Pair) -> Any:
    """What a function of KINDS computes, with the factors that `pair` gives for each product in it.

    An einsum of one operand is none.
    """
    kind = KINDS[func]
    if kind == 'einsum':
        equation, *factors = args
        factors = list(factors[0]) if isinstance(factors[0], (list, tuple)) else factors
        factors = pair(factors, equation, False) if len(factors) > 1 else factors
        return func(equation, *factors)
    given = {**dict(zip(_NAMES[kind], args)), **kwargs}
    if kind == 'attention':
        return _attention(pair, **given)
    if kind == 'baddbmm':
        factors = pair([given.pop('batch1'), given.pop('batch2')], '', False)
        return torch.baddbmm(given.pop('input'), *factors, **given)
    factors = pair([given.pop('input'), given.pop('mat2' if kind == 'bmm' else 'other')], '', False)
    return (torch.bmm if kind == 'bmm' else torch.matmul)(*factors, **given)


def _attention(
    pair: Pair,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """nn.functional.scaled_dot_product_attention in two products and a softmax; 0 where a mask leaves no key.

    Raises:
        UserError: a mask, and `is_causal` beside it.
    """
    if is_causal and attn_mask is not None:
        raise UserError('scaled_dot_product_attention takes attn_mask or is_causal=True, not both')
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    query = query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    query, transposed = pair([query, key.transpose(-2, -1)], '', False)
    scores = query @ transposed
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if allowed else scores + attn_mask
    weights = scores.softmax(-1) if attn_mask is None else softmax(scores)
    weights = nn.functional.dropout(weights, dropout_p)
    weights, value = pair([weights, value], '', True)
    return weights @ value


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; 0 where all scores are -infinity, for which torch's makes NaN."""
    alone = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)


def operations(factors: Sequence[Tensor], equation: str) -> int:
    """Multiply-accumulates of a product; of more than two factors from left to right."""
    if not equation:
        a, b = factors
        columns = b.shape[-1] if b.dim() > 1 else 1
        rows, inner = (a.shape[-2] if a.dim() > 1 else 1), a.shape[-1]
        return math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])) * rows * inner * columns
    left, arrow, result = equation.replace(' ', '').partition('->')
    result = result if arrow else ''.join(name for name in left if left.count(name) == 1)
    sizes: dict[str, int] = {}
    names: list[list[str]] = []
    for letters, x in zip(left.split(','), factors, strict=True):
        before, _, after = letters.partition('...')
        middle = range(len(before), x.dim() - len(after))
        names.append([*before, *(f'.{x.dim() - len(after) - i}' for i in middle), *after])
        for name, size in zip(names[-1], x.shape):
            sizes[name] = max(size, sizes.get(name, 1))
    count, open_ = 0, set(names[0])
    for number, others in enumerate(names[1:], 2):
        open_ |= set(others)
        count += math.prod(sizes[name] for name in open_)
        later = {*result, *(name for rest in names[number:] for name in rest)}
        open_ = {name for name in open_ if name in later or name.startswith('.')}
    return count


def factor_quantizers(model: nn.Module, product: str) -> list[Any]:
    """The quantizers of both factors of a product, by its name; [] if it is float."""
    found: Any = model
    for part in product.split('.'):
        found = found._modules.get(part)
        if found is None:
            return []
    return list(found)


def factor_bits(model: nn.Module, product: str) -> tuple[int, int]:
    """Bits of both factors of a product; 32 is float."""
    bits = [quant.bits_in_use for quant in factor_quantizers(model, product)] or [FLOAT_BITS, FLOAT_BITS]
    return bits[0], bits[1]


# ---- while a model runs ---------------------------------------------------------------------------------------------


def attach(module: Any, number: int, quantizers: list[nn.Module]) -> None:
    """Quantize the factors of a product in the forward of a module by two quantizers; without any it stays float."""
    if not hasattr(module, 'product_quant'):
        module.product_quant = nn.ModuleList()
        module.forward = functools.partial(_run, module, module.forward)
    while len(module.product_quant) <= number:
        module.product_quant.append(nn.ModuleList())
    module.product_quant[number] = nn.ModuleList(quantizers)


def detach(module: Any) -> None:
    """The inverse of :func:`attach`: all products of a module are float."""
    if 'product_quant' in module._modules:
        forward = module.__dict__.pop('forward').args[1]
        if forward != module.forward:  # the model had put another function there
            module.forward = forward
        del module.product_quant, module.products_recorded


def _run(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Quantizing(module.product_quant) as running:
        out = forward(*args, **kwargs)
    if (recorded := getattr(module, 'products_recorded', None)) is not None and not is_compiling():
        name, count = recorded
        if running.count != count:
            module.products_recorded = None  # told once
            warnings.warn(
                f'{name or "the model"} multiplies {running.count} times, and {count} times when it was recorded: its '
                'products are quantized in the order of their calls, so some may get the quantizers of others; '
                'attention=dict(bits=32) leaves all of them in float',
                stacklevel=2,
            )
    return out


class _Running(threading.local):
    """Modules that multiply and are running in a thread."""

    def __init__(self) -> None:
        self.modules: list[_Quantizing] = []
        """Innermost last: a product belongs to the innermost one."""


_RUNNING = _Running()


class _Quantizing(TorchFunctionMode):
    def __init__(self, products: nn.ModuleList) -> None:
        super().__init__()
        self.products, self.count = products, 0
        self.learns = torch.is_grad_enabled()

    def __enter__(self) -> Any:
        _RUNNING.modules.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _RUNNING.modules.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KINDS and _RUNNING.modules[-1] is self:
            return multiply(func, args, kwargs or {}, self.pair)
        return func(*args, **(kwargs or {}))

    def pair(self, factors: Sequence[Tensor], equation: str, softmax: bool) -> Sequence[Tensor]:
        number, self.count = self.count, self.count + 1
        quantizers: Any = self.products[number] if number < len(self.products) else ()
        if self.learns and len(quantizers) and not is_compiling():
            _refuse_checkpoint(quantizers[0])
        return [quant(x) for quant, x in zip(quantizers, factors)] if len(quantizers) else factors


def _refuse_checkpoint(quantizer: Any) -> None:
    """Refuse a product in a part of its module that is computed again in the backward pass, where it would be float.

    Raises:
        UserError: torch.utils.checkpoint stands between the product and the forward of its module.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise UserError(
                f'{getattr(quantizer, "name", "a product")}: activation checkpointing holds a part of a module that '
                'multiplies; let it hold the whole module, or leave the products in float by attention=dict(bits=32)'
            )
        frame = frame.f_back  # type: ignore[assignment]
