"""Transformers as integers: attention and its products merged, exported, packed."""

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.attention import WrittenOut
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.topology import record
from gdrq_mm.deploy.export import export
from gdrq_mm.deploy.from_packed import load_packed
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.runtime import OpenVino, kernels, open_runtime, optimized, products
from tests.deploy.builders import crafted, in_float_here, prepared
from tests.helpers import Function

WIDTH, HEADS = 16, 2


def own_attention(m, x):
    """As Swin's: scaled, with a bias for each head, written with `@`."""
    q, k, v = m.qkv(x).reshape(x.shape[0], -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    weights = ((q * 0.3) @ k.transpose(-2, -1) + m.bias).softmax(-1)
    return m.proj((weights @ v).transpose(1, 2).flatten(2))


def in_one_function(m, x):
    """As the one of mmpretrain's ViT."""
    q, k, v = m.qkv(x).reshape(x.shape[0], -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    return m.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def of_torch(m, x):
    """As mmcv's: torch's module, sequence first, query and key with positions."""
    x = x.transpose(0, 1)
    return m.attn(x + m.positions, x + m.positions, x)[0].transpose(0, 1)


def attention(forward):
    found = Function(forward)
    if forward is of_torch:
        found.attn = nn.MultiheadAttention(WIDTH, HEADS)
        found.positions = nn.Parameter(torch.randn(17, 1, WIDTH))
    else:
        found.qkv, found.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        found.bias = nn.Parameter(torch.randn(HEADS, 1, 1))
    return found


def block(forward):
    """Attention and two linear layers with GELU between them, each behind a LayerNorm and in a residual branch."""

    def run(m, x):
        x = x + m.attention(m.one(x))
        return x + m.second(m.act(m.first(m.two(x))))

    norms = dict(one=nn.LayerNorm(WIDTH), two=nn.LayerNorm(WIDTH))
    layers = dict(first=nn.Linear(WIDTH, 2 * WIDTH), second=nn.Linear(2 * WIDTH, WIDTH))
    return Function(run, attention=attention(forward), act=nn.GELU(), **norms, **layers)


def transformer(*forwards):
    """A ViT with one block for each kind of attention."""

    def run(m, x):
        x = m.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
        return m.head(m.norm(m.blocks(x))[:, 0])

    model = Function(
        run,
        patches=nn.Conv2d(3, WIDTH, 4, 4),
        blocks=nn.Sequential(*map(block, forwards)),
        norm=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, 5),
    )
    model.token = nn.Parameter(torch.randn(1, 1, WIDTH))
    return model


KINDS = (own_attention, in_one_function, of_torch)


def trained(*forwards, x=None, **settings):
    """Quantized, calibrated and trained a little."""
    torch.manual_seed(0)
    model, x = transformer(*forwards), torch.randn(4, 3, 16, 16) if x is None else x
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization.from_dict(settings), plan)
    calibrate(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), plan, x


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    model, plan, x = trained(*KINDS)
    folder = tmp_path_factory.mktemp('transformer') / 'exported'
    return model, plan, x, export(model, plan, x, folder), folder


def test_each_piece_is_that_of_the_training_graph_in_both_runtimes(exported):
    model, plan, x, report, folder = exported
    assert set(report.differing) == {'onnxruntime', 'openvino'} and report.wrong == 0
    ran = {quantizer for part in report.parts for quantizer in part.ran}
    factors = {f'{product.name}.{factor}' for product in plan.products for factor in range(2)}
    assert len(factors) == 12 and factors < ran
    with torch.no_grad():
        expected = model(x)
    for backend in report.differing:
        (found,) = open_runtime(backend, folder / 'model.onnx')([x.numpy()])
        assert abs(found - expected.numpy()).max() < 0.02 * expected.abs().max()


def test_both_runtimes_multiply_integers(exported):
    *_, x, report, folder = exported
    graph = report.parts[0].graph
    assert report.float_layers == ['patches'] and report.layers == (15, 16)
    assert len(products(graph)) == 6
    found = [node.op_type for node in products(optimized(graph))]
    assert sorted(found) == ['MatMulIntegerToFloat'] * 3 + ['QLinearMatMul'] * 3
    assert kernels(graph)['MatMul'] == kernels(graph)['Gemm'] == 0
    runtime = OpenVino(folder / 'model.onnx')
    runtime([x.numpy()])
    left = [node for node in in_float_here(graph) if node not in products(graph)]
    assert runtime.integer_layers() == 16 - len(left)


def test_the_batch_is_open(exported):
    model, _, x, _, folder = exported
    for batch in (x[:1], torch.cat([x, x.flip(-1), x.flip(-2)])):
        for backend in ('onnxruntime', 'openvino'):
            (found,) = open_runtime(backend, folder / 'model.onnx')([batch.numpy()])
            with torch.no_grad():
                assert abs(found - model(batch).numpy()).max() < 0.05 * abs(found).max()


def test_a_packed_file_gives_the_merged_model(exported):
    model, plan, x, _, folder = exported
    torch.manual_seed(1)
    loaded, _ = load_packed(transformer(*KINDS), folder / 'model.safetensors')
    merged = merge_model(model, plan)
    assert torch.equal(loaded(x), merged(x))
    names = set(loaded.state_dict())
    assert not any('in_proj' in name for name in names) and names == set(merged.state_dict())
    assert 'blocks.2.attention.attn.q_proj.codes' in names


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda names: names.pop('blocks.0.attention.product_quant.0.1'), 'one factor of .*product_quant.0 is missing'),
        (lambda names: names.update({'nobody.product_quant.0.0': [0, 9]}), 'another model: the config has no nobody'),
    ],
)
def test_a_packed_file_with_wrong_products_is_refused(exported, change, message, tmp_path):
    path = tmp_path / 'crafted.safetensors'
    content = (exported[-1] / 'model.safetensors').read_bytes()
    path.write_bytes(crafted(content, lambda header: change(header['__metadata__']['outputs']) and None))
    with pytest.raises(UserError, match=message):
        load_packed(transformer(*KINDS), path)


