"""gdrq_mm/core/reestimate.py: statistics of BN and thresholds for weights that stand still."""

import copy

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.modules import activation_quantizers
from gdrq_mm.core.quantizers import Stage, learned_parameters
from gdrq_mm.core.reestimate import reestimate
from gdrq_mm.core.step import after_step, set_stage
from tests.core.builders import on_two_ranks
from tests.core.networks import quantize
from tests.helpers import Block, Net, same


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


def test_a_largest_value_is_the_mean_of_those_of_the_batches(model):
    """One batch with an outlier does not decide."""
    started(model, method='minmax')
    found, (name, quantizer) = [], next(iter(activation_quantizers(model).items()))
    quantizer.register_forward_pre_hook(lambda q, args: found.append(float(args[0].abs().max())))
    unequal = batches()
    unequal[-1] *= 9
    reestimate(model, unequal)
    assert float(quantizer.threshold) == pytest.approx(sum(found[-5:]) / 5, rel=1e-5), name


class WithMore(nn.Module):
    """A model with a BN that only evaluation runs."""

    def __init__(self):
        super().__init__()
        self.body, self.more = Block(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.body(x) if self.training else self.more(self.body(x))


def test_what_no_batch_reaches_stays():
    model = WithMore()
    model.more.running_mean.fill_(3)
    model.more.running_var.fill_(7)
    model.more.num_batches_tracked.fill_(5)
    reestimate(model, batches())
    assert model.more.running_mean.eq(3).all() and model.more.running_var.eq(7).all()
    assert model.more.num_batches_tracked == 5 and model.body.bn1.running_mean.ne(0).any()


@pytest.mark.parametrize('method', ['lsq', 'lsq_plus', 'pact', 'ttq', 'syq'])
@pytest.mark.parametrize('loaded', [False, True])
def test_what_is_learned_stands_still_when_it_is_frozen(model, method, loaded):
    """Momentum and weight decay would move it on, with a gradient of 0."""
    started(model, method=method, weight=dict(bits=2 if method in ('ttq', 'syq') else 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)

    def train(steps):
        for x in batches(steps):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
            after_step(model)

    train(5)
    set_stage(model, Stage.FREEZE)
    if loaded:
        state = copy.deepcopy(model.state_dict())
        for quantizer in learned_parameters(model).values():
            quantizer.frozen_at = []
        model.load_state_dict(state)
    learned = {name: p for name, p in model.named_parameters() if name in learned_parameters(model)}
    before = copy.deepcopy(learned)
    assert learned
    train(5)
    assert same(learned, before)
    thresholds = [(q, q.threshold.clone()) for q in learned_parameters(model).values()]
    reestimate(model, batches())
    assert same(learned, before) and all(torch.equal(q.threshold, value) for q, value in thresholds)


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


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_no_batch_changes_nothing(model, stage):
    started(model)
    set_stage(model, stage)
    with torch.no_grad():
        model.blocks[0].conv1.weight.mul_(1.5)  # a threshold that is not frozen follows
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reestimate(model, []) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('stage', [Stage.QUANTIZE, Stage.FREEZE])
def test_a_process_without_a_batch_finds_what_the_others_find(model, stage):
    started(model)
    set_stage(model, stage)
    models = [copy.deepcopy(model) for _ in range(2)]
    assert on_two_ranks(lambda rank: reestimate(models[rank], [batches(3), []][rank])) == (3, 0)
    reestimate(model, batches(3))
    for each in models:
        for (name, value), found in zip(model.state_dict().items(), each.state_dict().values(), strict=True):
            if 'num_batches' not in name:
                torch.testing.assert_close(found, value, msg=name)


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
