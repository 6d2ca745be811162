"""A packed file: a merged model with weights at their real bits, as safetensors.

Tensors have the names of the merged model's state dict. The codes of a weight, n bits each, are one U8 tensor: unsigned
numbers (code - lowest) / stride, one after the other, the lowest bit first, or compressed (coding.py). `__metadata__`
holds

    gdrq      version of this layout: 2 where codes are compressed
    sha256    of the file with this sum as zeros
    config    text of the config, to be read, never to be run
    meta      what the model knows of its data set, as JSON
    layers    what the merged layers are beside their tensors, as JSON, see :class:`PackedLayer`
    outputs   module -> [lo, hi] of the quantizer of its output, as JSON; factor F of the N-th product in a module is
              MODULE.product_quant.N.F
    absent    modules that are not deployed, as JSON

The float model of the config and this file make the merged model (from_packed.py); nothing is quantized or calibrated
for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_whole
from ..core.layers import QuantLayer
from .coding import compress_codes, decompress_codes, entropy, pack_codes, unpack_codes
from .merge import Absent, IntegerLayer, IntegerPyramid, OutputQuantizer

VERSION, COMPRESSED = '1', '2'
_SUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""As safetensors writes it into the header; in any other text of the header quotes are escaped."""


@dataclass(frozen=True)
class PackedLayer:
    """A merged layer beside its tensors."""

    shape: list[int]
    """Of the weight."""
    weight_bits: int
    spread: int
    lowest: int
    """Smallest code of the weight."""
    stride: int
    """Distance of two codes: 2 where all are odd (DoReFa), else they would not fit their bits."""
    inputs: list[list[int]]
    """[lo, hi, bits] of the input's codes; with several pyramid levels for each of them."""
    norm: str | None
    """The batch normalization that is folded into it."""
    head: str | None
    """With several pyramid levels: the module that calls the layer once for each."""
    compressed: bool = False
    """Whether the codes are compressed."""

    @staticmethod
    def from_dict(content: Any) -> PackedLayer:
        """Plain data, checked.

        Raises:
            ValueError, TypeError: it is not of this form.
        """
        layer = PackedLayer(**content)
        if not _integers(layer.shape) or any(size < 0 for size in layer.shape):
            raise ValueError(f'shape {layer.shape!r}')
        for key, low, high in (('weight_bits', 1, 8), ('spread', 1, 127), ('lowest', -128, 127), ('stride', 1, 127)):
            value = getattr(layer, key)
            if not _integers([value]) or not low <= value <= high:
                raise ValueError(f'{key} {value!r}')
        if not isinstance(layer.inputs, list) or not layer.inputs:
            raise ValueError(f'inputs {layer.inputs!r}')
        for each in layer.inputs:
            if (
                not _integers(each)
                or len(each) != 3
                or not (-128 <= each[0] <= 0 <= each[1] <= 255 and each[2] in range(9))
            ):
                raise ValueError(f'inputs {each!r}')
        if not all(isinstance(name, str | None) for name in (layer.norm, layer.head)):
            raise ValueError('norm or head is no name')
        if (layer.head is None) != (len(layer.inputs) == 1):
            raise ValueError(f'{len(layer.inputs)} pyramid levels with head {layer.head!r}')
        if type(layer.compressed) is not bool:
            raise ValueError(f'compressed {layer.compressed!r}')
        return layer

    @property
    def bits(self) -> tuple[int, int]:
        """Of the weight and of the input."""
        return self.weight_bits, self.inputs[0][2]


def _integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


@dataclass
class Packed:
    """What a packed file holds."""

    state: dict[str, Tensor]
    """State dict of the merged model, a tensor of several names under its first one."""
    layers: dict[str, PackedLayer]
    outputs: dict[str, list[int]]
    absent: list[str]
    config: str
    meta: dict[str, Any]


class CodeBytes(NamedTuple):
    """Bytes of all weights' codes in a packed file."""

    at_bits: int
    """At their real bits."""
    written: int
    """As the file has them."""
    entropy: float
    """What they need at least where no code tells about another, each layer with its own frequencies."""


# ---- writing --------------------------------------------------------------------------------------------------------


def write_packed(
    model: nn.Module,
    path: str | Path,
    config: str = '',
    meta: Mapping[str, Any] | None = None,
    compress: bool = False,
) -> CodeBytes:
    """Write a merged model.

    Args:
        model: what merge_model() returned.
        config: text of the config.
        meta: what the model knows of its data set, such as the names of the classes; plain data.
        compress: the codes of each layer that takes less bytes so, without loss.

    Returns:
        How many bytes the codes take.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
    layers, outputs, absent, sizes = {}, {}, [], []
    heads = {layer: name for name, head in model.named_modules() for _, layer in getattr(head, 'pyramid_layers', ())}
    levels: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, IntegerPyramid):
            levels.update(module.children())
            first, codes = module.get_submodule('0'), f'{name}.0.codes'
            levels_of, head = list(module.children()), heads[module]
            layers[name], state[codes], size = _encoded(first, levels_of, head, state[codes], compress)
            sizes.append(size)
        elif isinstance(module, IntegerLayer) and module not in levels:
            codes = f'{name}.codes'
            layers[name], state[codes], size = _encoded(module, [module], None, state[codes], compress)
            sizes.append(size)
        elif isinstance(module, Absent) or (isinstance(module, QuantLayer) and not module.stays_float):
            absent.append(name)
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f'{name}.')}
        elif isinstance(module, OutputQuantizer):
            outputs[name.removesuffix('output_quant').removesuffix('.')] = [module.lo, module.hi]
    about = {
        'gdrq': COMPRESSED if any(layer.compressed for layer in layers.values()) else VERSION,
        'sha256': '0' * 64,
        'config': config,
        'meta': _json(dict(meta or {})),
        'layers': _json({name: _plain(layer) for name, layer in layers.items()}),
        'outputs': _json(outputs),
        'absent': _json(absent),
    }
    import safetensors.torch  # an extra of the package, which a checkpoint of a training needs not

    content = safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()}, about)
    digest = hashlib.sha256(content).hexdigest()
    write_whole(path, content.replace(b'"sha256":"' + b'0' * 64, f'"sha256":"{digest}'.encode(), 1))
    return CodeBytes(*(sum(each) for each in zip(*sizes))) if sizes else CodeBytes(0, 0, 0.0)


def _plain(layer: PackedLayer) -> dict[str, Any]:
    """What a layer is, for JSON; files without compressed codes are those of version 1."""
    return {key: value for key, value in dataclasses.asdict(layer).items() if key != 'compressed' or value}


def _json(value: Any) -> str:
    return json.dumps(value, default=str, separators=(',', ':'))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, each tensor under its first name: layers may share modules, and levels their codes."""
    named: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        named.setdefault(id(tensor), name)
    return {name: state[name] for name in named.values()}


