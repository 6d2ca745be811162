"""Quantizing a small network, for tests of what becomes of its layers."""

import torch

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.topology import record

W2A3 = dict(weight=dict(bits=2), activation=dict(bits=3), first_last_bits=8)


def image(shape=(1, 4, 8, 8)):
    return torch.randn(shape)


def quantize(model, x=None, training_only=(), **cfg):
    """Quantize with the record of a prediction; returns the report."""
    x = image() if x is None else x
    plan = record(model, lambda: model(x), training_only=training_only)
    return quantize_model(model, Quantization.from_dict({**W2A3, **cfg}), plan)
