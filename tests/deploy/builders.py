"""Layers, networks and packed files that the tests of deployment share."""

import functools
import hashlib
import importlib.util
import json
import re

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.onnx_export import export_onnx
from gdrq_mm.deploy.runtime import RUNTIMES, open_runtime
from gdrq_mm.deploy.saturation import has_vnni, saturating
from gdrq_mm.deploy.verify_onnx import record_codes, verify_onnx
from tests.helpers import Block, Function

LACKING = [name for name in RUNTIMES if importlib.util.find_spec(name) is None]
needs_runtimes = pytest.mark.skipif(bool(LACKING), reason=f'not installed: {", ".join(LACKING)}')
"""For tests that run graphs which no export makes: what exports is skipped with an old torch already."""

KINDS = ['conv', 'grouped', 'depthwise', 'strided', 'dilated', 'transposed', 'transposed grouped', 'linear']


def layer_of(kind, c_in, c_out, bias):
    return {
        'conv': lambda: nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias),
        'grouped': lambda: nn.Conv2d(2 * c_in, 2 * c_out, 3, groups=2, bias=bias),
        'depthwise': lambda: nn.Conv2d(c_in, 2 * c_in, 3, padding=1, groups=c_in, bias=bias),
        'strided': lambda: nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=bias),
        'dilated': lambda: nn.Conv2d(c_in, c_out, (1, 3), padding=(0, 2), dilation=2, bias=bias),
        'transposed': lambda: nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=bias),
        'transposed grouped': lambda: nn.ConvTranspose2d(2 * c_in, 2 * c_out, 3, groups=2, bias=bias),
        'linear': lambda: nn.Linear(c_in, c_out, bias=bias),
    }[kind]()


def norm_of(kind, layer, affine):
    channels = getattr(layer, 'out_channels', None) or layer.out_features
    norm = (nn.BatchNorm1d if kind == 'linear' else nn.BatchNorm2d)(channels, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if affine:
        norm.weight.data.normal_()  # of both signs
        norm.weight.data[0] = 0
        norm.bias.data.normal_()
    return norm


def in_float_here(graph):
    """The layers of a graph that OpenVINO computes in float on this CPU, see deploy/saturation.py."""
    return [] if has_vnni() else saturating(graph)


def prepared(model, *batches, **quantization):
    """Quantized, calibrated, in evaluation mode; and its plan."""
    plan = record(model, lambda: model(batches[0]))
    cfg = Quantization.from_dict(dict(first_last_bits=quantization.pop('bits', 4), **quantization))
    quantize_model(model, cfg, plan)
    calibrate(model, batches, trains_next=False)
    return model.eval(), plan


def network():
    shared = nn.BatchNorm2d(4)
    return Function(
        lambda m, x: m.last(m.pool(m.two(m.norm(m.b(m.one(m.norm(m.a(x)))))))),
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 4, 3, padding=1),
        norm=shared,
        one=Block(downsample=True),
        two=Block(),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        last=nn.Linear(4, 3),
    )


def exported(model, plan, x):
    """The graph of a model, and what the trained one saw and gave."""
    merged = merge_model(model, plan)
    graph = export_onnx(merged, x, ['y'])
    seen, out = record_codes(model, lambda: model(x))
    return graph, seen, out.numpy()


def pieces_of(graph, seen, x, out):
    """What both runtimes make of it; `out` is an array, or a list of them."""
    outputs = out if isinstance(out, list) else [out]
    return {
        name: verify_onnx(graph, seen, [x.numpy()], outputs, functools.partial(open_runtime, name)) for name in RUNTIMES
    }


def wrong(graph, seen, x, out):
    """The first piece that is wrong in each runtime."""
    found = pieces_of(graph, seen, x, out)
    return {name: next((p.name for p in pieces if p.wrong), None) for name, pieces in found.items()}


def pooled_network():
    """A residual network with max pooling after the first convolution and a linear layer at the end."""
    return Function(
        lambda m, x: m.last(m.flat(m.two(m.one(m.pool(m.relu(m.bn(m.first(x)))))))),
        first=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(3, 2, 1),
        one=Block(downsample=True),
        two=Block(),
        flat=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        last=nn.Linear(4, 3),
    )


def trained_network(**quantization):
    torch.manual_seed(0)
    model, x = pooled_network(), torch.randn(4, 3, 16, 16)
    model.train()(x)  # statistics of batch normalization
    model, plan = prepared(model.eval(), x, bits=8, **{'deployable': True, **quantization})
    return model, plan, x


# ---- packed files ---------------------------------------------------------------------------------------------------

JSON = ('meta', 'layers', 'outputs', 'absent')
"""Entries of the metadata that are JSON."""


def header_of(content):
    """The header of a packed file as plain data, what is JSON in it too."""
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + size])
    about = header['__metadata__']
    return {**header, '__metadata__': {key: json.loads(v) if key in JSON else v for key, v in about.items()}}


def payload_of(content):
    """What follows the header."""
    return content[8 + int.from_bytes(content[:8], 'little') :]


def text_of(header):
    """The inverse of `header_of`, as far as what it is given has that form."""
    about = header.get('__metadata__') if isinstance(header, dict) else None
    if isinstance(about, dict):
        entries = {k: json.dumps(v) if k in JSON else v for k, v in about.items()}
        header = {**header, '__metadata__': entries}
    return json.dumps(header, separators=(',', ':')).encode()


def summed(header, payload, size=None):
    """A file of this header, bytes, with a checksum that fits it; `size`: the length that it tells."""
    zeros = b'"sha256":"' + b'0' * 64
    header = re.sub(rb'"sha256":"[0-9a-f]{64}', zeros, header, count=1)
    content = (len(header) if size is None else size).to_bytes(8, 'little') + header + payload
    return content.replace(zeros, f'"sha256":"{hashlib.sha256(content).hexdigest()}'.encode(), 1)


def crafted(content, change):
    """The same file after `change(header)`; what that returns, if it is text, is the header."""
    header = header_of(content)
    text = change(header)
    return summed(text.encode() if isinstance(text, str) else text_of(header), payload_of(content))
