"""A packed checkpoint: weights at their real bits, one file, safe to load.

Layout: 8 bytes magic, 4 bytes version, 8 bytes length of the header (little endian), the header as JSON, the payload,
and the SHA-256 of everything before it. The header lists the tensors with type, shape and place in the payload. Codes
of n bits are stored as unsigned numbers, code - lowest code, one after the other, the lowest bit first.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_whole
from ..core.layers import QuantLayer
from ..core.quantizers import ActivationQuantizer, Quantizer, Stage
from ..core.topology import Plan
from .merge import IntegerLayer, merge_model, shared_codes

MAGIC, VERSION = b'GDRQPACK', 1
_TYPES = {'float32': np.float32, 'int64': np.int64, 'int32': np.int32, 'bool': np.bool_}


def write_packed(
    model: torch.nn.Module, path: str | Path, config: str = '', meta: Mapping[str, Any] | None = None
) -> None:
    """Write a merged model.

    Args:
        model: what merge_model() returned.
        config: text of the config; it is kept beside the tensors, to be read, never to be run.
        meta: what the model knows of its data set, such as the names of the classes; plain data.
    """
    every = model.named_modules(remove_duplicate=False)  # a layer of several names is in the state under each
    bits = {f'{n}.codes': m.weight_bits for n, m in every if isinstance(m, IntegerLayer)}
    ranges = {
        n: dict(lo=m.lo, hi=m.hi, weight_bits=m.weight_bits, input_bits=m.input_bits, norm=m.norm)
        for n, m in model.named_modules()
        if isinstance(m, IntegerLayer)
    }
    payload, tensors, shared = bytearray(), {}, shared_codes(model)
    for name, tensor in model.state_dict().items():
        if name in shared:
            continue
        entry, data = _encode(name, tensor, bits.get(name))
        tensors[name] = {**entry, 'offset': len(payload), 'bytes': len(data)}
        payload += data
    header = json.dumps(
        dict(config=config, meta=dict(meta or {}), layers=ranges, tensors=tensors), default=str
    ).encode()
    content = MAGIC + struct.pack('<IQ', VERSION, len(header)) + header + bytes(payload)
    write_whole(path, content + hashlib.sha256(content).digest())


def read_packed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict of the merged model, and the header: config and codes' ranges of the layers.

    Raises:
        UserError: missing, truncated, altered, or of another version.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'packed file {path} cannot be read: {error.strerror}') from None
    start = len(MAGIC) + 12
    if len(content) < start + 32 or not content.startswith(MAGIC):
        raise UserError(f'{path} is not a packed file of this project')
    version, length = struct.unpack_from('<IQ', content, len(MAGIC))
    if version != VERSION:
        raise UserError(f'packed file {path} has version {version}, this is {VERSION}')
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise UserError(f'packed file {path} is truncated or altered: its checksum does not fit')
    try:
        header = json.loads(content[start : start + length])
        payload = memoryview(content)[start + length : -32]
        if sum(entry['bytes'] for entry in header['tensors'].values()) > len(payload):
            raise ValueError('its tensors are larger than the file')  # many that share bytes would fill the memory
        state = {name: _decode(entry, payload) for name, entry in header['tensors'].items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f'packed file {path} is damaged: {type(error).__name__} {error}') from None
    meta = header.get('meta') if isinstance(header.get('meta'), dict) else {}
    meta = {key: _colors(value) for key, value in meta.items()}
    return state, dict(config=header.get('config'), meta=meta, layers=header.get('layers'))


def load_packed(model: Any, path: str | Path, training_only: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """The merged model of a packed file, bit-exact, and what was known of its data set.

    Args:
        model: quantized, not trained, as the config builds it; it becomes unusable.
        training_only: modules that are not in the file, see topology.Plan.

    Raises:
        UserError: the file cannot be read, or it is that of another model or of other bits.
    """
    state, header = read_packed(path)
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_state(stage=Stage.QUANTIZE, calibrated=True)
        if isinstance(module, ActivationQuantizer):
            module.set_range('unsigned')
    entries: dict[str, Any] = header['layers'] if isinstance(header['layers'], dict) else {}
    known = dict(model.named_modules())
    try:
        # A layer with thresholds for pyramid levels has an entry for each, LAYER.LEVEL.
        several = {n: m.pyramid_levels for n, m in known.items() if isinstance(m, QuantLayer) and m.pyramid_levels > 1}
        layer_of = {f'{name}.{level}': name for name, count in several.items() for level in range(count)}
        layers = {layer_of.get(name, name): entry for name, entry in entries.items()}
        norms = {name: entry['norm'] for name, entry in layers.items() if entry['norm'] is not None}
        missing = next((n for n in [*layers, *norms.values()] if n not in known), None)
        if missing is not None:
            raise UserError(f'packed file {path} is that of another model: the config has no {missing}')
        # What feeds what stands in the file: a prediction of an untrained model may not reach every head.
        calls = {**dict.fromkeys(layers, 1), **Counter(norms.values())}
        merged = merge_model(model, Plan(calls=calls, norms=norms, training_only=training_only or []))
        for name, layer in merged.named_modules():
            if not isinstance(layer, IntegerLayer):
                continue
            if name not in entries:
                raise UserError(f'packed file {path} is that of another model: it has no layer {name}')
            bits = entries[name]['weight_bits'], entries[name]['input_bits']
            if bits != (layer.weight_bits, layer.input_bits):
                expected = f'W{layer.weight_bits}A{layer.input_bits}'
                raise UserError(f'packed file {path} has W{bits[0]}A{bits[1]} in layer {name}, the config {expected}')
            layer.lo, layer.hi = int(entries[name]['lo']), int(entries[name]['hi'])
        shared = {name: state[first] for name, first in shared_codes(merged).items() if first in state}
        merged.load_state_dict({**state, **shared})
    except UserError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f'packed file {path} does not fit the model: {reason}') from None
    return merged, header['meta']


def is_packed(path: str | Path) -> bool:
    """Whether a file begins as a packed one does."""
    try:
        with open(path, 'rb') as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def pack_codes(codes: np.ndarray, bits: int) -> bytes:
    """Unsigned codes below 2^bits, one after the other, the lowest bit first."""
    each = (codes.reshape(-1, 1).astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(each.ravel(), bitorder='little').tobytes()


def unpack_codes(data: Any, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`pack_codes`, uint8.

    Raises:
        ValueError: the data are too short.
    """
    raw = np.frombuffer(data, np.uint8)
    if len(raw) != math.ceil(count * bits / 8):
        raise ValueError(f'{len(raw)} bytes for {count} codes of {bits} bits')
    each = np.unpackbits(raw, count=count * bits, bitorder='little').reshape(count, bits)
    return (each << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)