def test_inputs_behind_gelu_have_a_zero_point():
    model, _, _ = trained(own_attention)
    layers = quant_layers(model)
    assert layers['blocks.0.second'].input_quant.kind == 'zero_point'
    assert layers['blocks.0.first'].input_quant.kind == 'signed'  # behind LayerNorm


def test_merging_drops_the_packed_weight_and_only_where_all_of_it_was_merged():
    model, plan, x = trained(of_torch)
    merged = merge_model(model, plan)
    (attention,) = (module for module in merged.modules() if isinstance(module, WrittenOut))
    assert attention.in_proj_weight is None and model.blocks[0].attention.attn.in_proj_weight is not None
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('bits', [4, 32])
def test_products_of_other_bits(bits, tmp_path):
    model, plan, x = trained(own_attention, attention=dict(bits=bits))
    report = export(model, plan, x, tmp_path / 'exported')
    found = {node.op_type for node in products(optimized(report.parts[0].graph))}
    assert found == ({'MatMul', 'FusedMatMul'} & found if bits == 32 else {'MatMulIntegerToFloat', 'QLinearMatMul'})


def test_a_sequence_of_another_length_is_refused_by_the_graph(exported):
    *_, folder = exported
    with pytest.raises(RuntimeError):  # positions are of one length
        open_runtime('onnxruntime', folder / 'model.onnx')([torch.randn(2, 3, 24, 24).numpy()])


def test_without_positions_sequences_may_have_any_length(tmp_path):
    model, plan, x = trained(own_attention, in_one_function)
    export(model, plan, x, tmp_path / 'exported')
    longer = torch.randn(2, 3, 24, 32)
    for backend in ('onnxruntime', 'openvino'):
        (found,) = open_runtime(backend, tmp_path / 'exported/model.onnx')([longer.numpy()])
        with torch.no_grad():
            assert abs(found - model(longer).numpy()).max() < 0.05 * abs(found).max()


def test_a_decoder_that_starts_from_zeros_runs_in_both_runtimes(tmp_path):
    """As DETR's first one, whose values are all 0: its inputs are constants to a runtime, and it has no threshold."""

    def run(m, x):
        queries = m.queries.repeat(x.shape[0], 1, 1)
        first, positions = (each.transpose(0, 1) for each in (torch.zeros_like(queries), queries))
        found = m.attn(positions, positions, first)[0].transpose(0, 1)
        return m.head(found + m.patches(x).flatten(2).mean(-1)[:, None])

    torch.manual_seed(0)
    model = Function(run, patches=nn.Conv2d(3, WIDTH, 4, 4), attn=nn.MultiheadAttention(WIDTH, HEADS))
    model.queries, model.head = nn.Parameter(torch.randn(1, 6, WIDTH)), nn.Linear(WIDTH, 5)
    x = torch.randn(4, 3, 16, 16)
    plan = record(model, lambda: model(x))
    quantize_model(model, Quantization.from_dict({}), plan)
    calibrate(model, [x])
    report = export(model.eval(), plan, x, tmp_path / 'exported')
    assert set(report.differing) == {'onnxruntime', 'openvino'} and report.wrong == 0
    assert not quant_layers(model)['attn.v_proj'].next_quant.step() > 0


@pytest.mark.parametrize('norm', [nn.LayerNorm([8, 6, 6], eps=1e-3), nn.GroupNorm(2, 8, eps=1e-3)])
@pytest.mark.parametrize('behind', ['sum', 'ReLU'])
def test_the_epsilon_of_a_normalization_counts(norm, behind, tmp_path):
    """OpenVINO left it out where codes are normalized, and with small values it is a part of the variance."""

    def run(m, x):
        a = m.first(x)
        return m.head(m.norm(a + m.second(x) if behind == 'sum' else a.relu()))

    torch.manual_seed(0)
    model = Function(run, norm=norm, **{name: nn.Conv2d(8, 8, 1) for name in ('first', 'second', 'head')})
    x = torch.randn(4, 8, 6, 6) * 0.03
    report = export(*prepared(model, x, bits=8), x, tmp_path / 'exported')
    assert set(report.differing) == {'onnxruntime', 'openvino'} and report.wrong == 0


@pytest.mark.parametrize('kind', ['features', 'tokens'])
def test_sequences_have_any_length(kind, tmp_path):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    first = nn.Linear(6, WIDTH) if kind == 'features' else nn.Embedding(20, WIDTH)
    model = Function(lambda m, x: m.last(m.encoder(m.first(x))), first=first, encoder=encoder, last=nn.Linear(WIDTH, 3))
    x, longer = (torch.randn(4, n, 6) if kind == 'features' else torch.randint(20, (4, n)) for n in (7, 12))
    export(*prepared(model, x, bits=8), x, tmp_path / 'exported')
    for backend in ('onnxruntime', 'openvino'):
        (found,) = open_runtime(backend, tmp_path / 'exported/model.onnx')([longer.numpy()])
        with torch.no_grad():
            assert abs(found - model(longer).numpy()).max() < 0.02 * abs(found).max()
