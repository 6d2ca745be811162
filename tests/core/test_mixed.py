"""Mixed precision: what is one choice, sensitivities, the search, the door for plain torch."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

import gdrq_mm as gq
from gdrq_mm.core.attention import PROJECTIONS
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.mixed.allocation import Chooser, config_text
from gdrq_mm.core.mixed.budgets import Costs, Pair, choices_of_layers
from gdrq_mm.core.mixed.choices import Candidates, choices_of
from gdrq_mm.core.mixed.search import BitSearch
from gdrq_mm.core.mixed.sensitivity import loss_sensitivity
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import Stage
from gdrq_mm.core.topology import record
from gdrq_mm.report.layers import totals
from tests.helpers import Block, Function, Net, conv, same

# ---- choices --------------------------------------------------------------------------------------------------------


def quantized(model, x, last=(), **config):
    """The model quantized and calibrated, its settings and report."""
    settings = Quantization.from_dict(config)
    report = quantize_model(model, settings, record(model, lambda: model(x), last=last))
    calibrate(model, [x])
    return model, settings, report


X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_readers_of_a_tensor_have_one_choice():
    for deployable in (True, False):
        found = choices_of(*quantized(Net(Block(downsample=True)), X, deployable=deployable))
        inputs = {choice.name: choice for choice in found if choice.side == 'activation'}
        assert inputs['blocks.0.conv1.input'].layers == ('blocks.0.conv1', 'blocks.0.downsample.0')
        assert inputs['blocks.0.conv1.input'].bits == (2, 3, 4, 8)
        assert inputs['stem.input'].bits == (8,) and inputs['stem.input'].why == 'first'
        assert not inputs['fc.input'].ours and inputs['fc.input'].why == 'last'
        assert sorted(name for c in inputs.values() for name in c.layers) == sorted(n for n in ('stem', 'fc', *NAMES))


NAMES = ('blocks.0.conv1', 'blocks.0.conv2', 'blocks.0.downsample.0')


def test_what_the_config_says_is_kept():
    overrides = {'*.conv1': dict(activation=dict(bits=8)), '*.conv2': dict(weight=dict(method='twn', bits=2))}
    config = dict(overrides=overrides, skip=['*.downsample.0'])
    found = {c.name: c for c in choices_of(*quantized(Net(Block(downsample=True)), X, **config))}
    assert found['blocks.0.conv1.input'].bits == (8,) and found['blocks.0.conv1.input'].why == 'override'
    assert found['blocks.0.conv2.weight'].bits == (2,) and not found['blocks.0.conv2.weight'].ours
    assert len(found['blocks.0.conv1.weight'].bits) == 4 and not [name for name in found if 'downsample' in name]
    del config['skip']
    found = {c.name: c for c in choices_of(*quantized(Net(Block(downsample=True)), X, **config))}
    follower = found['blocks.0.downsample.0.input']
    assert (follower.bits, follower.why, follower.ours) == ((8,), 'as blocks.0.conv1', True)


def test_pyramid_levels_have_one_choice():
    """Two branches of a head read each level; with and without thresholds of their own."""

    def head_forward(m, levels):
        return [m.cls(m.one(level).relu()) + m.box(m.two(level).relu()) for level in levels]

    for per_level in (False, True):
        head = Function(head_forward, one=conv(), two=conv(), cls=conv(), box=conv())
        model = Function(lambda m, x: m.head([m.stem(x), 3 * m.stem(x)]), stem=conv(), head=head)
        parts = quantized(model, X, activation=dict(per_level=per_level), last=['head.cls', 'head.box'])
        found = choices_of(*parts)
        (shared,) = [choice for choice in found if choice.layers == ('head.one', 'head.two')]
        assert shared.side == 'activation' and shared.bits == (2, 3, 4, 8)
        candidates = Candidates(parts[0], found, *parts[1:])
        assert len(candidates.places_of(shared)) == 1 + per_level
        candidates.calibrate([X], model)
        loss = loss_sensitivity(candidates, [X], lambda x, m=model: torch.stack(m(x)).square().mean(), len)
        assert loss[shared.name][2] > loss[shared.name][4] > loss[shared.name][8] > 0


def test_a_weight_of_two_layers_is_one_choice():
    model = Function(lambda m, x: m.d(m.c(m.b(m.a(x)).relu())), a=conv(), b=conv(), c=conv(), d=conv())
    model.c.weight = model.b.weight
    model, config, report = quantized(model, X)
    chooser = Chooser(model, config, report, totals(model, report).float_bytes, bits=[2, 4])
    assert ('b', 'c') in [choice.layers for choice in chooser.choices if choice.side == 'weight']
    budget = chooser.costs.budget('size', 1.0)
    pairs = {name: Pair(*layer.bits) for name, layer in quant_layers(model).items()}
    assert budget.used(pairs) == totals(model, report).bytes


def test_bits_that_a_method_does_not_have():
    parts = quantized(Net(Block()), X)
    with pytest.raises(UserError, match="bits 9: method 'gdrq' has 2 to 8 bits for the weight of a layer"):
        choices_of(*parts, bits=[4, 9])
    with pytest.raises(UserError, match='nothing is to be chosen'):
        choices_of(*quantized(Net(Block()), X, weight=dict(method='twn', bits=2)), inputs=False)
    with pytest.raises(UserError, match='nothing is to be chosen'):
        choices_of(*quantized(Net(Block()), X, weight=dict(bits=32), activation=dict(bits=32)))


def test_a_budget_of_time_counts_float_layers():
    model, _, choices, candidates = parts = chooser(Net(Block()), [X], skip=['*.conv1'])
    report = parts[1]
    times = {row.name: lambda pair, n=number: 10.0 * n + sum(pair) for number, row in enumerate(report.layers, 1)}
    (skipped,) = [row.name for row in report.layers if row.note == 'float: skipped by config']
    found = Costs(model, report, choices, candidates, 1000, times).budget('ms', 5)
    assert found.whole == sum(time((32, 32)) for time in times.values())
    assert found.fixed == times[skipped]((32, 32)) and found.kept == {f'{skipped} in float': found.fixed}


# ---- sensitivities --------------------------------------------------------------------------------------------------


def chooser(model, batches, **config):
    model, settings, report = quantized(model, batches[0], **config)
    choices = choices_of(model, settings, report)
    candidates = Candidates(model, choices, settings, report)
    candidates.calibrate(batches, model)
    return model, report, choices, candidates


def half_square(model):
    """Loss of one picture: half of the sum of squares of the outputs; the mean over pictures."""
    return lambda x: 0.5 * model(x).flatten(1).square().sum(1).mean()


def test_sensitivity_of_a_layer_by_numpy():
    """One picture a batch; gradients of a linear layer are known: those of its weight y x^T, of its input W^T y."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    batches = [torch.randn(1, 6) for _ in range(3)]
    weights = [(each.weight.detach().double().numpy(), each.bias.detach().double().numpy()) for each in model]
    model, _, _, candidates = chooser(model, batches)
    before = copy.deepcopy(model.state_dict())
    found = loss_sensitivity(candidates, batches, half_square(model), len)
    assert same(before, model.state_dict()) and all(p.grad is None for p in model.parameters())
    (w1, b1), (w2, b2), (w3, b3) = weights
    for b in (2, 4):
        places = {place.choice.name: place.others[b] for place in candidates.places}
        error = places['1.weight'](model[1].filters()).detach().double().numpy() - w2
        of_weight, of_input = [], []
        for batch in batches:
            x = w1 @ batch[0].double().numpy() + b1
            gradient = w3.T @ (w3 @ (w2 @ x + b2) + b3)  # by the output of the layer
            of_weight.append(0.5 * ((np.outer(gradient, x) * error) ** 2).sum())
            change = places['1.input'](torch.tensor(x).float()).double().numpy() - x
            of_input.append(0.5 * ((w2.T @ gradient * change) ** 2).sum())
        assert found['1.weight'][b] == pytest.approx(np.mean(of_weight), rel=1e-4)
        assert found['1.input'][b] == pytest.approx(np.mean(of_input), rel=1e-4)


