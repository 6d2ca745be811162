"""Packed files: bit-exact, small, and refused where they are damaged or do not fit."""

import copy
import json
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.deploy.coding import compress_codes, decompress_codes, entropy, pack_codes, unpack_codes
from gdrq_mm.deploy.from_packed import load_packed
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.packed import is_packed, read_packed, write_packed
from tests.deploy.builders import crafted, network, prepared, summed
from tests.helpers import Function

LAW = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@LAW
@given(bits=st.integers(1, 8), count=st.integers(0, 50), seed=st.integers(0, 99))
def test_codes_survive_packing(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    data = pack_codes(codes, bits)
    assert len(data) == -(-count * bits // 8) and np.array_equal(unpack_codes(data, bits, count), codes)


@LAW
@given(bits=st.integers(1, 8), count=st.integers(0, 50), seed=st.integers(0, 99))
def test_codes_survive_compression(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    data = compress_codes(codes, bits)
    found = decompress_codes(data, bits, count)
    assert found.dtype == np.uint8 and np.array_equal(found, codes)
    beyond = 8 // bits * max(1, -(-count // (8 // bits)))  # the codes that fit into the same bytes, and one more
    for damaged, asked in ((data[:-1], count), (data + b'x', count), (b'', count), (data, beyond + 1)):
        with pytest.raises(ValueError, match='compressed codes'):
            decompress_codes(damaged, bits, asked)


def test_a_stream_of_zeros_is_not_unpacked_beyond_what_was_asked_for():
    data = compress_codes(np.zeros(1 << 22, np.uint8), 8)
    assert len(decompress_codes(data, 8, 1 << 22)) == 1 << 22
    with pytest.raises(ValueError, match='compressed codes are not 10'):
        decompress_codes(data, 8, 10)
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)  # not Huffman's code alone: a thousandth of its size
    bomb = stream.compress(bytes(1 << 22)) + stream.flush()
    with pytest.raises(ValueError, match='bytes are too few'):
        decompress_codes(bomb, 8, 1 << 22)


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
def test_compressed_codes_come_near_to_their_entropy(bits):
    top = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(np.random.default_rng(0).normal(0, top / 3, 50_000)), -top, top).astype(int) + top
    share = np.bincount(codes) / len(codes)
    expected = -sum(p * np.log2(p) for p in share if p)
    assert entropy(codes) == pytest.approx(expected) and entropy(np.zeros(5)) == entropy(np.zeros(0)) == 0
    assert 1 <= 8 * len(compress_codes(codes, bits)) / len(codes) / expected < 1.05


@pytest.mark.parametrize('method, bits', [('gdrq', 4), ('dorefa', 3), ('twn', 2), ('xnor', 1)])
def test_a_compressed_file_is_read_to_the_last_bit(tmp_path, method, bits):
    def build():
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 1))

    model, plan = prepared(build(), torch.randn(2, 3, 9, 9), bits=8, method=method, weight=dict(bits=bits))
    model[2].weight.data.normal_()
    model[2].weight_quant.start(model[2].weight.detach())
    merged = merge_model(model, plan)
    paths = [tmp_path / 'plain.safetensors', tmp_path / 'small.safetensors']
    sizes = [write_packed(merged, path, compress=path is paths[1]) for path in paths]
    stored = [read_packed(path).layers for path in paths]
    assert sizes[0].written == sizes[0].at_bits == sizes[1].at_bits and sizes[0].entropy == sizes[1].entropy > 0
    smaller = method not in ('xnor', 'dorefa')  # there all codes are about as frequent
    assert stored[1]['2'].compressed == smaller and not stored[0]['2'].compressed
    assert sizes[1].entropy <= sizes[1].written and (sizes[1].written < sizes[1].at_bits) == smaller
    assert (paths[1].stat().st_size < paths[0].stat().st_size) == smaller
    found = [load_packed(build(), path)[0].state_dict() for path in paths]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[1][n], v) for n, v in found[0].items())
    assert torch.equal(found[1]['2.codes'], merged.state_dict()['2.codes'])
    with safetensors.safe_open(paths[0], 'pt') as file:
        assert file.metadata()['gdrq'] == '1' and 'compressed' not in file.metadata()['layers']


