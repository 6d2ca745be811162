"""One call from a trained model to a folder, and what it refuses."""

import ctypes
import dataclasses
import re

import pytest
import torch

from gdrq_mm.deploy.export import first_wrong
from gdrq_mm.deploy.runtime import kept_signal_stack
from gdrq_mm.deploy.verify_onnx import Piece


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_a_signal_stack_that_a_runtime_leaves_is_taken_away():
    class Stack(ctypes.Structure):
        _fields_ = [('start', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]

    def now():
        found = Stack()
        assert libc.sigaltstack(None, ctypes.byref(found)) == 0
        return found.start, found.flags, found.size

    libc, memory = ctypes.CDLL(None), ctypes.create_string_buffer(1 << 16)
    before = now()
    with kept_signal_stack():
        assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 1 << 16)), None) == 0
        assert now()[0] == ctypes.addressof(memory)
    assert now() == before


@pytest.mark.parametrize(
    ('differing', 'wrong', 'message'),
    [
        ((0, 11), 0, ''),
        ((0, 1), 1, 'openvino differs from the trained model, first at b: 1 of 50000 values'),
        ((5, 7), 0, 'openvino differs from the trained model in 12 of 100000 codes, more than .*, first at a$'),
    ],
)
def test_codes_may_differ_at_ties_once_in_ten_thousand(differing, wrong, message):
    a, b = (Piece(name, 0.1, 50000, n, 0, 0.5) for name, n in zip('ab', differing))
    right = dataclasses.replace(b, differing=0)
    found = {'onnxruntime': [a, right], 'openvino': [a, dataclasses.replace(b, wrong=wrong)]}
    assert re.match(f'{message}$' if not message else message, first_wrong(found, True))
    assert bool(first_wrong(found, False)) == bool(wrong)