def test_the_gradient_of_a_shared_input_is_the_sum_of_its_readers():
    """With and without one quantizer for both: two readers whose gradients cancel do not care for their input."""
    torch.manual_seed(0)
    for deployable in (True, False):
        parts = dict(first=conv(), one=conv(), two=conv(), end=conv())

        def forward(m, x):
            h = m.first(x)
            return m.end(m.one(h) - m.two(h))

        model = Function(forward, **parts)
        model.two.weight.data.copy_(model.one.weight.data)
        model, _, _, candidates = chooser(model, [X], deployable=deployable)
        found = loss_sensitivity(candidates, [X], lambda x, m=model: m(x).square().mean() + m(x).mean(), len)
        assert found['one.input'][2] == pytest.approx(0, abs=1e-12) and found['one.weight'][2] > 1e-9


def test_pictures_count_alike_in_batches_of_any_size():
    """Inputs: exactly, as BN is in evaluation mode. Of weights single gradients are not known: B times the mean's."""
    torch.manual_seed(0)
    net = Net(Block())
    model, _, _, candidates = chooser(net, [X])
    whole = loss_sensitivity(candidates, [X], half_square(model), len)
    alone = loss_sensitivity(candidates, X.split(1), half_square(model), len)
    for name in ('blocks.0.conv1.input', 'blocks.0.conv2.input'):
        assert whole[name] == pytest.approx(alone[name], rel=1e-4)
    one, equal = (
        loss_sensitivity(candidates, [x], half_square(model), len) for x in (X[:1], X[:1].expand(3, -1, -1, -1))
    )
    for name in ('blocks.0.conv1.weight', 'blocks.0.conv2.weight'):
        assert equal[name] == pytest.approx({b: 3 * value for b, value in one[name].items()}, rel=1e-4)