@pytest.mark.parametrize('method, bits', [('gdrq', 2), ('gdrq', 4), ('dorefa', 3), ('lsq', 4), ('xnor', 1)])
def test_a_float_model_becomes_the_merged_one_to_the_last_bit(tmp_path, method, bits):
    model, x = network(), torch.randn(4, 3, 12, 12)
    model, plan = prepared(model, x, bits=8, method=method, weight=dict(bits=bits), deployable=True)
    merged = merge_model(model, plan)
    write_packed(merged, tmp_path / 'model.safetensors', 'the config', dict(classes=['a'], palette=[(1, 2, 3)]))
    packed = read_packed(tmp_path / 'model.safetensors')
    assert packed.config == 'the config' and packed.layers['b'].weight_bits == bits
    torch.manual_seed(7)
    loaded, meta = load_packed(network().train(), tmp_path / 'model.safetensors')
    assert meta == dict(classes=['a'], palette=[(1, 2, 3)])
    assert not loaded.training and not quant_layers(loaded)
    expected, found = merged.state_dict(), loaded.state_dict()
    assert list(found) == list(expected) and all(found[n].dtype == v.dtype for n, v in expected.items())
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    assert any(name.endswith('output_quant.step') for name in found)
    with torch.no_grad():
        assert torch.equal(loaded(x), merged(x))


def test_what_is_loaded_needs_neither_quantizers_nor_calibration(tmp_path, monkeypatch):
    model, plan = prepared(network(), torch.randn(2, 3, 8, 8), deployable=True)
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    monkeypatch.setattr('gdrq_mm.core.quantizers.base.Quantizer.__init__', None)
    load_packed(network(), tmp_path / 'model.safetensors')


def test_other_programs_read_the_tensors(tmp_path):
    model, plan = prepared(network(), torch.randn(2, 3, 8, 8), bits=8, weight=dict(bits=4))
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    with safetensors.safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        assert file.metadata()['gdrq'] == '1'
        about = json.loads(file.metadata()['layers'])['b']
        codes = file.get_tensor('b.codes')
    assert codes.dtype == torch.uint8 and codes.shape == (4 * 4 * 9 // 2,)
    first = int(codes[0] & 15) * about['stride'] + about['lowest']
    assert first == int(model.b.weight_quant.codes(model.b.weight).flatten()[0])


def test_a_layer_of_several_names_is_stored_once(tmp_path):
    """As RTMDet's heads share convolutions; the state dict has every name."""

    def build():
        shared = nn.Conv2d(3, 3, 3, padding=1)
        layers = nn.ModuleList([shared, shared, shared])
        return Function(lambda m, x: m.layers[2](m.layers[0](x).relu()), layers=layers)

    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(build(), x, deployable=True)
    merged = merge_model(model, plan)
    write_packed(merged, tmp_path / 'model.safetensors')
    assert [n for n in read_packed(tmp_path / 'model.safetensors').state if 'codes' in n] == ['layers.0.codes']
    assert torch.equal(load_packed(build(), tmp_path / 'model.safetensors')[0](x), merged(x))


def test_a_layer_that_was_not_reached_says_so(tmp_path):
    def build():
        return Function(lambda m, x: m.b(x) if len(x) > 4 else m.a(x), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3))

    x = torch.randn(4, 3, 9, 9)
    model, plan = prepared(build(), x)
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    loaded, _ = load_packed(build(), tmp_path / 'model.safetensors')
    assert loaded(x).shape == (4, 4, 7, 7)
    with pytest.raises(UserError, match=r'^b is not in the deployed model'):
        loaded(torch.randn(5, 3, 9, 9))


