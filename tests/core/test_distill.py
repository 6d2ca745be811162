"""gdrq_mm/core/distill.py: distances against NumPy, what is compared, and what takes a gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core.distill import Distillation, of_classes, of_features, of_probabilities
from gdrq_mm.core.errors import UserError
from tests.helpers import Block, Net

LAW = settings(deadline=None, max_examples=60)
LOGITS = hnp.arrays(np.float32, (3, 4, 2, 5), elements=st.floats(-20, 20, width=32))
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0])
DISTANCES = [of_classes, of_probabilities, of_features]


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def kl(p, q):
    return np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0)


@LAW
@given(LOGITS, LOGITS, TEMPERATURES)
def test_distances_of_scores_are_kl_divergences(ours, theirs, t):
    one, other = ours.astype(np.float64) / t, theirs.astype(np.float64) / t
    classes = kl(softmax(other, 1), softmax(one, 1)).sum(1).mean() * t**2
    (p, q), (no_p, no_q) = ([1 / (1 + np.exp(-sign * x)) for x in (other, one)] for sign in (1, -1))
    sigmoids = (kl(p, q) + kl(no_p, no_q)).sum(1).mean() * t**2
    pair = torch.from_numpy(ours), torch.from_numpy(theirs)
    assert float(of_classes(*pair, t)) == pytest.approx(classes, rel=1e-4, abs=1e-4)
    assert float(of_probabilities(*pair, t)) == pytest.approx(sigmoids, rel=1e-3, abs=1e-3)


@LAW
@given(LOGITS.filter(lambda x: x.std((0, 2, 3)).min() > 0.1), LOGITS.filter(lambda x: x.std((0, 2, 3)).min() > 0.1))
def test_the_distance_of_features_is_that_of_normalized_channels(ours, theirs):
    one, other = (
        (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
        for x in (ours.astype(np.float64), theirs.astype(np.float64))
    )
    found = float(of_features(torch.from_numpy(ours), torch.from_numpy(theirs), 1.0))
    assert found == pytest.approx(((one - other) ** 2).mean() / 2, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize('distance', DISTANCES)
def test_equal_outputs_have_distance_0_and_no_gradient(distance):
    x = torch.randn(3, 4, 2, 5)
    ours = x.clone().requires_grad_()
    loss = distance(ours, x, 2.0)
    loss.backward()
    assert abs(float(loss)) < 1e-6 and float(ours.grad.abs().max()) < 1e-6


@pytest.mark.parametrize('distance', DISTANCES)
def test_half_precision_is_computed_in_float32(distance):
    pair = torch.randn(2, 3, 4, 2, 5).bfloat16()
    assert distance(*pair, 2.0).dtype == torch.float32
    assert torch.equal(distance(*pair, 2.0), distance(*pair.float(), 2.0))


@pytest.fixture
def models():
    torch.manual_seed(0)
    return Net(Block()), Net(Block())


def test_the_loss_is_the_weighted_sum_over_the_modules(models):
    ours, theirs = models
    distances = dict(fc=of_classes, blocks=of_features)
    distillation = Distillation(ours, theirs, distances, weight=3.0, temperature=2.0)
    x = torch.randn(2, 4, 8, 8)
    out = ours.train()(x)
    loss = distillation(x)
    theirs.eval()
    maps = [model.blocks(model.relu(model.bn(model.stem(x)))) for model in (ours, theirs)]
    expected = of_classes(out, theirs(x), 2.0) + of_features(*maps, 2.0)
    torch.testing.assert_close(loss, 3 * expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in ours.stem.parameters()) and not any(
        p.grad is not None for p in theirs.parameters()
    )


def test_predictions_and_checkpointed_segments_are_not_counted_again(models):
    ours, theirs = models
    distillation = Distillation(ours, theirs, dict(blocks=of_features))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        ours.eval()(x)
    segment = checkpoint(ours.train().blocks, ours.relu(ours.bn(ours.stem(x))), use_reentrant=False)
    first = distillation(x)
    (first + segment.sum()).backward()
    assert not distillation._ours and not distillation._theirs


def test_other_shapes_are_an_error_and_leave_nothing_behind(models):
    distillation = Distillation(*models, dict(fc=of_classes))
    models[0](torch.randn(3, 4, 8, 8))
    with pytest.raises(UserError, match=r'fc returned shapes \[\(3, 5\)\], that of the teacher \[\(2, 5\)\]'):
        distillation(torch.randn(2, 4, 8, 8))
    with pytest.raises(UserError, match=r'returned shapes \[\]'):
        distillation(torch.randn(2, 4, 8, 8))


def test_it_watches_until_it_is_stopped(models):
    distillation = Distillation(*models, dict(fc=of_classes))
    distillation.stop()
    for model in models:
        model(torch.randn(2, 4, 8, 8))
        assert not model.fc._forward_hooks
    assert not distillation._ours and not distillation._theirs


def test_a_student_of_its_teacher_ends_nearer_to_it(models):
    ours, theirs = models
    distillation, x = Distillation(ours, theirs, dict(fc=of_classes), temperature=2.0), torch.randn(16, 4, 8, 8)
    optimizer, losses = torch.optim.SGD(ours.parameters(), lr=0.1), []
    for _ in range(20):
        ours.train()(x)
        loss = distillation(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4
