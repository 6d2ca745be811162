"""Checkpoints and pickles as data: nothing runs, and nothing takes more memory than the file has bytes."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.core.reading import read_pickle, read_torch
from tests.crafted import ARRAYS, LARGE, MEMO, Call, deflated, mark, of_numpy_1, overlapping, rewritten, two_tables
from tests.helpers import same

DATA = {
    **dict(numbers=[1, 2.5, True, None, 10**30, 1j], words=('a', b'b', bytearray(b'c')), bag={1, 2}, empty=b''),
    **dict(array=np.arange(6.0).reshape(2, 3), columns=np.asfortranarray(np.arange(6).reshape(2, 3))),
    **dict(names=np.array(['cat', 'dog']), swapped=np.arange(3, dtype='>i4'), none=np.zeros((0, 3)), one=np.float32(3)),
}


@pytest.fixture
def peak():
    """A function that says how many bytes more than before this process has had at once."""

    def status(key):
        return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) << 10

    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    return lambda: status('VmHWM') - before


def refusal(read, *args):
    with pytest.raises(UserError) as caught:
        read(*args)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('protocol', range(6))
def test_plain_data_and_arrays_are_read_from_a_pickle_as_they_are(protocol):
    found = read_pickle(pickle.dumps(DATA, protocol), 'x.pkl')
    np.testing.assert_equal(found, DATA)
    assert all(type(found[key]) is type(value) for key, value in DATA.items())
    assert found['columns'].flags.f_contiguous and found['swapped'].dtype == '>i4'
    found['array'][0] = 7  # it can be written


@pytest.mark.parametrize('numpy', [1, 2])
def test_a_checkpoint_of_either_numpy_is_read(tmp_path, numpy):
    content = dict(state_dict=torch.nn.BatchNorm2d(3).state_dict(), meta={**DATA, 'names': ['cat']})
    torch.save(content, tmp_path / 'x.pth')
    if numpy == 1:
        of_numpy_1(tmp_path / 'x.pth')
    found = read_torch(tmp_path / 'x.pth')
    assert same(found['state_dict'], content['state_dict'])
    assert found['state_dict']._metadata == content['state_dict']._metadata
    np.testing.assert_equal(found['meta'], content['meta'])


@pytest.mark.parametrize('kind', ARRAYS)
@pytest.mark.parametrize('numpy', [1, 2])
def test_a_crafted_array_is_refused(tmp_path, kind, numpy):
    torch.save(dict(state_dict={}, meta=dict(names=ARRAYS[kind])), tmp_path / 'x.pth')
    if numpy == 1:
        of_numpy_1(tmp_path / 'x.pth')
    assert 'x.pth' in refusal(read_torch, tmp_path / 'x.pth')
    for protocol in (2, 4):
        assert 'x.pkl' in refusal(read_pickle, pickle.dumps(ARRAYS[kind], protocol), 'x.pkl')
    assert np.dtype('f4').itemsize == 4 and np.dtype('V8').fields is None, 'those of NumPy are as they were'


@pytest.mark.parametrize('kind', LARGE)
@pytest.mark.parametrize('new_format', [True, False])
def test_what_claims_more_than_its_file_has_is_refused(tmp_path, peak, kind, new_format):
    torch.save(dict(state_dict={'a': LARGE[kind]}), tmp_path / 'x.pth', _use_new_zipfile_serialization=new_format)
    assert 'x.pth' in refusal(read_torch, tmp_path / 'x.pth')
    if 'tensor' not in kind:
        assert 'x.pkl' in refusal(read_pickle, pickle.dumps(LARGE[kind], 2), 'x.pkl')
    assert peak() < 100 << 20


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path, peak):
    deflated(tmp_path / 'x.pth', 1 << 28)
    before = peak()
    assert 'its parts are compressed, which torch.save never does' in refusal(read_torch, tmp_path / 'x.pth')
    assert peak() - before < 50 << 20 and (tmp_path / 'x.pth').stat().st_size < 1 << 20


def test_parts_that_share_their_bytes_are_refused(tmp_path):
    overlapping(tmp_path / 'x.pth', 100)
    assert 'its parts claim more bytes than it has' in refusal(read_torch, tmp_path / 'x.pth')


def test_a_file_with_two_tables_of_contents_is_refused(tmp_path):
    two_tables(tmp_path / 'x.pth')
    assert 'its table of contents is not at its end' in refusal(read_torch, tmp_path / 'x.pth')
    torch.save(dict(state_dict={}), tmp_path / 'x.pth')
    with open(tmp_path / 'x.pth', 'ab') as file:
        file.write(bytes(10))
    refusal(read_torch, tmp_path / 'x.pth')


def test_a_pickle_that_numbers_its_values_high_takes_no_memory(peak):
    assert read_pickle(MEMO, 'x.pkl') is None
    assert peak() < 50 << 20


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    for value in (mark(tmp_path / 'executed'), {'a': [mark(tmp_path / 'executed')]}, Call(getattr, dict, 'pop')):
        message = refusal(read_pickle, pickle.dumps(value, protocol), 'x.pkl')
        assert 'x.pkl holds more than plain data' in message and 'GLOBAL' in message
    assert not (tmp_path / 'executed').exists()


def test_a_pickle_changes_nothing_that_it_names():
    """The opcode BUILD sets attributes of whatever is there, such as a class."""
    evil = b'\x80\x02cnumpy\nndarray\n}X\x04\x00\x00\x00evilK\x01sb.'
    assert 'Can only build' in refusal(read_pickle, evil, 'x.pkl')


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='torch before 2.5 has no such names')
def test_names_that_the_process_allows_are_not_allowed_here(tmp_path):
    """A program may have told torch to trust a class."""
    torch.save(dict(state_dict={}, more=Path('x')), tmp_path / 'x.pth')
    with torch.serialization.safe_globals([type(Path('x'))]):
        assert 'holds more than tensors' in refusal(read_torch, tmp_path / 'x.pth')
        assert type(Path('x')) in torch.serialization.get_safe_globals()


def test_a_storage_longer_than_its_part_is_refused(tmp_path):
    torch.save(dict(state_dict={'a': torch.arange(4.0)}), tmp_path / 'x.pth')
    rewritten(tmp_path / 'x.pth', lambda name, data: data[:4] if name.endswith('data/0') else data)
    refusal(read_torch, tmp_path / 'x.pth')


def test_attributes_of_a_tensor_are_left_out(tmp_path):
    weight = torch.zeros(3)
    weight.numel = 'a text'
    torch.save(dict(state_dict={'a': weight}), tmp_path / 'x.pth')
    assert read_torch(tmp_path / 'x.pth')['state_dict']['a'].numel() == 3
