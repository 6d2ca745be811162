"""gdrq_mm/core/products.py: products of two activations, quantized where they are."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core import compat
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import mute_leaves
from gdrq_mm.core.products import operations
from gdrq_mm.core.step import after_step
from tests.core.networks import quantize
from tests.helpers import Function


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Between(nn.Module):
    """A module between two linear layers, and a child of its own."""

    def __init__(self, function, inner=None):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.between = Function(function)
        if inner is not None:
            self.between.inner = inner

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def calibrated(model, x, **settings):
    report = quantize(model, x, **settings)
    calibrate(model, [x])
    return report


def mixed(weights, x):
    """The product with values, so that the width is as before."""
    return weights @ x


WAYS = {
    '@': lambda m, x: (x @ x.transpose(1, 2)) @ x,
    'methods': lambda m, x: x.matmul(x.transpose(1, 2)).bmm(x),
    'keywords': lambda m, x: torch.bmm(torch.matmul(x, other=x.transpose(1, 2)), mat2=x),
    'baddbmm': lambda m, x: torch.baddbmm(x, torch.baddbmm(x.new_zeros(1), x, x.mT, beta=0, alpha=1.0), x, beta=0),
    'einsum': lambda m, x: torch.einsum('nij,njk->nik', torch.einsum('nik,n j k -> nij', [x, x]), x),
}


@pytest.mark.parametrize('way', WAYS)
def test_factors_are_rounded_however_it_is_written(way):
    model, x = Between(WAYS[way]), torch.randn(2, 5, 6)
    calibrated(model, x)
    (one, other), (left, right) = model.between.product_quant
    y = torch.randn(2, 5, 8)
    expected = left(one(y) @ other(y.mT)) @ right(y)
    torch.testing.assert_close(model.eval().between(y), expected)
    assert {quantizer.bits for quantizer in (one, other, left, right)} == {8}
    assert not torch.equal(expected, (y @ y.mT) @ y)


def test_an_einsum_of_several_factors_stays_float_and_says_so():
    """In a module that has other products too; one of a single factor is none."""

    def forward(m, x):
        scores = torch.einsum('nij->nij', x) @ x.mT
        return torch.einsum('nij,njk,nkl->nil', scores, x, x.mT) @ x

    model, x = Between(forward), torch.randn(2, 5, 6)
    report = calibrated(model, x)
    assert [(each.name, each.note) for each in report.products] == [
        ('between.product_quant.0', ''),
        ('between.product_quant.1', 'float: einsum of 3 factors'),
        ('between.product_quant.2', ''),
    ]
    assert report.products[1].macs == 5 * 5 * 8 + 5 * 8 * 5
    (one, other), float_, (left, right) = model.between.product_quant
    y = torch.randn(2, 5, 8)
    scores = one(y) @ other(y.mT)
    torch.testing.assert_close(model.eval().between(y), left((scores @ y) @ y.mT) @ right(y))
    assert len(float_) == 0


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(is_causal=True),
        dict(scale=0.3),
        dict(attn_mask='bool'),
        dict(attn_mask='float'),
        pytest.param(
            dict(enable_gqa=True),
            marks=pytest.mark.skipif(compat.TORCH < (2, 5), reason='torch before 2.5 has no enable_gqa'),
        ),
    ],
)
def test_attention_in_one_function_is_written_out(options):
    heads = 2 if options.get('enable_gqa') else 4
    masks = {'bool': torch.rand(5, 5).round().bool() | torch.eye(5, dtype=torch.bool), 'float': torch.randn(4, 5, 5)}
    options = {**options, **({'attn_mask': masks[options['attn_mask']]} if 'attn_mask' in options else {})}

    def forward(m, x):
        q, k = x.view(2, 5, 4, 2).transpose(1, 2), x[..., : 2 * heads].reshape(2, 5, heads, 2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, k, **options).transpose(1, 2).flatten(2)

    model, x = Between(forward), torch.randn(2, 5, 6)
    plain = copy.deepcopy(model.between)
    calibrated(model, x)
    y = model.first(x).detach()
    (one, other), (weights, _) = model.between.product_quant
    error = (model.eval().between(y) - plain(y)).abs().max() / plain(y).abs().max()
    assert 0 < error < 0.05
    assert (weights.kind, weights.threshold <= 1) == ('unsigned', True) and one is not other


def test_a_mask_beside_is_causal_is_refused():
    def forward(m, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=m.mask, is_causal=m.mask is not None)

    model, x = Between(forward), torch.randn(2, 5, 6)
    model.between.mask = None
    calibrated(model, x)
    model.between.mask = torch.zeros(5, 5)
    with pytest.raises(UserError, match='attn_mask or is_causal=True, not both'):
        model(x)


@pytest.mark.parametrize('kind', ['bool', 'float'])
def test_a_query_to_which_a_mask_leaves_no_key_gets_zeros(kind):
    """As from torch 2.5 on, forward and backward."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    if kind == 'float':
        mask = torch.zeros(5, 5).masked_fill(~mask, -torch.inf)

    def forward(m, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    model, x = Between(forward), torch.randn(2, 5, 6)
    calibrated(model, x)
    y = model.first(x).detach().requires_grad_()
    out = model.train().between(y)
    out.sum().backward()
    assert not out[:, 0].any() and out[:, 1:].any() and bool(torch.isfinite(y.grad).all())


@pytest.mark.parametrize('function', [torch.bmm, torch.matmul])
def test_a_product_into_a_tensor(function):
    def forward(m, x):
        out = torch.full((2, 5, 5), 7.0)
        function(x, x.mT, out=out)
        return out @ x

    model, x = Between(forward), torch.randn(2, 5, 6)
    with torch.no_grad():
        expected = model(x)
        calibrated(model, x)
        torch.testing.assert_close(model(x), expected, atol=0.1, rtol=0.1)


def test_quantizers_belong_to_the_module_whose_forward_multiplies():
    """Modules inside of each other that multiply, one of them by a parameter alone, each with its own count."""
    weighted = Function(lambda m, x: x @ m.weight)
    weighted.weight = nn.Parameter(torch.randn(8, 8))
    deepest = Function(lambda m, x: (x @ x.mT) @ m.weighted(x), weighted=weighted)

    def forward(m, x):
        scores = x @ x.mT
        return (scores @ m.inner(x)) + (m.inner(x) @ torch.ones(8, 8))

    model, x = Between(forward, deepest), torch.randn(2, 5, 6)
    report = calibrated(model, x)
    assert [(each.name, each.note) for each in report.products] == [
        ('between.product_quant.0', ''),
        ('between.inner.product_quant.0', ''),
        ('between.inner.weighted.product_quant.0', 'float: one factor is a parameter'),
        ('between.inner.product_quant.1', ''),
        ('between.product_quant.1', ''),
        ('between.product_quant.2', ''),
    ]
    seen = {name: [] for name, module in model.named_modules() if '.product_quant.' in name and module._modules == {}}
    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(tuple(args[0].shape))
        )
    model.eval()(x)
    shape, square = (2, 5, 8), (2, 5, 5)
    assert seen == {
        'between.product_quant.0.0': [shape],
        'between.product_quant.0.1': [(2, 8, 5)],
        'between.product_quant.1.0': [square],
        'between.product_quant.1.1': [shape],
        'between.product_quant.2.0': [shape],
        'between.product_quant.2.1': [(8, 8)],
        'between.inner.product_quant.0.0': [shape] * 2,
        'between.inner.product_quant.0.1': [(2, 8, 5)] * 2,
        'between.inner.product_quant.1.0': [square] * 2,
        'between.inner.product_quant.1.1': [shape] * 2,
        'between.inner.weighted.product_quant.0': [],
    }