def _colors(value: Any) -> Any:
    """A palette with its colors as tuples again, as visualizers want them; JSON has made them lists."""
    return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


def _encode(name: str, tensor: Tensor, bits: int | None) -> tuple[dict[str, Any], bytes]:
    if str(tensor.dtype).removeprefix('torch.') not in (*_TYPES, 'int8'):
        raise UserError(f'{name} cannot be packed: it is {tensor.dtype}, not one of {", ".join(_TYPES)}')
    array = tensor.detach().cpu().contiguous().numpy()
    if bits is None:
        return dict(type=array.dtype.name, shape=list(array.shape)), array.tobytes()
    lowest = int(array.min()) if array.size else 0
    # Levels without a zero are odd numbers (DoReFa): two apart, else they would not fit their bits.
    stride = 2 if array.size and int(array.max()) - lowest >= 2**bits else 1
    codes = (array.astype(np.int16) - lowest) // stride
    return dict(type='codes', shape=list(array.shape), bits=bits, lowest=lowest, stride=stride), pack_codes(codes, bits)


def _integer(entry: Mapping[str, Any], key: str, least: int) -> int:
    """An integer of a header: bits up to 8, a stride or a lowest code that int8 can hold."""
    value, most = entry[key], 8 if key == 'bits' else 127
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f'{key} of codes is {value}')
    return value


def _decode(entry: Mapping[str, Any], payload: memoryview) -> Tensor:
    offset, size, shape = entry['offset'], entry['bytes'], entry['shape']
    if not all(isinstance(v, int) and v >= 0 for v in (offset, size, *shape)) or offset + size > len(payload):
        raise ValueError('a tensor lies outside the file')
    data = payload[offset : offset + size]
    if entry['type'] == 'codes':
        bits, stride, lowest = (
            _integer(entry, key, least) for key, least in (('bits', 1), ('stride', 1), ('lowest', -128))
        )
        codes = unpack_codes(data, bits, math.prod(shape)).astype(np.int32) * stride + lowest
        if codes.size and (codes.min() < -128 or codes.max() > 127):
            raise ValueError('codes beyond int8')
        return torch.from_numpy(codes.astype(np.int8).reshape(shape))
    array: np.ndarray = np.frombuffer(data, _TYPES[entry['type']])
    return torch.from_numpy(array.reshape(shape).copy())
