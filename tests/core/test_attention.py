"""gdrq_mm/core/attention.py: nn.MultiheadAttention written out, and quantized."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core import compat
from gdrq_mm.core.attention import PROJECTIONS, QuantProjection, WrittenOut
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model, to_float
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import moving_quantizers, quant_layers
from gdrq_mm.core.step import after_step
from gdrq_mm.core.topology import Plan, record
from tests.core.networks import quantize
from tests.helpers import Function
from tests.reference import quantize as reference
from tests.reference import quantize_groups, scale_clip_threshold

WIDTH, HEADS = 8, 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def attention(**options):
    made = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def net(batch_first=True, checkpointed=False, **options):
    """Self-attention between two layers, with a residual connection."""

    def forward(m, x):
        x = m.first(x)
        run = checkpoint if checkpointed else lambda f, x, use_reentrant: f(x)
        x = x + run(lambda y: m.attn(y, y, y)[0], x, use_reentrant=False)
        return m.last(m.norm(x))

    parts = dict(first=nn.Linear(6, WIDTH), norm=nn.LayerNorm(WIDTH), last=nn.Linear(WIDTH, 3))
    return Function(forward, attn=attention(batch_first=batch_first, **options), **parts)


MASKS = {
    'none': lambda length, keys: {},
    'bool': lambda length, keys: dict(attn_mask=torch.ones(length, keys, dtype=torch.bool).triu(1)),
    'float': lambda length, keys: dict(attn_mask=torch.randn(length, keys)),
    'each head': lambda length, keys: dict(attn_mask=torch.randn(3 * HEADS, length, keys)),
    'padding': lambda length, keys: dict(key_padding_mask=torch.arange(keys) > torch.tensor([[1], [2], [keys]])),
    'both': lambda length, keys: dict(attn_mask=torch.randn(length, keys), key_padding_mask=torch.randn(3, keys)),
}


@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('options', [{}, dict(kdim=5, vdim=7, bias=False), dict(add_bias_kv=True, add_zero_attn=True)])
def test_written_out_it_computes_what_torch_computes(masks, batch_first, options):
    module, masks = attention(batch_first=batch_first, **options), MASKS[masks](4, 6)
    inputs = [torch.randn(3, n, c) for n, c in ((4, WIDTH), (6, module.kdim), (6, module.vdim))]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    for need, average in itertools.product([False, True], repeat=2):
        theirs, weights = module(*inputs, **masks, need_weights=need, average_attn_weights=average)
        ours, found = WrittenOut.of(module)(*inputs, **masks, need_weights=need, average_attn_weights=average)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (found is None) == (weights is None) == (not need)
        if need:
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'need',
    [
        pytest.param(False, marks=pytest.mark.skipif(compat.TORCH < (2, 5), reason='torch before 2.5 gives NaN')),
        True,
    ],
)
def test_a_sequence_of_padding_alone_gets_what_torch_gives(need):
    """Zeros, or NaN with `need_weights`."""
    module, x = attention(batch_first=True), torch.randn(2, 4, WIDTH)
    masks = dict(key_padding_mask=torch.tensor([[False] * 4, [True] * 4]), need_weights=need)
    theirs, ours = module(x, x, x, **masks)[0], WrittenOut.of(module)(x, x, x, **masks)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert bool(ours[0].isfinite().all()) and bool(ours[1].isnan().all()) == need


def test_a_nested_tensor_is_refused_in_one_line():
    x = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)])
    with pytest.raises(UserError, match='attention takes no nested tensors'):
        WrittenOut.of(attention(batch_first=True))(x, x, x)


def test_attention_whose_weights_a_function_reads_stays_float():
    def run(m, x):
        a, x = m.attn, m.first(x).transpose(0, 1)
        own = (a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias)
        return m.last(nn.functional.multi_head_attention_forward(x, x, x, WIDTH, HEADS, *own)[0])

    layers = dict(first=nn.Linear(6, WIDTH), last=nn.Linear(WIDTH, 3), attn=nn.MultiheadAttention(WIDTH, HEADS))
    model = Function(run, **layers)
    report = quantize(model, torch.randn(3, 5, 6))
    notes = {row.name: row.note for row in report.layers}
    assert notes.pop('attn') == notes.pop('attn.out_proj') == 'float: its weight is read outside of a call of the layer'
    assert type(model.attn) is nn.MultiheadAttention and set(notes) == {'first', 'last'}


def test_a_single_sequence_has_no_batch():
    module = attention(batch_first=False)
    inputs, masks = (torch.randn(4, WIDTH), *[torch.randn(6, WIDTH)] * 2), dict(key_padding_mask=torch.arange(6) > 3)
    for theirs, ours in zip(module(*inputs, **masks), WrittenOut.of(module)(*inputs, **masks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def in_numpy(model, x):
    """The quantized network with 4-bit projections and 8-bit products, in float64."""

    def array(tensor):
        return tensor.detach().double().numpy()

    def of(quantizer, value):
        signed = quantizer.kind == 'signed'
        return reference(value, float(quantizer.threshold), quantizer.bits, signed, zero_point=-quantizer.lo % 16)

    def layer(name, value):
        each = model.get_submodule(name)
        weight, bits = array(each.weight), each.weight_quant.bits
        rounded = quantize_groups(weight, scale_clip_threshold(weight, float(each.weight_quant.k), 4), bits)
        return of(each.input_quant, value) @ rounded.T + array(each.bias)

    def heads(value):
        return value.reshape(*value.shape[:2], HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)

    q, k, v = (heads(layer(f'attn.{name}', x)) for name in PROJECTIONS)
    (one, other), (weights, values) = model.attn.product_quant
    scores = of(one, q / np.sqrt(WIDTH // HEADS)) @ of(other, k.transpose(0, 1, 3, 2))
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    found = of(weights, exponentials / exponentials.sum(-1, keepdims=True)) @ of(values, v)
    return layer('attn.out_proj', found.transpose(0, 2, 1, 3).reshape(x.shape))


def test_the_quantized_attention_is_that_of_the_formulas():
    model, x = Function(lambda m, x: m.attn(x, x, x)[0], attn=attention(batch_first=True)), torch.randn(3, 5, WIDTH)
    quantize(model, x, weight=dict(bits=4), activation=dict(bits=4), first_last_bits=4)
    calibrate(model, [x])
    for layer in quant_layers(model).values():
        layer.deployable = False  # whose rounded biases have tests of their own
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x).double(), torch.from_numpy(in_numpy(model, x.double().numpy())), rtol=1e-5, atol=1e-5
        )


def test_gradients_are_those_of_a_plain_formulation():
    """The same operations on torch's packed tensors, with the layers' own quantizers and no modules."""
    model, x = net(), torch.randn(3, 5, 6)
    quantize(model, x, weight=dict(bits=4), activation=dict(bits=4))
    calibrate(model, [x])
    plain = copy.deepcopy(model)

    def forward(m, x):
        a, (one, other), (weights, values) = m.attn, *m.attn.product_quant
        x = m.first(x)
        seen = a.q_proj.input_quant(x)
        rows = a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), PROJECTIONS
        q, k, v = (
            nn.functional.linear(seen, getattr(a, name).weight_quant(w), b).view(3, 5, HEADS, -1).transpose(1, 2)
            for w, b, name in zip(*rows)
        )
        scores = torch.matmul(one(q / (WIDTH // HEADS) ** 0.5), other(k.mT))
        found = torch.matmul(weights(scores.softmax(-1)), values(v)).transpose(1, 2).flatten(2)
        return m.last(m.norm(x + a.out_proj(found)))

    model.train()(x).square().sum().backward()
    plain.train()
    forward(plain, x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
        assert ours.grad.abs().sum() > 0, name


@pytest.mark.parametrize('options', [{}, dict(kdim=WIDTH, vdim=5)])
def test_names_and_parameters_stay_those_of_torch(options):
    def forward(m, x):
        return m.attn(m.first(x), m.first(x), m.other(x))[0]

    parts = dict(first=nn.Linear(6, WIDTH), other=nn.Linear(6, options.get('vdim', WIDTH)))
    model = Function(forward, attn=attention(**options), **parts)
    before, parameters, x = model.state_dict(), list(model.parameters()), torch.randn(5, 3, 6)
    loaded, float_out = copy.deepcopy(model), model.eval()(x)
    quantize(loaded, x)
    missing, unexpected = loaded.load_state_dict(before, strict=False)
    assert not unexpected and all('_quant.' in name for name in missing)
    report = quantize(model, x)
    assert [id(p) for p in parameters] == [id(p) for n, p in model.named_parameters() if '_quant' not in n]
    layers = quant_layers(model)
    assert all(torch.equal(layer.stored(before, name), layer.weight) for name, layer in layers.items())
    kinds = {name: type(layer) for name, layer in layers.items() if 'attn' in name}
    assert [kinds[f'attn.{name}'] for name in PROJECTIONS] == [QuantProjection] * 3 and len(kinds) == 4
    assert {row.name: row.weights for row in report.layers}['attn.v_proj'] == WIDTH * options.get('vdim', WIDTH)
    to_float(model)
    assert type(model.attn) is nn.MultiheadAttention and list(model.state_dict()) == list(before)
    torch.testing.assert_close(model(x), float_out)


def test_inputs_share_a_quantizer_where_they_are_one_tensor():
    for given, different in (
        (lambda x: (x, x, x), 1),
        (lambda x: (x + 1, x, x), 2),
        (lambda x: (x, x, x * 2), 2),
        (lambda x: (x, x + 1, x * 2), 3),
    ):
        model = Function(
            lambda m, x, given=given: m.last(m.attn(*given(m.first(x)))[0]),
            first=nn.Linear(6, WIDTH),
            attn=attention(),
            last=nn.Linear(WIDTH, 3),
        )
        quantize(model, torch.randn(5, 3, 6))
        assert len({getattr(model.attn, name).input_quant for name in PROJECTIONS}) == different


def test_recording_leaves_the_model_as_it_was():
    model = Function(lambda m, x: m.encoder(x), encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1))
    encoder, before = model.encoder, list(model.modules())
    encoder.use_nested_tensor = True
    record(model, lambda: model(torch.randn(5, 3, 8)))
    assert list(model.modules()) == before and encoder.use_nested_tensor
    assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_the_encoder_of_torch_never_takes_its_fast_path():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    x, mask = torch.randn(4, 5, 6), torch.arange(5) > torch.tensor([[4], [3], [4], [4]])
    model = Function(
        lambda m, x: m.last(m.encoder(m.first(x), src_key_padding_mask=mask)),
        first=nn.Linear(6, WIDTH),
        encoder=nn.TransformerEncoder(layer, 2),
        last=nn.Linear(WIDTH, 3),
    ).eval()
    float_out = model(x).detach()
    quantize(model, x, weight=dict(bits=8), activation=dict(bits=8))
    calibrate(model, [x])
    with torch.no_grad():  # in which torch would take it
        error = (model.eval()(x) - float_out)[~mask]
    assert 0 < error.abs().max() < 0.1 * float_out.abs().max()
    assert all(layer.seen for layer in quant_layers(model).values())


def test_checkpointed_segments_give_the_same():
    model, x = net(), torch.randn(3, 5, 6)
    found = []
    for checkpointed in (False, True):
        each = net(checkpointed=checkpointed)
        each.load_state_dict(model.state_dict())
        quantize(each, x)
        calibrate(each, [x])
        each.train()(x).square().sum().backward()
        sums = [quantizer.sums.clone() for quantizer in moving_quantizers(each).values()]
        found.append([*(p.grad for p in each.parameters()), *sums])
    assert len(found[0]) == 20 and all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_it_learns_step_by_step():
    model, x = net(), torch.randn(8, 5, 6)
    target = torch.randn(8, 5, 3)
    quantize(model, x, weight=dict(bits=4), activation=dict(bits=4))
    calibrate(model, [x])
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(nn.functional.mse_loss(model.train()(x), target))
        losses[-1].backward()
        optimizer.step()
        after_step(model)
    assert losses[-1] < 0.7 * losses[0]


def test_a_skipped_attention_stays_that_of_torch():
    model, x = net(), torch.randn(3, 5, 6)
    report = quantize(model, x, skip=['attn'])
    assert type(model.attn) is nn.MultiheadAttention and set(quant_layers(model)) == {'first', 'last'}
    assert [(row.name, row.note) for row in report.outputs if row.name != 'first'] == [
        ('model, operand 1', 'float: made by a function')
    ]
    notes = {row.name: row.note for row in (*report.layers, *report.products)}
    assert notes['attn'] == notes['attn.product_quant.0'] == 'float: skipped by config'


def test_the_name_of_an_attention_is_no_layer_that_could_be_overridden():
    """Its projections are; a pattern that changes nothing would go unseen."""
    with pytest.raises(UserError, match=r"overrides: the pattern 'attn' matches no layer; nearest: attn\."):
        quantize(net(), torch.randn(3, 5, 6), overrides={'attn': dict(weight=dict(bits=8))})


def test_an_attention_of_an_unknown_kind_stays_float_and_says_so():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value):
            return super().forward(query * 2, key, value)

    model = net()
    model.attn = Own(WIDTH, HEADS, batch_first=True)
    report = quantize(model, torch.randn(3, 5, 6))
    notes = {row.name: row.note for row in report.layers}
    assert type(model.attn) is Own and notes['attn'].endswith('Own has no quantized form')
    assert set(quant_layers(model)) == {'first', 'last'}


def test_by_an_old_plan_attention_stays_float():
    model, x = net(), torch.randn(3, 5, 6)
    content = record(model, lambda: model(x)).to_dict()
    content['products'], content['additions'] = ['attn'], []
    for name in ('calls', 'inputs', 'macs'):
        content[name] = {key: value for key, value in content[name].items() if not key.startswith('attn.')}
    report = quantize_model(model, Quantization.from_dict({}), Plan.from_dict(content))
    assert type(model.attn) is nn.MultiheadAttention and set(quant_layers(model)) == {'first', 'last'}
    assert [row.note for row in report.products] == ['float: recorded before products were quantized']


@pytest.mark.parametrize(
    ('masks', 'message'),
    [
        (dict(attn_mask=torch.ones(5, 5, dtype=torch.int64)), r'attn_mask is of torch.int64; it can be of bool or'),
        (dict(attn_mask=torch.ones(4, 5)), r'attn_mask has the shape \(4, 5\), not \(5, 5\) or \(6, 5, 5\)'),
        (dict(key_padding_mask=torch.ones(2, 5)), r'key_padding_mask has the shape \(2, 5\), not \(3, 5\)'),
        (dict(is_causal=True), 'is_causal=True wants an attn_mask'),
        (dict(is_causal=True, key_padding_mask=torch.ones(3, 5)), 'is_causal=True wants an attn_mask'),
    ],
)
def test_a_wrong_mask_is_one_line(masks, message):
    module, x = WrittenOut.of(attention(batch_first=True)), torch.randn(3, 5, WIDTH)
    with pytest.raises(UserError, match=message) as caught:
        module(x, x, x, **masks)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('groups', [1, 3, 'channel'])
def test_groups_may_cut_a_head(groups):
    model, x = net(), torch.randn(3, 5, 6)
    quantize(model, x, weight=dict(bits=4, groups=groups))
    calibrate(model, [x])
    count = WIDTH if groups == 'channel' else groups
    assert {getattr(model.attn, name).weight_quant.groups for name in PROJECTIONS} == {count}
    assert model.eval()(x).isfinite().all()