def test_a_product_that_was_not_recorded_stays_float():
    model = Between(lambda m, x: mixed(x @ x.mT, x) if not m.training else mixed(x @ x.mT, x) + mixed(x @ x.mT, x))
    x = torch.randn(2, 5, 6)
    calibrated(model, x)
    assert len(model.between.product_quant) == 2
    y = model.first(x)
    once = model.eval().between(y)
    torch.testing.assert_close(model.train().between(y), once + (y @ y.mT) @ y)


def test_the_threshold_of_what_softmax_makes_follows_the_largest_up_to_1():
    model = Between(lambda m, x: m.inner((x @ x.mT).softmax(-1)) @ x, nn.Dropout(0.5))
    x = torch.randn(2, 5, 6)
    calibrated(model, x)
    weights = model.between.product_quant[1][0]
    model.train()
    for _ in range(300):
        model(x * 20)  # softmax gives ones, and dropout twos
        after_step(model)
    assert 0.9 < weights.threshold <= 1 and weights.threshold_in_use() == weights.threshold


@pytest.mark.parametrize('method', ['gdrq', 'lsq', 'lsq_plus', 'pact', 'dorefa', 'minmax', 'ptq'])
@pytest.mark.parametrize('bits', [4, 8])
def test_bits_and_method_of_factors(method, bits):
    model, x = Between(lambda m, x: (x @ x.mT).softmax(-1) @ x), torch.randn(2, 5, 6)
    calibrated(model, x, method=method, attention=dict(bits=bits))
    (one, other), (weights, values) = model.between.product_quant
    assert type(one) is type(other) is type(values) and type(weights).__name__ == 'AttentionWeights'
    assert {quantizer.bits for quantizer in (one, other, weights, values)} == {bits}
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_copies_have_quantizers_of_their_own():
    model, x = Between(lambda m, x: mixed(x @ x.mT, x)), torch.randn(2, 5, 6)
    calibrated(model, x)
    other = copy.deepcopy(model).eval()
    before = model.eval()(x)
    assert torch.equal(other(x), before)
    other.between.product_quant[0][0].threshold.mul_(0.1)
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