def test_a_loss_that_is_not_finite():
    model, _, _, candidates = chooser(Net(Block()), [X])
    with pytest.raises(UserError, match='the loss of a calibration batch is nan'):
        loss_sensitivity(candidates, [X], lambda x: model(x).sum() * float('nan'), len)


def test_alone_is_what_a_config_with_these_bits_computes():
    torch.manual_seed(0)
    net = Net(Block()).eval()
    other = copy.deepcopy(net)
    model, _, _, candidates = chooser(net, [X], deployable=False)
    overrides = {'*': dict(weight=dict(bits=32), activation=dict(bits=32))}
    overrides['blocks.0.conv1'] = dict(weight=dict(bits=3))
    expected, _, _ = quantized(other, X, deployable=False, overrides=overrides)
    with candidates.alone('blocks.0.conv1.weight', 3), torch.no_grad():
        torch.testing.assert_close(model.eval()(X), expected.eval()(X))
    assert all(layer.weight_quant.stage == Stage.QUANTIZE for layer in quant_layers(model).values())


# ---- costs, the answer, the door -------------------------------------------------------------------------------------


def mean_loss(model, batch):
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def trained():
    """A small net whose scale of weights is not that of its start, and batches of it."""
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4, 8, 8), torch.arange(8) % 5) for _ in range(3)]
    model = Net(Block(downsample=True), Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        mean_loss(model.train(), batch).backward()
        optimizer.step()
    return model.eval(), batches


OVERRIDES = {'blocks.1.conv1': dict(weight=dict(bits=5)), 'blocks.1.conv2': dict(weight=dict(groups=2))}
CONFIG = dict(weight=dict(bits=4), activation=dict(bits=4), overrides=OVERRIDES)


@pytest.mark.parametrize('budget', [dict(size=0.3), dict(bitops=0.03), dict(size=0.3, bitops=0.03)])
def test_the_door(budget, capsys):
    """The answer is a config that the model takes, with the size and operations that were told; the model stays."""
    model, batches = trained()
    before = copy.deepcopy(model.state_dict())
    found = gq.allocate(model, CONFIG, batches[0][0], batches, mean_loss, budget)
    assert same(before, model.state_dict()) and not quant_layers(model)
    assert 'The best uniform bits within the budget: W' in capsys.readouterr().out
    report = gq.quantize(model, found.config(CONFIG), batches[0][0], show=False)
    gq.calibrate(model, batches)
    total = totals(model, report)
    told = dict(size=total.bytes, bitops=total.bit_operations)
    for kind, used in found.best.used.items():
        assert used == pytest.approx(told[kind], abs=1)
    assert found.program.fits(found.best)
    bits = {name: layer.bits for name, layer in quant_layers(model).items()}
    assert bits == {layer.name: layer.bits for layer in found.layers}
    assert bits['stem'] == bits['fc'] == (8, 8) and bits['blocks.1.conv1'][0] == 5
    assert quant_layers(model)['blocks.1.conv2'].weight_quant.groups == 2
    assert bits['blocks.0.conv1'][1] == bits['blocks.0.downsample.0'][1]
    assert sum(layer.share_of_size for layer in found.layers) == pytest.approx(1)
    if 'bitops' not in budget:
        assert {a for name, (_, a) in bits.items() if 'blocks' in name} == {4}


def test_projections_of_attention_are_chosen_one_by_one():
    """Their weights are rows of one Parameter. Products stay as they are, and count."""
    torch.manual_seed(0)

    def forward(m, x):
        x = m.first(x)
        return m.last(m.attn(x, x, x)[0])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Function(forward, first=nn.Linear(6, 8), attn=attention, last=nn.Linear(8, 3))
    batches, budget = [(torch.randn(8, 5, 6), torch.randn(8, 5, 3))], dict(size=0.75, bitops=0.3)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    found = gq.allocate(model, 'w4a4', batches[0][0], batches, loss, budget, show=False)
    projections = [f'attn.{name}.weight' for name in PROJECTIONS]
    weights = {choice.name: choice for choice in found.choices if choice.side == 'weight'}
    assert all(len(weights[name].layers) == 1 and found.program.choices[name][2] > 0 for name in projections)
    for bits, said in ((8, r'attn\.product_quant\.\d(?! in float)'), (32, r'attn\.product_quant\.\d in float')):
        config = dict(CONFIG, overrides={}, attention=dict(bits=bits))
        with pytest.raises(UserError, match=f'is impossible; .*{said}'):
            gq.allocate(model, config, batches[0][0], batches, loss, dict(bitops=1e-4), show=False)
    report = gq.quantize(model, found.config('w4a4'), batches[0][0], show=False)
    gq.calibrate(model, batches)
    total = totals(model, report)
    assert sum(row.macs for row in report.products) > 0
    assert found.best.used == pytest.approx(dict(size=total.bytes, bitops=total.bit_operations), abs=1)


def test_the_text_of_a_config_is_the_config(tmp_path):
    model, batches = trained()
    found = gq.allocate(model, CONFIG, batches[0][0], batches, mean_loss, dict(bitops=0.03), show=False)
    text = config_text(found, '../base.py', ['One line.'], 'loss', dict(load_from='a.pth', quantization=CONFIG))
    names: dict = {}
    exec(text, names)
    assert names['_base_'] == ['../base.py'] and names['load_from'] == 'a.pth'
    assert names['quantization'] == found.config(CONFIG)
    assert next(iter(names['quantization']['overrides'])) == 'blocks.1.conv1'  # ours come later, so they win
    assert text.startswith('# One line.\n# Budget bitops: ')


def test_the_door_under_no_grad():
    model, batches = trained()
    arguments = dict(config=CONFIG, example=batches[0][0], batches=batches, loss=mean_loss, budget=dict(size=0.3))
    with torch.no_grad():
        found = gq.allocate(model, **arguments, show=False)
    assert found.best.bits == gq.allocate(model, **arguments, show=False).best.bits


def test_sensitivity_in_half_precision_is_that_in_float():
    """The squares of small gradients are no numbers of 16 bits."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), [torch.randn(4, 6)]
    _, _, _, candidates = chooser(model, batches)
    expected = loss_sensitivity(candidates, batches, lambda x: 1e-3 * half_square(model)(x), len)
    model.half()
    found = loss_sensitivity(candidates, [x.half() for x in batches], lambda x: 1e-3 * half_square(model)(x), len)
    for name, options in expected.items():
        for b in (2, 3, 4) if len(options) > 1 else ():
            assert found[name][b] == pytest.approx(options[b], rel=0.1)


def with_loss(loss):
    return dict(budget=dict(size=0.3), loss=loss)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(budget=dict(size=1e-3)), r'the least is [\d,]+ bytes .* given by the config \(layers .*fc.*\)'),
        (dict(budget=dict(size=0.3), config=dict(skip=['blocks.1.*'])), r'the least .*blocks.1.conv\d in float, '),
        (dict(budget=dict(bitops=0.01), config=dict(skip=['blocks.1.*'])), r'the least .*blocks.1.conv\d in float, '),
        (dict(budget=dict(ms=1.0)), 'a budget in ms needs times of layers'),
        (dict(bits=[1, 4]), "bits 1: method 'gdrq' has 2 to 8 bits"),
        (dict(bits=[2.0, 4]), "bits 2.0: method 'gdrq' has 2 to 8 bits"),
        (with_loss(lambda m, b: m(b[0]).square()), r'is a tensor of shape \(.*\), not a number with a gradient'),
        (with_loss(lambda m, b: m(b[0]).sum().detach()), 'is a number without a gradient, not a number with'),
        (with_loss(lambda m, b: m(b[0]).sum().item()), 'the loss of a batch is a float, not a number with a gradient'),
        (dict(config=dict(weight=dict(bits=32))), 'nothing is to be chosen'),
    ],
)
def test_bad_input_of_the_door(changes, message):
    model, batches = trained()
    arguments = dict(config=CONFIG, example=batches[0][0], batches=batches, loss=mean_loss, budget=dict(size=0.2))
    with pytest.raises(UserError, match=message):
        gq.allocate(model, **{**arguments, **changes})


# ---- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('scale', [1.0, 65536.0])
def test_the_search_moves_towards_the_budget_and_what_the_loss_needs(scale):
    """Two layers, one of which has no effect: it gets the fewest bits, within a budget that forces one of them.

    In float16 the loss is scaled, and the first gradients are not finite.
    """
    torch.manual_seed(0)

    def forward(m, x):
        h = m.first(x).relu()
        return m.end(m.useful(h) + 0 * m.useless(h))

    model = Function(forward, first=conv(), useful=conv(), useless=conv(), end=conv())
    x = torch.randn(8, 4, 8, 8)
    target = model(x).detach()
    settings = Quantization.from_dict(dict(deployable=False))
    report = quantize_model(model, settings, record(model, lambda: model(x)))
    calibrate(model, [x])
    size = totals(model, report).float_bytes
    chooser = Chooser(model, settings, report, size, bits=[2, 8], inputs=False)
    chooser.candidates.calibrate([x], model)
    whole = chooser.costs.budget('size', 1.0)
    pairs = {name: Pair(8, layer.bits[1]) for name, layer in quant_layers(model).items()}
    high, low = (whole.used({**pairs, 'useless': Pair(b, pairs['useless'].input)}) for b in (8, 2))
    budget = chooser.costs.budget('size', low + 0.1 * (high - low))
    given = {choice.name: choice.bits[0] for choice in chooser.choices if len(choice.bits) == 1}
    search = BitSearch(chooser.candidates, choices_of_layers(chooser.choices), given, [budget])
    for step in range(60):
        (scale * 100 * (model.train()(x) - target).square().mean()).backward()
        if scale > 1 and step == 0:
            search.logits['useful.weight'].grad.fill_(torch.inf)
        search.step((step + 1) / 60, scale)
    found = search.sensitivities()
    search.stop()
    for options in found.values():
        assert sum(np.exp(-value) for value in options.values()) == pytest.approx(1, abs=1e-5)
    share = {name: {b: np.exp(-value) for b, value in options.items()} for name, options in found.items()}
    assert share['useful.weight'][8] > 0.6 and share['useless.weight'][2] > 0.6
    assert share['useful.weight'][8] > share['useless.weight'][8]
    assert not any(layer.weight_quant._forward_hooks for layer in quant_layers(model).values())
