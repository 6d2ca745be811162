"""Quantizers that are calibrated, and what several files of this folder do with them."""

import threading

import numpy as np
import torch
from hypothesis import strategies as st
from torch.nn.functional import silu
from torch.testing._internal.distributed import multi_threaded_pg

from gdrq_mm.core.quantizers import ACTIVATION_METHODS, WEIGHT_METHODS, Stage
from gdrq_mm.core.quantizers.following import move_thresholds

VALUES = st.floats(-10, 10, width=32, allow_subnormal=False)
KINDS = {'unsigned': torch.relu, 'signed': lambda x: x, 'zero_point': silu}
"""What gives activations of each kind."""
ACTIVATIONS = [name for name in ACTIVATION_METHODS if name != 'gdrq']


def weight_quantizer(method, weight, bits=4, groups=None, stage=Stage.QUANTIZE, **options):
    """Started from `weight`, in training mode."""
    quantizer = WEIGHT_METHODS[method](bits, weight.shape, groups, **options)
    quantizer.start(weight.detach())
    quantizer.set_state(stage=stage)
    return quantizer


def activation_quantizer(method, *batches, bits=None, stage=Stage.QUANTIZE, **options):
    """Calibrated on `batches`, in training mode."""
    quantizer = ACTIVATION_METHODS[method](bits or few_bits(method, ACTIVATION_METHODS), **options)
    quantizer.set_state(stage=Stage.OBSERVE)
    for batch in batches:
        quantizer(batch.detach())
    quantizer.start(quantizer.observed())
    quantizer.set_state(stage=stage)
    return quantizer


def inputs(kind, *shape):
    return KINDS[kind](torch.randn(shape or (2, 8, 9, 7)))


def double(x):
    return x.detach().double().numpy()


def frozen(quantizer, *weight):
    quantizer.freeze(*weight)
    return quantizer


def move(*quantizers):
    """Move thresholds that follow, as after an optimizer step."""
    move_thresholds(quantizers)


def gradients(quantizer, values):
    """The output, a random upstream gradient, and that of the values; those of Parameters are in their .grad."""
    values = values.detach().clone().requires_grad_()
    out = quantizer(values)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    return double(out), double(upstream), double(values.grad)


def levels_of(out, groups):
    """The largest number of different values in a group."""
    parts = np.array_split(double(out), len(out) if groups == 'channel' else groups)
    return max(len(np.unique(part)) for part in parts)


def few_bits(method, methods=WEIGHT_METHODS):
    """4 bits, or the most that the method has for weights, or for activations."""
    return min(4, methods[method].allowed_bits[-1])


def everywhere(weight, activation, **weight_options):
    """A quantization dict with these methods in all layers, the first and the last one too."""
    sides = dict(
        weight=dict(method=weight, bits=few_bits(weight), **weight_options),
        activation=dict(method=activation, bits=few_bits(activation, ACTIVATION_METHODS)),
    )
    return dict(**sides, overrides={'*': sides})


def on_two_ranks(work):
    """What `work(rank)` returns on each of two ranks. They are threads; torch tests its collectives in this way."""
    group, store, found, errors = multi_threaded_pg, torch.distributed.HashStore(), {}, []

    def run(rank):
        try:
            torch.distributed.init_process_group('threaded', rank=rank, world_size=2, store=store)
            found[rank] = work(rank)
            torch.distributed.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            group.ProcessLocalGroup.exception_handle(error)

    isolate = getattr(torch._C._distributed_c10d, '_set_thread_isolation_mode', id)  # of torch 2.6
    isolate(True)
    group._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        group._uninstall_threaded_pg()
        isolate(False)
    assert not errors
    return found[0], found[1]