@pytest.mark.skipif(not compat.COMPILES, reason='torch.compile of a quantized model needs torch 2.6')
def test_torch_compile_traces_it_whole():
    model, x = Between(lambda m, x: (x @ x.mT).softmax(-1) @ x), torch.randn(2, 5, 6)
    calibrated(model, x)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    for each in (compiled, eager):
        each.train()(x).square().sum().backward()
    assert torch.equal(compiled(x), eager(x))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), eager.parameters(), strict=True))


def test_an_error_in_a_module_leaves_nothing_behind():
    def forward(m, x):
        out = mixed(x @ x.mT, x)
        if m.fails:
            raise ValueError('no')
        return out

    model, x = Between(forward), torch.randn(2, 5, 6)
    model.between.fails = False
    calibrated(model, x)
    before, model.between.fails = model.eval()(x), True
    with pytest.raises(ValueError, match='no'):
        model(x)
    model.between.fails = False
    assert torch.equal(model(x), before)


def test_a_module_of_products_alone_still_counts_as_one_with_children():
    model, x = Between(lambda m, x: mixed(x @ x.mT, x)), torch.randn(2, 5, 6)
    calibrated(model, x)
    mute_leaves(model.train())
    assert not any(quantizer.training for quantizer in model.between.product_quant.modules() if not quantizer._modules)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(attention=dict(bits=1)), r'quantization.attention.bits=1 is not one of 2, 3, 4, 5, 6, 7, 8, 32'),
        (dict(attention=dict(bit=8)), r"quantization.attention has no key 'bit'; did you mean 'bits'\?"),
        (dict(attention=8), r'quantization.attention=8 is not a dict'),
        (dict(skip=['betwen']), r"the pattern 'betwen' matches no layer; nearest: between"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        quantize(Between(lambda m, x: mixed(x @ x.mT, x)), torch.randn(2, 5, 6), **settings)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('shapes', 'equation', 'expected'),
    [
        ([(4, 5), (5, 6)], '', 4 * 5 * 6),
        ([(3, 4, 5), (3, 5, 6)], '', 3 * 4 * 5 * 6),
        ([(2, 1, 4, 5), (3, 5, 6)], '', 2 * 3 * 4 * 5 * 6),
        ([(5,), (5, 6)], '', 5 * 6),
        ([(4, 5), (5,)], '', 4 * 5),
        ([(2, 3, 4), (2, 4, 7)], 'nij,njk->nik', 2 * 3 * 4 * 7),
        ([(2, 8, 3), (2, 8, 4, 5)], 'bcq, bchw -> bqhw', 2 * 8 * 3 * 4 * 5),
        ([(2, 9, 3, 4), (9, 4, 7)], '...ij,...jk', 2 * 9 * 3 * 4 * 7),
        ([(2, 3, 4), (2, 5, 4), (2, 5, 7)], 'nqc,nkc,nkv->nqv', 2 * (3 * 4 * 5 + 3 * 5 * 7)),
        ([(3, 4), (4, 5), (5, 7), (7, 2)], 'ab,bc,cd,de', 3 * 4 * 5 + 3 * 5 * 7 + 3 * 7 * 2),
        ([(9, 3, 4), (9, 4, 5), (9, 5, 7)], '...ab,...bc,...cd->...ad', 9 * (3 * 4 * 5 + 3 * 5 * 7)),
    ],
)
def test_operations_of_a_product(shapes, equation, expected):
    assert operations([torch.empty(shape) for shape in shapes], equation) == expected


def test_two_threads_predict_with_one_model():
    """As nn.DataParallel does with its replicas: a product belongs to the module that runs in its thread."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    model, batches = nn.Sequential(*(Attention() for _ in range(3))), [torch.randn(2, 50, 16) for _ in range(20)]
    calibrated(model, batches[0])
    model.eval()

    def predict(x):
        with torch.no_grad():
            return model(x)

    expected = [predict(x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(predict, batches))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_product_that_was_not_recorded_is_told():
    """Quantizers are numbered by the calls, so those behind it may not be theirs."""

    def forward(m, x):
        if m.training:
            m.penalty = (x.transpose(1, 2) @ x).square().mean()
        return (x @ x.transpose(1, 2)).softmax(-1) @ x

    model, x = Between(forward), torch.randn(2, 5, 6)
    calibrated(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model.eval()(x)
    with pytest.warns(UserWarning, match='between multiplies 3 times, and 2 times when it was recorded'):
        model.train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(x)  # told once