@pytest.mark.parametrize('bits, ratio', [(4, 7.5), (2, 13)])
def test_the_size_of_a_packed_resnet18(tmp_path, bits, ratio):
    from torchvision.models import resnet18

    model = resnet18()
    float_bytes = 4 * sum(v.numel() for v in model.state_dict().values())
    model, plan = prepared(model, torch.randn(1, 3, 64, 64), bits=8, weight=dict(bits=bits))
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    assert float_bytes / (tmp_path / 'model.safetensors').stat().st_size >= ratio


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp('packed') / 'model.safetensors'
    model, plan = prepared(network(), torch.randn(2, 3, 8, 8), bits=8, deployable=True)
    write_packed(merge_model(model, plan), path)
    return path.read_bytes()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused(packed, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / 'damaged.safetensors'
    content = bytearray(packed)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_packed(path)


def test_a_byte_of_the_header_that_means_nothing_is_seen_too(packed, tmp_path):
    size = int.from_bytes(packed[:8], 'little')
    content = summed(packed[8 : 8 + size] + b'        ', packed[8 + size :])
    (tmp_path / 'model.safetensors').write_bytes(content)
    assert read_packed(tmp_path / 'model.safetensors').layers
    (tmp_path / 'model.safetensors').write_bytes(content.replace(b'        ', b'       \n', 1))
    with pytest.raises(UserError, match='truncated or altered: its checksum does not fit'):
        read_packed(tmp_path / 'model.safetensors')


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(UserError, match='cannot be read: No such file'):
        read_packed(tmp_path / 'none.safetensors')
    safetensors.torch.save_file({'weight': torch.zeros(2)}, tmp_path / 'other.safetensors')
    assert is_packed(tmp_path / 'other.safetensors'), 'it is no checkpoint of a training'
    with pytest.raises(UserError, match=r'other\.safetensors is not a packed file of this project$'):
        read_packed(tmp_path / 'other.safetensors')
    torch.save(dict(state_dict={}), tmp_path / 'model.pth')
    (tmp_path / 'empty').touch()
    assert not any(is_packed(tmp_path / name) for name in ('model.pth', 'empty', 'none', '.'))


def about(header):
    return header['__metadata__']


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda header: about(header)['layers']['a'].update(lowest=[[0]] * 4000), 'damaged: ValueError lowest'),
        (lambda header: about(header)['layers']['a'].update(lowest=-129), 'damaged: ValueError lowest'),
        (lambda header: about(header)['layers']['a'].update(stride=float('nan')), 'damaged: ValueError stride'),
        (lambda header: about(header)['layers']['a'].update(stride=0), 'damaged: ValueError stride'),
        (lambda header: about(header)['layers']['a'].update(stride=120), 'damaged: ValueError codes beyond int8'),
        (lambda header: about(header)['layers']['a'].update(weight_bits=4.0), 'damaged: ValueError weight_bits'),
        (lambda header: about(header)['layers']['a'].update(weight_bits=5), 'damaged: ValueError .* bytes for'),
        (lambda header: about(header)['layers']['a'].update(shape=[2**20, 2**20]), 'damaged: ValueError .* bytes for'),
        (lambda header: about(header)['layers']['a'].update(shape=[0, 2**62, -1]), 'damaged: ValueError shape'),
        (lambda header: about(header)['layers']['a'].update(norm=[]), 'damaged: ValueError norm'),
        (lambda header: about(header)['layers']['a'].update(inputs=[]), 'damaged: ValueError inputs'),
        (lambda header: about(header)['layers']['a'].update(compressed=1), 'damaged: ValueError compressed'),
        (lambda header: about(header)['layers']['a'].update(compressed=True), 'damaged: ValueError compressed codes'),
        (lambda header: about(header)['layers']['a'].update(inputs=[[0, float('inf'), 4]]), 'damaged: ValueError'),
        (lambda header: about(header)['layers']['a'].update(inputs=[[0, 15, 4]] * 2), 'pyramid levels with head None'),
        (lambda header: about(header)['layers'].update(no=3), 'damaged: TypeError'),
        (lambda header: about(header).update(outputs={'one': 'x'}), 'damaged: ValueError outputs'),
        (lambda header: about(header).update(absent=[1]), 'damaged: ValueError absent'),
        (lambda header: about(header).update(meta=[]), 'damaged: AttributeError'),
        (lambda header: about(header).pop('layers'), "damaged: KeyError 'layers'"),
        (lambda header: about(header).update(gdrq='7'), 'has version 7, this is 1'),
        (lambda header: header['a.codes'].update(data_offsets=[0, 2**40]), 'damaged: SafetensorError'),
        (lambda header: header.update({f'{n}': header['a.codes'] for n in range(999)}), 'damaged: SafetensorError'),
        (lambda header: header['a.codes'].update(dtype='I8'), 'damaged: ValueError codes are'),
        (lambda header: '{"x":' + '[' * 100_000 + '"sha256":"' + '0' * 64 + '"', 'damaged: SafetensorError'),
    ],
)
def test_a_crafted_header_is_refused(packed, tmp_path, change, message):
    (tmp_path / 'model.safetensors').write_bytes(crafted(packed, lambda header: None))
    assert read_packed(tmp_path / 'model.safetensors').layers, 'unchanged it is good'
    (tmp_path / 'model.safetensors').write_bytes(crafted(packed, change))
    with pytest.raises(UserError, match=message) as refused:
        read_packed(tmp_path / 'model.safetensors')
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda header: about(header)['layers']['a'].update(norm='x'), 'that of another model: the config has no x'),
        (lambda header: about(header)['layers'].update(pool=about(header)['layers'].pop('a')), "KeyError 'pool.codes'"),
        (lambda header: header.update({'x.step': header.pop('a.step')}), 'does not fit the model: '),
        (lambda header: about(header)['layers']['a'].update(shape=[3, 4, 3, 3]), 'size mismatch for a.codes'),
        (lambda header: about(header).update(outputs={}), 'does not fit the model: Unexpected key'),
        (lambda header: about(header).update(absent=['one']), 'does not fit the model: Unexpected key'),
        (lambda header: about(header).update(absent=['nothing']), 'the config has no nothing'),
    ],
)
def test_a_crafted_header_does_not_fit_the_model(packed, tmp_path, change, message):
    (tmp_path / 'model.safetensors').write_bytes(crafted(packed, change))
    with pytest.raises(UserError, match=message):
        load_packed(network(), tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(), None),
        (dict(weight=dict(bits=3)), 'has W4A4 in layer b, the config W3A4'),
        (dict(overrides={'one.*': dict(activation=dict(bits=8))}), 'in layer one.*the config W4A8'),
        (dict(skip=['two.conv1']), 'has integers in layer two.conv1, which the config skips'),
    ],
)
def test_a_file_of_other_bits_than_the_config_is_refused(packed, tmp_path, settings, message):
    (tmp_path / 'model.safetensors').write_bytes(packed)
    config = Quantization.from_dict(settings)
    if message is None:
        load_packed(network(), tmp_path / 'model.safetensors', config)
    else:
        with pytest.raises(UserError, match=message):
            load_packed(network(), tmp_path / 'model.safetensors', config)


def test_a_file_of_another_network_is_refused(packed, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(packed)
    with pytest.raises(UserError, match=r'that of another model: the config has no a$'):
        load_packed(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / 'model.safetensors')
    other = network()
    other.a = nn.Conv1d(3, 4, 3)
    with pytest.raises(UserError, match='that of another model: a is a Conv1d'):
        load_packed(other, tmp_path / 'model.safetensors')


def test_an_image_without_a_batch(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, padding=1))
    empty, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8)
    model, plan = prepared(model.eval(), x)
    write_packed(merge_model(model, plan), tmp_path / 'model.safetensors')
    loaded, _ = load_packed(empty, tmp_path / 'model.safetensors')
    torch.testing.assert_close(loaded(x[0]), loaded(x)[0])
