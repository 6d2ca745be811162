"""Calibration of a checkpoint whose BN statistics are those of a few iterations."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.modules import activation_quantizers
from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.step import set_stage
from gdrq_mm.core.topology import record
from tests.helpers import Block, Function, Net, conv


class NormEval(Net):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def quantized(iterations, model_class=Net):
    """A model whose BN has seen some iterations of inputs that are 100 times smaller than its initial statistics."""
    torch.manual_seed(0)
    model, x = model_class(Block(), Block(downsample=True)), 0.01 * torch.randn(32, 4, 8, 8)
    nn.Module.train(model)
    if model_class is NormEval:
        super(NormEval, model).train()
    with torch.no_grad():
        for _ in range(iterations):
            model(x)
    model.train()
    quantize_model(model, Quantization.from_dict(dict(deployable=False)), record(model, lambda: model(x)))
    return model, x


def seen_in_training(model, x):
    """Thresholds that fit what each quantizer gets from a training batch."""
    seen = {}
    for name, quantizer in activation_quantizers(model).items():
        quantizer.set_state(stage=Stage.FLOAT)
        quantizer.register_forward_pre_hook(
            lambda q, args, name=name: seen.update({name: float(args[0].abs().sum() / (args[0] != 0).sum())})
        )
    set_stage(model, Stage.FLOAT)
    with torch.no_grad():
        model.train()(x)
    return {name: float(q.k) * seen[name] for name, q in activation_quantizers(model).items()}


def test_thresholds_fit_what_training_will_see():
    model, x = quantized(iterations=10)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if 'bn' in name}
    wrong = calibrate(model, [x, x])
    assert 'bn' in wrong
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())
    thresholds = {name: float(q.threshold) for name, q in activation_quantizers(model).items()}
    for name, expected in seen_in_training(model, x).items():
        assert thresholds[name] == pytest.approx(expected, rel=0.05), name


def test_a_model_that_is_not_trained_next_keeps_its_statistics():
    model, x = quantized(iterations=10)
    assert calibrate(model, [x], trains_next=False)
    other, _ = quantized(iterations=10)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # so it is not judged
    assert calibrate(other, [x]) == []
    thresholds, expected = ([float(q.threshold) for q in activation_quantizers(m).values()] for m in (model, other))
    assert thresholds == expected


@pytest.mark.parametrize(('iterations', 'model_class'), [(300, Net), (10, NormEval), (0, Net)])
def test_sound_statistics_and_those_that_training_uses_are_kept(iterations, model_class):
    model, x = quantized(iterations, model_class)
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    assert calibrate(model, [x, x]) == [] and len(calls) == 2


def test_norms_may_be_called_by_keyword():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = Function(lambda m, x: m.last(input=m.norm(input=m.first(input=x))), first=conv(), norm=norm, last=conv())
    x = torch.randn(32, 4, 8, 8)
    model(x)
    quantize_model(model, Quantization.from_dict({}), record(model, lambda: model(x)))
    assert calibrate(model, [0.01 * x]) == ['norm']
