"""What torch.save wrote, in both of its formats, is read without torch.load: as it was, or refused."""

import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from gdrq_mm.core import compat
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.reading import read_torch
from gdrq_mm.core.unpickling import TENSORS
from tests.crafted import Call, rewritten
from tests.helpers import same

FORMATS = pytest.mark.parametrize('new_format', [True, False])
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
)


def saved(path, value, new_format=True):
    torch.save(value, path, _use_new_zipfile_serialization=new_format)
    return path


def content():
    """Everything that a training checkpoint may hold beside arrays."""
    base = torch.arange(24.0).reshape(2, 3, 4)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    return dict(
        state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        dtypes={str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES},
        views=[base, base[1], base.permute(2, 0, 1), base[:, 1:2, ::2], base[0, 0, 0], base[:0]],
        expanded=torch.zeros(1).expand(3, 4),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.ones(2)),
        learns=torch.ones(2, requires_grad=True),
        plain=[torch.Size([1, 2]), torch.device('cpu'), torch.device('cuda', 1), torch.bfloat16, torch.Size([])],
        ordered=OrderedDict(a=1, b={2}),
    )


@FORMATS
def test_a_checkpoint_is_read_as_torch_reads_it(tmp_path, new_format):
    whole = content()
    found = read_torch(saved(tmp_path / 'x.pth', whole, new_format))
    assert same(found, whole)
    assert found['state_dict']._metadata == whole['state_dict']._metadata
    for name, dtype in zip(whole['dtypes'], DTYPES):
        assert found['dtypes'][name].dtype == dtype
    for one, other in zip(found['views'], whole['views']):
        assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
    found['views'][0][1, 0, 0] = 7
    assert found['views'][1][0, 0] == 7 == found['views'][2][0, 1, 0], 'views share their values'
    assert found['channels_last'].is_contiguous(memory_format=torch.channels_last)
    assert type(found['parameter']) is torch.nn.Parameter and found['learns'].requires_grad
    assert not found['state_dict']['0.weight'].requires_grad


def test_a_file_of_torch_1_has_fewer_parts(tmp_path):
    whole = content()
    saved(tmp_path / 'x.pth', whole)
    with zipfile.ZipFile(tmp_path / 'x.pth') as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / 'x.pth', 'w') as archive:
        for name, part in parts.items():
            if name.endswith(('data.pkl', 'version')) or '/data/' in name:
                archive.writestr(name.replace('x/', 'archive/'), part)
    assert same(read_torch(tmp_path / 'x.pth'), whole)


REFUSED = {
    'torch._utils._rebuild_qtensor': 'quantized',
    'torch._utils._rebuild_sparse_tensor': 'sparse',
    'torch._utils._rebuild_meta_tensor_no_storage': 'without values',
    'torch._utils._rebuild_nested_tensor': 'nested',
    'torch._utils._rebuild_wrapper_subclass': 'of another class',
    'torch._utils._rebuild_device_tensor_from_numpy': 'of another device',
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': 'of another device',
    'torch.serialization._get_layout': 'sparse',
    'torch.storage.TypedStorage': 'no tensor',
}
"""What torch.load(weights_only=True) lets in and a checkpoint of ours does not hold -> what it is of."""


@pytest.mark.skipif(not compat.EXPORTS, reason='the names of newer torch')
def test_names_are_those_that_torch_lets_in():
    """Without tensors that are not dense and on the CPU: what is found here is what torch added since."""
    known = torch._weights_only_unpickler._get_allowed_globals()
    quantized = {name for name in known if 'per_tensor' in name or 'per_channel' in name or 'Q' in name.split('.')[-1]}
    classes = {name for name in known if name.endswith('Tensor') and name != 'torch.Tensor'}
    assert set(known) - set(TENSORS) - set(REFUSED) - quantized - classes == set()
    ours = {'builtins.frozenset', 'builtins.bytes', 'numpy.ndarray', 'numpy.dtype'}
    more = {name for name in set(TENSORS) - set(known) - ours if not name.startswith(('numpy.', 'torch.'))}
    assert more == set()


@pytest.mark.parametrize('name', ['_rebuild_qtensor', '_rebuild_sparse_tensor'])
@FORMATS
def test_tensors_of_another_kind_are_refused(tmp_path, name, new_format):
    kinds = dict(_rebuild_qtensor=torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))
    kinds['_rebuild_sparse_tensor'] = torch.ones(2).to_sparse()
    with pytest.raises(UserError, match='holds more than tensors'):
        read_torch(saved(tmp_path / 'x.pth', dict(a=kinds[name]), new_format))


def rebuilt(offset=0, size=(2,), stride=(1,), rebuild=torch._utils._rebuild_tensor_v2, storage=None):
    """A tensor with an offset, a shape and strides of one's own."""
    storage = torch.arange(8.0).storage() if storage is None else storage
    return Call(rebuild, storage, offset, size, stride, False, OrderedDict())