def _encoded(
    layer: Any, levels: list[Any], head: str | None, codes: Tensor, compress: bool
) -> tuple[PackedLayer, Tensor, CodeBytes]:
    array = codes.numpy()
    lowest = int(array.min()) if array.size else 0
    stride = 2 if array.size and int(array.max()) - lowest >= 2**layer.weight_bits else 1
    inputs = [[each.lo, each.hi, each.input_bits] for each in levels]
    unsigned = (array.astype(np.int16) - lowest) // stride
    packed = written = pack_codes(unsigned, layer.weight_bits)
    if compress and len(smaller := compress_codes(unsigned, layer.weight_bits)) < len(packed):
        written = smaller
    about = PackedLayer(
        list(codes.shape),
        layer.weight_bits,
        layer.spread,
        lowest,
        stride,
        inputs,
        layer.norm,
        head,
        written is not packed,
    )
    size = CodeBytes(len(packed), len(written), entropy(unsigned) * unsigned.size / 8)
    return about, torch.from_numpy(np.frombuffer(written, np.uint8).copy()), size


# ---- reading --------------------------------------------------------------------------------------------------------


def is_packed(path: str | Path) -> bool:
    """Whether a file begins as one of safetensors does, which checkpoints of a training never are."""
    try:
        with open(path, 'rb') as file:
            start = file.read(9)
    except OSError:
        return False
    return len(start) == 9 and start[8:] == b'{' and int.from_bytes(start[:8], 'little') < 1 << 40


def read_packed(path: str | Path) -> Packed:
    """The content of a packed file, its codes unpacked.

    Raises:
        UserError: missing, truncated, altered, damaged, or of another version.
    """
    import safetensors.torch

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'packed file {path} cannot be read: {error.strerror}') from None
    header = content[8 : 8 + int.from_bytes(content[:8], 'little')]
    found = _SUM.search(header)
    if found is None:
        raise UserError(f'{path} is not a packed file of this project')
    start, end = (8 + place for place in found.span(1))
    digest = hashlib.sha256(content[:start])
    for rest in (b'0' * 64, memoryview(content)[end:]):
        digest.update(rest)
    if digest.hexdigest() != found[1].decode():
        raise UserError(f'packed file {path} is truncated or altered: its checksum does not fit')
    try:
        state = safetensors.torch.load(content)
        about = json.loads(header)['__metadata__']
        if about['gdrq'] not in (VERSION, COMPRESSED):
            raise UserError(f'packed file {path} has version {about["gdrq"]}, this is {VERSION} or {COMPRESSED}')
        layers = {name: PackedLayer.from_dict(each) for name, each in json.loads(about['layers']).items()}
        for name, layer in layers.items():
            codes = _codes_name(name, layer)
            state[codes] = _decoded(state[codes], layer)
        outputs, absent, meta = (json.loads(about[key]) for key in ('outputs', 'absent', 'meta'))
        if not all(_integers(ends) and len(ends) == 2 for ends in outputs.values()):
            raise ValueError(f'outputs {outputs!r}')
        if not isinstance(absent, list) or not all(isinstance(name, str) for name in absent):
            raise ValueError(f'absent {absent!r}')
        meta = {key: _colors(value) for key, value in meta.items()}
        return Packed(state, layers, outputs, absent, about['config'], meta)
    except (
        safetensors.SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'packed file {path} is damaged: {type(error).__name__} {error}'.splitlines()[0]) from None


def _codes_name(name: str, layer: PackedLayer) -> str:
    return f'{name}.codes' if layer.head is None else f'{name}.0.codes'


def _decoded(packed: Tensor, layer: PackedLayer) -> Tensor:
    if packed.dtype != torch.uint8:
        raise ValueError(f'codes are {packed.dtype}')
    read = decompress_codes if layer.compressed else unpack_codes
    unsigned = read(packed.numpy().tobytes(), layer.weight_bits, math.prod(layer.shape))
    codes = unsigned.astype(np.int32) * layer.stride + layer.lowest
    if codes.size and codes.max() > 127:
        raise ValueError('codes beyond int8')
    return torch.from_numpy(codes.astype(np.int8).reshape(layer.shape))


def _colors(value: Any) -> Any:
    """A palette with its colors as tuples again, as visualizers want them; JSON has made them lists."""
    return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value
