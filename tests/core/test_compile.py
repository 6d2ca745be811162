"""torch.compile of a quantized model: one graph, traced once a stage, with the results of the model as it is."""

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import gdrq_mm as gq
from gdrq_mm.core.compat import COMPILES
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.layers import QuantConv2d
from gdrq_mm.core.modules import activation_quantizers, moving_quantizers
from gdrq_mm.core.quantizers import METHODS, Stage
from gdrq_mm.core.quantizers.following import collected
from gdrq_mm.core.step import set_stage
from tests.helpers import Block, Function, conv, few_bits_of_both, same

pytestmark = pytest.mark.skipif(not COMPILES, reason='torch.compile of a quantized model needs torch 2.6')
CLASSES = 3
W4A4 = dict(weight=dict(bits=4), activation=dict(bits=4))
LSQ = dict(W4A4, method='lsq', deployable=True)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()


def images(count=4):
    return torch.randn(count, 3, 8, 8)


def small():
    """A first layer, one between, and a last one."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES))
    return nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), *head)


def residual():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU(), Block(downsample=True), *head)


def quantized(model, config):
    """Quantized and calibrated, in training mode."""
    x = images()
    gq.quantize(model, config, x, show=False)
    gq.calibrate(model, [x])
    return model.train()


def compiled(model, backend='aot_eager'):
    """An error where it is more than one graph."""
    return torch.compile(model, backend=backend, fullgraph=True)


def graphs():
    """How many graphs were traced since the test began."""
    return counters['stats']['unique_graphs']


def statistics(model):
    """What the inputs of a step have added up to; they start anew."""
    moving = list(moving_quantizers(model).values())
    found = collected(moving)  # a copy
    for quantizer in moving:
        quantizer.sums.zero_()
    return found


def trained(make, wrap, sizes=(4, 4, 4), amp=False):
    """Losses of some steps, the outputs in evaluation after them, and the state of the model."""
    torch.manual_seed(0)
    model = make()
    run, losses = wrap(model), []
    optimizer = torch.optim.SGD(gq.parameter_groups(model, weight_decay=0.01), 0.05, momentum=0.9)
    for size in sizes:
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(run(images(size)), torch.randint(CLASSES, (size,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gq.after_step(model)
        losses.append(loss.detach())
    traced = graphs()
    model.eval()
    run.eval()
    return torch.stack(losses), run(images()).detach(), gq.checkpoint(model)['state_dict'], traced


def as_it_is(model):
    return model


def close(one, other, **tolerance):
    """What `trained` gives is the same to rounding."""
    for before, after in zip(one[:3], other):
        torch.testing.assert_close(after, before, **tolerance)


@pytest.mark.parametrize(
    'config, amp',
    [
        pytest.param(W4A4, False, marks=pytest.mark.full),
        (dict(W4A4, deployable=True), False),
        pytest.param(dict(W4A4, deployable=True), True, marks=pytest.mark.full),
        pytest.param(LSQ, False, marks=pytest.mark.full),
    ],
    ids=['gdrq', 'deployable', 'bfloat16', 'lsq'],
)
def test_training_and_evaluation_equal_those_of_the_model_as_it_is(config, amp):
    def make():
        return quantized(residual(), config)

    one, other = trained(make, as_it_is, amp=amp), trained(make, compiled, amp=amp)
    close(one, other)
    start = make().state_dict()
    moved = [name for name in start if name.endswith('threshold') and not torch.equal(start[name], other[2][name])]
    assert len(moved) > 8
    assert other[3] == 1, 'one graph for all steps, although thresholds move'


@pytest.mark.full
def test_code_of_the_compiler_gives_the_same_to_rounding():
    model = quantized(nn.Sequential(conv(3), nn.ReLU(), nn.Flatten(), nn.Linear(256, CLASSES)), W4A4)
    x, found = images(), []
    for run in (model, compiled(model, 'inductor')):
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append((out.detach(), gradients, statistics(model)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_other_batch_sizes_are_traced_once_more():
    one, other = (trained(lambda: quantized(small(), W4A4), wrap, (4, 5, 6, 7)) for wrap in (as_it_is, compiled))
    close(one, other)
    assert other[3] == 2, 'for one size, and for all'


@pytest.mark.full
@pytest.mark.parametrize('method', METHODS)
def test_every_method_is_one_graph(method):
    model, x = quantized(small(), few_bits_of_both(method)), images()
    assert torch.equal(compiled(model)(x), model(x))


@pytest.mark.full
def test_a_stage_is_traced_when_it_begins():
    model, x = quantized(small(), W4A4), images()
    run, found = compiled(model), []
    for stage in (Stage.RESHAPE, Stage.QUANTIZE, Stage.FREEZE):
        set_stage(model, stage)
        for _ in range(2):
            assert torch.equal(run(x), model(x))
            gq.after_step(model)
            found.append(graphs())
    assert found == [1, 1, 2, 2, 3, 3]


@pytest.mark.full
@pytest.mark.parametrize('mean', ['all', 'nonzero'])
def test_statistics_of_the_inputs_are_those_of_the_model_as_it_is(mean):
    model, x = quantized(small(), dict(activation=dict(bits=4, gdrq=dict(mean=mean)))), images()
    found = []
    for run in (model, compiled(model)):
        run(x)
        found.append(statistics(model))
    torch.testing.assert_close(found[1], found[0])
    assert (found[0] > 0).all()


@pytest.mark.parametrize('training', [False, True])
def test_weights_that_a_forward_has_prepared_are_not_traced(training):
    """If only `forward` is compiled, the hooks of the model run before it, and quantize its weights."""
    model, x = quantized(small(), W4A4).train(training), images()
    forward, expected = model.forward, []
    with torch.set_grad_enabled(training):
        for _ in range(2):
            expected.append(model(x))
            model[3].weight.data.neg_()
        model.forward = torch.compile(forward, backend='aot_eager', fullgraph=True)
        for each in expected:
            assert torch.equal(model(x), each)
            model[3].weight.data.neg_()
    assert not torch.equal(*expected) and graphs() == 1


def test_a_compiled_model_is_calibrated_as_it_is_and_its_checkpoint_has_ordinary_names():
    x = images()
    model = small()
    gq.quantize(model, W4A4, x, show=False)
    run = torch.compile(model, backend='aot_eager')
    with pytest.raises(UserError, match='has no threshold yet'):
        run.eval()(x)
    traced = graphs()
    gq.calibrate(run, [x])
    assert graphs() == traced
    assert {quantizer.stage for quantizer in activation_quantizers(model).values()} == {Stage.QUANTIZE}
    saved = gq.checkpoint(run)['state_dict']
    assert saved.keys() == model.state_dict().keys()


@pytest.mark.full
def test_layers_that_start_with_the_first_batch_do_so_compiled():
    outs = []
    for wrap in (as_it_is, lambda model: torch.compile(model, backend='aot_eager')):
        torch.manual_seed(0)
        model = nn.Sequential(QuantConv2d(3, 4, 3), nn.ReLU(), QuantConv2d(4, 2, 3))
        run = wrap(model)
        outs.append([run(images()).detach() for _ in range(3)])
    assert same(*outs)


@pytest.mark.full
@pytest.mark.parametrize('per_level', [False, True])
def test_a_head_for_pyramid_levels_and_a_segment_that_is_computed_again(per_level):
    """Activation checkpointing does not go with `per_level`, so it is in another part of the model."""

    def forward(model, x):
        y = checkpoint(model.body, model.stem(x), use_reentrant=False) if model.training else model.body(model.stem(x))
        return torch.stack(model.head([y, 3 * y]))

    head = Function(lambda head, levels: [head.conv(level) for level in levels], conv=conv())
    body = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    model = Function(forward, stem=conv(3), body=body, head=head)
    model, x, found = quantized(model, dict(activation=dict(per_level=per_level))), images(), []
    for run in (model, compiled(model)):
        model.zero_grad()
        out = run(x)
        out.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((out.detach(), gradients, statistics(model)))
    torch.testing.assert_close(*found)
    assert len(found[0][2]) == (4 if per_level else 3)
