"""nn.MultiheadAttention written out: three projections and an output projection that are layers, and two products.

torch computes it in one function that reads the weights itself, so that no layer of it could be quantized. Written out
it has the same Parameters under the same names, computes the same, and is recorded and quantized as any module: the
projections are layers q_proj, k_proj and v_proj, whose weights are rows of the packed one where it is packed; products
are found in its forward, see products.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .compat import is_compiling
from .errors import UserError
from .layers import COPIED, QUANTIZED, QuantLayer
from .modules import replace_modules
from .products import softmax

PROJECTIONS = ('q_proj', 'k_proj', 'v_proj')


class Projection(nn.Module):
    """The projection of query, key or value, (..., in_features) to (..., embed_dim).

    It is no nn.Linear, so that whoever initializes all linear layers of a model leaves it alone, as before.

    Args:
        attention: whose Parameters it reads.
        number: of its name in PROJECTIONS.
    """

    def __init__(self, attention: WrittenOut, number: int) -> None:
        super().__init__()
        self.number = number
        self.attention = (attention,)  # a tuple, so that it is no child

    @property
    def weight(self) -> Any:
        """(embed_dim, in_features): rows of the packed weight, or a Parameter of its own."""
        (attention,) = self.attention
        if attention.in_proj_weight is None:
            return getattr(attention, f'{PROJECTIONS[self.number]}_weight')
        return self._rows(attention.in_proj_weight)

    @property
    def bias(self) -> Any:
        """(embed_dim,), or None."""
        (attention,) = self.attention
        return None if attention.in_proj_bias is None else self._rows(attention.in_proj_bias)

    def _rows(self, packed: Tensor) -> Tensor:
        size = self.attention[0].embed_dim
        return packed[self.number * size : (self.number + 1) * size]

    @property
    def out_features(self) -> int:
        """Number of filters."""
        return self.attention[0].embed_dim

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.linear(input, self.weight, self.bias)


class QuantProjection(QuantLayer, Projection):  # type: ignore[misc]
    """A projection with quantized weight and input. Its groups are of its own filters, and may cut a head."""

    @property
    def geometry(self) -> tuple[Any, Any, Any, int] | None:
        return (), (), (), 1

    @property
    def held(self) -> tuple[Any, slice]:
        (attention,) = self.attention
        if attention.in_proj_weight is None:
            return super().held
        first = self.number * attention.embed_dim
        return attention.in_proj_weight, slice(first, first + attention.embed_dim)

    def stored(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        """Its weight in a state dict, where the module is called `name`."""
        above = name.removesuffix(PROJECTIONS[self.number])
        packed = state.get(f'{above}in_proj_weight')
        return state[f'{name}_weight'] if packed is None else self._rows(packed)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without quantizers, with this weight and bias."""
        return nn.functional.linear(x, weight, bias)


QUANTIZED[Projection] = QuantProjection
LINEAR = (nn.Linear, Projection)
"""Layers whose channels are the last dimension of what they return."""