huge = torch.zeros(1).expand(1 << 40)
CRAFTED = {
    'beyond its storage': rebuilt(7),
    'before its storage': rebuilt(-1),
    'a stride beyond': rebuilt(0, (2, 2), (7, 1)),
    'a negative stride': rebuilt(7, (2,), (-1,)),
    'a negative size': rebuilt(0, (-1,)),
    'fewer strides': rebuilt(0, (2, 2)),
    'a size that is no number': rebuilt(0, ('x',)),
    'a size that is a tensor': rebuilt(0, torch.ones(2)),
    'no storage': rebuilt(storage=torch.ones(3)),
    'a storage alone': torch.arange(3.0).storage(),
    'a parameter of a parameter': Call(torch._utils._rebuild_parameter, [1], True, OrderedDict()),
    'another function for its class': Call(
        torch._tensor._rebuild_from_type_v2, torch.device, torch.Tensor, ('cpu',), {}
    ),
    'another class': Call(torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_tensor_v2, torch.Size, (), {}),
    'a set of one value without end': Call(set, huge),
    'a dict of one value without end': Call(OrderedDict, huge),
    'a size of one value without end': Call(torch.Size, huge),
    'a class in the data': torch.Tensor,
    'a function in the data': torch._utils._rebuild_tensor_v2,
}


@pytest.mark.parametrize('kind', CRAFTED)
@FORMATS
def test_a_crafted_tensor_is_refused(tmp_path, kind, new_format):
    with pytest.raises(UserError, match=r'x\.pth (holds more than tensors|is truncated or damaged)'):
        read_torch(saved(tmp_path / 'x.pth', dict(a=CRAFTED[kind]), new_format))


OPCODES = {
    'a number is set in a tensor': b'K\x00K\x01s',
    'a value is appended to a tensor': b'K\x00a',
    'values are appended to a tensor': b'(K\x00K\x01e',
    'values are set in a tensor': b'(K\x00K\x01u',
    'values are added to a tensor': b'(K\x00\x90',
    'a state of a tensor': b'}b',
    'a tensor is called': b')R',
    'a tensor is created anew': b')\x81',
}


@pytest.mark.parametrize('kind', OPCODES)
def test_a_pickle_changes_no_tensor(tmp_path, kind):
    """It would run the tensor's own methods: `t[i] = x` of two large indices takes all memory there is."""
    saved(tmp_path / 'x.pth', torch.ones(3))
    change = OPCODES[kind]
    rewritten(tmp_path / 'x.pth', lambda name, part: part[:-1] + change + b'.' if name.endswith('data.pkl') else part)
    with pytest.raises(UserError, match=r'holds more than tensors'):
        read_torch(tmp_path / 'x.pth')


@pytest.mark.parametrize('opcode', [pickle.OBJ, pickle.INST, pickle.NEWOBJ_EX])
def test_the_other_opcodes_that_call_are_unknown(tmp_path, opcode):
    saved(tmp_path / 'x.pth', {})
    part = b'\x80\x02(cbuiltins\nset\n' + opcode + (b'builtins\nset\n' if opcode == pickle.INST else b'') + b'.'
    rewritten(tmp_path / 'x.pth', lambda name, old: part if name.endswith('data.pkl') else old)
    with pytest.raises(UserError, match='is truncated or damaged: KeyError'):
        read_torch(tmp_path / 'x.pth')


def test_a_storage_that_claims_more_is_refused_before_it_takes_memory(tmp_path):
    path = saved(tmp_path / 'x.pth', dict(a=torch.zeros(1000)), False)
    few, many = (b'M' + (1000).to_bytes(2, 'little'), b'J' + (1 << 30).to_bytes(4, 'little'))
    assert path.read_bytes().count(few) == 2, 'of the storage and of the tensor'
    path.write_bytes(path.read_bytes().replace(few, many))
    with pytest.raises(UserError, match='its storages claim more bytes than it has'):
        read_torch(path)


@pytest.mark.parametrize(
    ('old', 'new'), [(b'storage', b'modules'), (b'FloatStorage', b'QInt8Storage'), (b'FloatStorage', b'LongStorage')]
)
@FORMATS
def test_another_storage_is_refused(tmp_path, old, new, new_format):
    path = saved(tmp_path / 'x.pth', dict(a=torch.zeros(1000)), new_format)
    if new_format:
        rewritten(path, lambda name, part: part.replace(old, new) if name.endswith('data.pkl') else part)
    else:
        path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UserError, match=r'x\.pth (holds more than tensors|is truncated or damaged)'):
        read_torch(path)


def test_numbers_of_another_processor_are_refused(tmp_path):
    path = saved(tmp_path / 'x.pth', dict(a=torch.zeros(10)))
    rewritten(path, lambda name, part: b'big' if name.endswith('byteorder') else part)
    with pytest.raises(UserError, match='byte order'):
        read_torch(path)
