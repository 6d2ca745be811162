"""gdrq_mm/core/reestimate.py: statistics of BN and thresholds for weights that stand still."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.modules import activation_quantizers
from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.reestimate import reestimate
from gdrq_mm.core.step import set_stage
from tests.core.networks import quantize
from tests.helpers import Block, Net


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net(Block(), Block(True))
    with torch.no_grad():
        for _ in range(20):
            model.train()(torch.randn(8, 4, 8, 8))
    return model


def batches(count=5, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(16, 4, 8, 8, generator=generator) + 1 for _ in range(count)]


def started(model, **cfg):
    quantize(model, batches()[0], **cfg)
    calibrate(model, [torch.randn(8, 4, 8, 8)])
    return model.train()


def test_statistics_are_the_mean_of_those_of_the_batches(model):
    seen = []
    model.bn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    before = model.bn.momentum
    assert reestimate(model, batches()) == 5
    means = torch.stack([x.mean((0, 2, 3)) for x in seen[-5:]]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen[-5:]]).mean(0)
    torch.testing.assert_close(model.bn.running_mean, means)
    torch.testing.assert_close(model.bn.running_var, variances)
    assert model.bn.momentum == before and model.training


def test_thresholds_are_those_of_these_batches(model):
    started(model)
    seen, (name, quantizer) = [], next(iter(activation_quantizers(model).items()))
    quantizer.register_forward_pre_hook(lambda q, args: seen.append(args[0].clone()))
    reestimate(model, batches())
    values = torch.cat([x.flatten() for x in seen[-5:]]).abs()
    assert float(quantizer.threshold) == pytest.approx(float(quantizer.k * values[values > 0].mean()), rel=1e-5), name


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_weights_and_stages_stay_and_nothing_waits_for_the_next_step(model, stage):
    started(model)
    set_stage(model, stage)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    thresholds = {name: float(q.threshold) for name, q in activation_quantizers(model).items()}
    reestimate(model, batches())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert {q.stage for q in activation_quantizers(model).values()} == {stage}
    assert all(float(q.threshold) != thresholds[name] for name, q in activation_quantizers(model).items())
    assert all(q.sums.tolist() == [0, 0] for q in activation_quantizers(model).values())


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_after_a_batch_that_fails_training_goes_on_as_before(model, stage):
    started(model)
    set_stage(model, stage)
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with pytest.raises(AttributeError):
        reestimate(model, [*batches(1), 'no picture'], predict=lambda batch: model(batch.clone()))
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert {q.stage for q in activation_quantizers(model).values()} == {stage}
    assert all(q.sums.tolist() == [0, 0] for q in activation_quantizers(model).values())


def test_no_batch_changes_nothing(model):
    started(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reestimate(model, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_that_training_leaves_alone_stay(model):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].bn.eval()
            return self

    kept = model.bn.running_mean.clone()
    reestimate(Frozen(model), batches())
    assert torch.equal(model.bn.running_mean, kept)
    assert not torch.equal(model.blocks[0].bn1.running_mean, torch.zeros(4))


def test_a_mean_and_a_test_batch_agree_afterwards(model):
    """The model in evaluation gives what it gives in training on the same pictures, up to one batch against another."""
    x = batches(1)[0]
    reestimate(model, [x])
    with torch.no_grad():
        training, evaluation = model.train()(x), model.eval()(x)
    torch.testing.assert_close(evaluation, training, rtol=0.02, atol=0.02)