class WrittenOut(nn.Module):
    """nn.MultiheadAttention in modules and products, never in torch's fast path; made by :meth:`of`.

    It has all attributes of torch's module, and is no instance of it. Where the masks leave a query no key, it gives
    what torch from 2.5 on does in training: NaN with `need_weights`, 0 without.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    q_proj: Any
    k_proj: Any
    v_proj: Any
    weights_drop: Any
    out_proj: Any
    _qkv_same_embed_dim: bool

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> WrittenOut:
        """The same attention with the same Parameters, hooks and attributes."""
        new = cls.__new__(cls)
        new.__dict__.update({k: copy.copy(v) if k in COPIED else v for k, v in attention.__dict__.items()})
        out = nn.Linear.__new__(nn.Linear)
        out.__dict__.update(new._modules.pop('out_proj').__dict__)  # type: ignore[union-attr]
        for number, name in enumerate(PROJECTIONS):
            new.add_module(name, Projection(new, number).train(attention.training))
        new.weights_drop = nn.Dropout(attention.dropout).train(attention.training)
        new.out_proj = out  # type: ignore[assignment]
        new._qkv_same_embed_dim = False  # tells nn.TransformerEncoderLayer to call this module
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes as nn.MultiheadAttention.

        Args:
            is_causal: a hint that `attn_mask` is causal; it is not needed.

        Raises:
            UserError: a mask is neither of bool nor of floating point, or has another shape; a nested tensor.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise UserError('attention takes no nested tensors once it is quantized; pad them, with a key_padding_mask')
        single = query.dim() == 2
        q, k, v = (
            self._heads(x.unsqueeze(0) if single else x, self.batch_first or single)
            for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        images, _, length, width = q.shape
        mask = self._mask(attn_mask, key_padding_mask, images, length, k.shape[2], q.dtype)
        if is_causal and attn_mask is None:
            raise UserError('is_causal=True wants an attn_mask')
        k, v, added = self._with_more_keys(k, v)
        scores = (q * math.sqrt(1 / width)) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + (nn.functional.pad(mask, (0, added)) if added else mask)
        weights = scores.softmax(-1) if mask is None or need_weights else softmax(scores)
        weights = self.weights_drop(weights)
        found = weights @ v
        found = found.permute(0, 2, 1, 3) if self.batch_first or single else found.permute(2, 0, 1, 3)
        out = self.out_proj(found.flatten(2).squeeze(0) if single else found.flatten(2))
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights.squeeze(0) if single else weights

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(N, L, E), or (L, N, E) without `batch_first`, to (N, heads, L, E / heads)."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)  # torch.compile cannot trace unflatten here
        return x.permute(0, 2, 1, 3) if batch_first else x.permute(1, 2, 0, 3)

    def _with_more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values, (N, heads, S, D), with those of bias_k and bias_v and with zeros; how many were added."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, self._heads(bias, True).expand(x.shape[0], -1, -1, -1)], 2)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        return k, v, added

    def _mask(
        self, attn: Tensor | None, padding: Tensor | None, images: int, length: int, keys: int, dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores, (N or 1, heads or 1, L or 1, S); None without masks."""
        found = None
        shapes = {'attn_mask': [(length, keys), (images * self.num_heads, length, keys)]}
        shapes['key_padding_mask'] = [(images, keys), (keys,)]
        for name, mask in (('attn_mask', attn), ('key_padding_mask', padding)):
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise UserError(f'{name} is of {mask.dtype}; it can be of bool or floating point')
            if not is_compiling() and tuple(mask.shape) not in shapes[name]:
                raise UserError(f'{name} has the shape {tuple(mask.shape)}, not {" or ".join(map(str, shapes[name]))}')
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
            if name == 'key_padding_mask':
                mask = mask.view(-1, 1, 1, keys)
            elif mask.dim() == 3:
                mask = mask.view(-1, self.num_heads, length, keys)
            found = mask if found is None else found + mask
        return found

    merge_masks = nn.MultiheadAttention.merge_masks

    def forget_weights(self) -> None:
        """Drop the weights of the projections if integers have replaced all of them."""
        if not any(isinstance(getattr(self, name), Projection) for name in PROJECTIONS):
            for name in ('in_proj_weight', 'in_proj_bias', *(f'{name}_weight' for name in PROJECTIONS)):
                self._parameters[name] = None

    def to_torch(self) -> nn.MultiheadAttention:
        """The inverse of :meth:`of`: nn.MultiheadAttention with the same Parameters."""
        new = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        new.__dict__.update({k: copy.copy(v) if k in COPIED else v for k, v in self.__dict__.items()})
        for name in ('weights_drop', *PROJECTIONS):
            del new._modules[name]
        new._qkv_same_embed_dim = self.in_proj_weight is not None
        new.out_proj = NonDynamicallyQuantizableLinear(1, 1, device='meta')
        new.out_proj.in_features = new.out_proj.out_features = self.embed_dim
        new.out_proj._parameters = dict(self.out_proj._parameters)
        new.out_proj.train(self.training)
        return new


def attention_to_quantize(model: nn.Module, skipped: Callable[[str], bool], plan: Any) -> list[str]:
    """Names of attention to quantize: that which is called, and is not skipped by the config.

    An attention of an old plan, which knows no projections, stays float too.
    """
    left = {name for name in plan.calls if f'{name}.{PROJECTIONS[0]}' not in plan.calls} | {*plan.by_function}
    return [name for name in packed_attention(model) if name not in left and not skipped(name)]


def packed_attention(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Name -> attention that can be written out; subclasses may compute something else, and cannot."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.MultiheadAttention}


def write_out(model: nn.Module, names: Any = None) -> dict[nn.Module, nn.Module]:
    """Write the attention of a model out, in place; all of it, or that of some names. Returns old -> new."""
    found = {m: WrittenOut.of(m) for name, m in packed_attention(model).items() if names is None or name in names}
    replace_modules(model, found)
    for module in model.modules():
        if found and isinstance(module, nn.TransformerEncoder):
            module.nested_in_float = module.use_nested_tensor  # type: ignore[assignment]
            module.use_nested_tensor = False  # that is for torch's fast path alone
    return found  # type: ignore[return-value]


def write_back(model: nn.Module) -> None:
    """The inverse of :func:`write_out`."""
    replace_modules(model, {m: m.to_torch() for m in model.modules() if isinstance(m, WrittenOut)})
    for module in model.modules():
        if 'nested_in_float' in vars(module):
            module.use_nested_tensor = module.nested_in_float
            del module.nested_in_float


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Write the attention of a model out, meanwhile."""
    nested = {m: m.use_nested_tensor for m in model.modules() if isinstance(m, nn.TransformerEncoder)}
    found = write_out(model)
    try:
        yield
    finally:
        replace_modules(model, {new: old for old, new in found.items()})
        for encoder, value in nested.items():
            encoder.use_nested_tensor = value
            vars(encoder).pop('nested_in_float', None)


def names_written_out(model: nn.Module) -> set[str]:
    """Names of all modules of a model, and of those that it has when its attention is written out."""
    names = {name for name, _ in model.named_modules()}
    return names | {f'{name}.{part}' for name in packed_attention(model) for part in (*PROJECTIONS, 'weights_drop')}
