"""Reading checkpoints that are damaged, hostile or of another model."""

import copy
import http.server
import os
import pickle
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmdet.models import FCOSHead
from mmengine.logging import HistoryBuffer
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmpretrain.models import VisionTransformer

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.checkpoints import checkpoint_digest, read_checkpoint
from gdrq_mm.openmmlab.weights import check_fits, load_weights, other_quantization, renamed, without_quantizers
from tests.campaigns.fuzz import Checkpoints, attack
from tests.helpers import same


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def payload(tmp_path):
    """Creates the folder `executed`."""
    return Payload(os.system, f'mkdir {tmp_path / "executed"}')


def refusal(path):
    """The message with which a file is refused: one line that names the file."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(str(path))
    message = str(caught.value)
    assert str(path) in message and '\n' not in message
    return message


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_training_checkpoint_of_mmengine_is_read_whole(float_checkpoint):
    found = read_checkpoint(float_checkpoint)
    expected = torch.load(float_checkpoint, weights_only=False)
    for part in ('state_dict', 'optimizer', 'param_schedulers', 'meta'):
        assert same(found[part], expected[part])
    losses = found['message_hub']['log_scalars']['train/loss']
    assert isinstance(losses, HistoryBuffer) and losses.mean() > 0
    assert losses.current() == expected['message_hub']['log_scalars']['train/loss'].current()


def test_a_missing_file_names_its_neighbours(tmp_path):
    for number in range(7):
        (tmp_path / f'epoch_{number}.pth').touch()
    message = refusal(tmp_path / 'epoch_9.pth')
    assert 'does not exist' in message and 'epoch_0.pth, ' in message and 'epoch_4.pth' in message
    assert 'epoch_5.pth' not in message, 'five are enough'
    assert refusal(tmp_path / 'nowhere' / 'epoch_9.pth').endswith('does not exist')


@pytest.mark.parametrize(
    ('name', 'kind'), [('model.safetensors', 'a safetensors file'), ('model.onnx', 'an ONNX graph')]
)
def test_a_file_of_another_kind_is_called_so(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b'\x08\0\0\0\0\0\0\0{}      ')
    assert f'{name} is {kind}' in refusal(tmp_path / name)


def test_a_file_that_is_cut_is_refused(tmp_path, float_checkpoint):
    path = tmp_path / 'cut.pth'
    with open(float_checkpoint, 'rb') as file:
        whole = file.read()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert ('is truncated or damaged' if share else 'is empty') in refusal(path)


def test_no_flipped_bit_goes_unseen(tmp_path):
    """A file with one wrong bit is refused, or the bit is in the padding and what is read is right."""
    path = tmp_path / 'flipped.pth'
    state = dict(state_dict={'weight': torch.randn(40, 10), 'bias': torch.randn(40)}, meta=dict(epoch=3))
    torch.save(state, path)
    whole = path.read_bytes()
    refused = 0
    positions = np.random.default_rng(0).integers(0, len(whole), 200)
    for position in (*positions, whole.index(state['state_dict']['weight'].numpy().tobytes()) + 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            assert same(read_checkpoint(str(path)), state)
        except UserError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(
    ('write', 'reason'),
    [
        (lambda path: path.write_text('epoch: 3\nloss: 0.1\n'), 'is truncated or damaged'),
        (lambda path: path.write_text('# A text'), 'damaged: it cannot be read as tensors and plain data'),
        (lambda path: path.write_bytes(bytes(1000)), 'is truncated or damaged'),
        (lambda path: path.write_bytes(pickle.dumps({'weight': 1})[:-3]), 'is truncated or damaged'),
        (lambda path: torch.save([torch.zeros(2)], path), 'holds a list, not a dict'),
        (lambda path: torch.save(torch.zeros(2), path), 'holds a Tensor, not a dict'),
        (lambda path: torch.save(dict(state_dict=None), path), 'holds a NoneType, not a dict'),
        (lambda path: torch.save({0: torch.zeros(2)}, path), 'the name 0'),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(tmp_path, write, reason):
    path = tmp_path / 'other.pth'
    write(path)
    assert reason in refusal(path)


def test_code_in_a_checkpoint_does_not_run_unless_the_user_says_so(tmp_path, float_checkpoint, payload):
    """Alone, in a training checkpoint with all that such a file may hold, and in the format before torch 1.6."""
    path = tmp_path / 'code.pth'
    training = read_checkpoint(float_checkpoint)
    hidden = HistoryBuffer([0.5], [1])
    hidden.note = payload
    for value in (
        payload,
        dict(state_dict={**training['state_dict'], 'more': payload}),
        {**training, 'message_hub': {**training['message_hub'], 'resumed_keys': payload}},
        {**training, 'message_hub': dict(log_scalars={'train/loss': hidden})},
    ):
        for new_format in (True, False):
            torch.save(value, path, _use_new_zipfile_serialization=new_format)
            message = refusal(path)
            assert 'more than tensors' in message and 'system' in message and '--unsafe-load' in message
            path.write_bytes(pickle.dumps(value))
            refusal(path)
    torch.save(np.array([payload], dtype=object), path)
    refusal(path)
    assert not (tmp_path / 'executed').exists()
    torch.save({**training, 'more': payload}, path)
    assert same(read_checkpoint(str(path), unsafe=True)['state_dict'], training['state_dict'])
    assert (tmp_path / 'executed').exists()


def test_an_array_of_objects_is_refused_and_an_empty_one_is_data(tmp_path):
    """`meta['dataset_meta']` of a checkpoint may hold arrays."""
    torch.save(dict(state_dict={}, meta=dict(names=np.array(['cat', 'dog'], dtype=object))), tmp_path / 'objects.pth')
    assert 'more than tensors' in refusal(tmp_path / 'objects.pth')
    torch.save(dict(state_dict={}, meta=dict(palette=np.zeros((0, 3)))), tmp_path / 'empty.pth')
    assert read_checkpoint(str(tmp_path / 'empty.pth'))['meta']['palette'].shape == (0, 3)


@pytest.mark.parametrize('args', [(HistoryBuffer, '__init__'), (HistoryBuffer, 'data'), (dict, 'pop'), (os, 'system')])
def test_getattr_reaches_the_statistics_of_a_history_only(tmp_path, args):
    """A genuine checkpoint needs `getattr(HistoryBuffer, 'mean')`; any other use of it is refused."""
    torch.save(dict(state_dict={}, more=Payload(getattr, HistoryBuffer, 'mean')), tmp_path / 'good.pth')
    assert read_checkpoint(str(tmp_path / 'good.pth'))['more'] is HistoryBuffer.mean
    if args[0] is os:
        args = (Payload(__import__, 'os'), 'system')
    torch.save(dict(state_dict={}, more=Payload(getattr, *args)), tmp_path / 'bad.pth')
    assert 'more than tensors' in refusal(tmp_path / 'bad.pth')


SCHEDULERS = {
    'ConstantLR': dict(factor=0.5, end=3),
    'CosineAnnealingLR': dict(T_max=6),
    'CosineRestartLR': dict(periods=[2, 4], restart_weights=[1, 0.5], eta_min=0.0),
    'ExponentialLR': dict(gamma=0.9),
    'LinearLR': dict(start_factor=0.1, end=4),
    'MultiStepLR': dict(milestones=[2, 4, 4], gamma=0.1),
    'OneCycleLR': dict(eta_max=0.2, total_steps=7),
    'PolyLR': dict(power=0.9, end=6),
    'QuadraticWarmupLR': dict(end=4),
    'StepLR': dict(step_size=2, gamma=0.1),
}


@pytest.mark.parametrize('kind', SCHEDULERS)
def test_each_scheduler_goes_on_from_a_checkpoint(tmp_path, kind):
    """Those of mmdet and mmpretrain too; MultiStepLR is mmdet's 1x schedule."""

    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        settings = dict(type=kind, optimizer=optimizer, by_epoch=True, **copy.deepcopy(SCHEDULERS[kind]))
        with DefaultScope.overwrite_default_scope('mmdet'):
            return optimizer, PARAM_SCHEDULERS.build(settings)

    def rates(optimizer, scheduler, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]['lr'])
        return found

    optimizer, scheduler = make()
    rates(optimizer, scheduler, 3)
    torch.save(dict(state_dict={}, rate=scheduler.state_dict(), optimizer=optimizer.state_dict()), tmp_path / 'x.pth')
    expected = rates(optimizer, scheduler, 3)
    found = read_checkpoint(str(tmp_path / 'x.pth'))
    optimizer, scheduler = make()
    optimizer.load_state_dict(found['optimizer'])
    scheduler.load_state_dict(found['rate'])
    assert rates(optimizer, scheduler, 3) == expected


def test_no_registered_scheduler_is_left_out():
    registered = {name for name in PARAM_SCHEDULERS.module_dict if name.endswith('LR')}
    assert registered - {'ReduceOnPlateauLR'} <= set(SCHEDULERS)


@pytest.mark.parametrize('counts', [{2: 10**12}, {2: -1}, {2: 1.5}, [2, 2]])
def test_counts_that_would_not_end_are_refused(tmp_path, counts):
    torch.save(dict(state_dict={}, rate=Payload(Counter, counts)), tmp_path / 'bad.pth')
    assert 'counts of a Counter' in refusal(tmp_path / 'bad.pth')


def test_an_address_is_read_as_a_file_is(tmp_path, float_checkpoint, payload):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    torch.save(payload, tmp_path / 'code.pth')
    torch.save(read_checkpoint(float_checkpoint)['state_dict'], tmp_path / 'good.pth')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f'http://127.0.0.1:{server.server_port}'
        assert same(read_checkpoint(f'{address}/good.pth'), read_checkpoint(float_checkpoint)['state_dict'])
        assert checkpoint_digest(f'{address}/good.pth') == checkpoint_digest(str(tmp_path / 'good.pth'))
        assert 'more than tensors' in refusal(f'{address}/code.pth')
        assert not (tmp_path / 'executed').exists()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize('address', ['http://127.0.0.1:9/x.pth', 'torchvision://resnet18', 'nonsense://x.pth'])
def test_an_address_without_a_checkpoint_is_refused(address):
    assert 'cannot be fetched' in refusal(address)


# ---- does it fit the model ------------------------------------------------------------------------------------------


def network(**quantization):
    """conv, norm, conv; quantized if options are given."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False))
    if quantization:
        quantize_model(model, Quantization.from_dict(quantization))
    return model


LEARNED = dict(weight=dict(bits=3, method='lsq'))


def test_a_checkpoint_fits_by_name_and_shape():
    """Five parameters: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight."""
    state = network().state_dict()
    for found in (state, dict(state_dict=state), dict(state_dict={f'module.{k}': v for k, v in state.items()})):
        check_fits(network(), found, 'x.pth', share=1.0)
    check_fits(network(**LEARNED), state, 'x.pth', share=1.0)  # a float checkpoint has no learned steps
    del state['1.bias']
    state['2.weight'] = torch.zeros(4, 8, 3, 3)
    check_fits(network(), state, 'x.pth', share=0.6)
    with pytest.raises(UserError, match=r'x\.pth is of another model: 3 of 5 parameters .*first .* is 1\.bias$'):
        check_fits(network(), state, 'x.pth', share=0.61)
    with pytest.raises(UserError, match=r'0 of 5 parameters .* is 0\.weight$'):
        check_fits(network(), dict.fromkeys(state, 1), 'x.pth', share=0.5)


BN = dict(type='BN')


def old_fcos():
    """mmdet renames the last layers of its first heads while it loads them."""
    model = nn.Module()
    with DefaultScope.overwrite_default_scope('mmdet'):  # of its losses
        model.bbox_head = FCOSHead(num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1, norm_cfg=BN)
    names = {'conv_cls': 'fcos_cls', 'conv_reg': 'fcos_reg', 'conv_centerness': 'fcos_centerness'}
    state = {n: torch.rand_like(v) if v.is_floating_point() else v for n, v in model.state_dict().items()}
    patterns = [(rf'\.{new}\.', f'.{old}.') for new, old in names.items()]
    return model, dict(state_dict=dict(renamed(state, patterns))), state


def larger_pictures():
    """mmpretrain resizes the position embeddings."""
    sizes = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)
    small, large = (VisionTransformer(arch=sizes, img_size=size, patch_size=16) for size in (32, 64))
    state = small.state_dict()
    return large, dict(state_dict=state), {n: v for n, v in state.items() if n != 'pos_embed'}


@pytest.mark.parametrize('made', [old_fcos, larger_pictures])
@pytest.mark.parametrize('use', ['test', 'start'])
def test_a_checkpoint_that_the_library_converts_is_loaded(made, use):
    model, checkpoint, expected = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_fits(model, checkpoint, 'x.pth', share=1.0)
    assert same(dict(model.state_dict()), before)
    load_weights(model, checkpoint, 'x.pth', None, use=use)
    assert same({name: value for name, value in model.state_dict().items() if name in expected}, dict(expected))
    with pytest.raises(UserError, match='of another model: 0 of'):
        check_fits(model, dict(state_dict=network().state_dict()), 'x.pth', share=0.5)


FOUR = dict(weight=dict(bits=4, groups=2), activation=dict(bits=4), first_last_bits=4)


@pytest.mark.parametrize(
    ('theirs', 'ours', 'reason'),
    [
        ({}, FOUR, ''),
        (FOUR, FOUR, ''),
        (FOUR, {**FOUR, 'first_last_bits': 3}, '0.weight_quant has 4 bits in the checkpoint and 3 in the config'),
        (
            FOUR,
            {**FOUR, 'weight': dict(bits=4, groups=4)},
            '0.weight_quant.threshold has shape (2,) in the checkpoint, (4,) in the config',
        ),
        (FOUR, {**FOUR, 'skip': ['2']}, '2.own_input_quant.k is in the checkpoint only'),
        ({**FOUR, 'skip': ['0']}, FOUR, '0.own_input_quant.k is in the config only'),
        (FOUR, {}, 'this config quantizes nothing'),
    ],
)
def test_thresholds_of_another_quantization_are_recognized(theirs, ours, reason):
    state = network(**theirs).state_dict()
    for found in (state, dict(state_dict={f'module.{name}': value for name, value in state.items()})):
        assert other_quantization(network(**ours), found, ours or None) == reason


def test_a_checkpoint_without_its_quantizers_is_that_of_the_float_model():
    quantized = network(**LEARNED)
    for found in (quantized.state_dict(), dict(state_dict=quantized.state_dict(), meta=dict(epoch=3))):
        bare = without_quantizers(found)
        assert bare.get('meta') == found.get('meta')
        model = network()
        model.load_state_dict(bare['state_dict'], strict=True)
        assert torch.equal(model[0].weight, quantized[0].weight)
        assert other_quantization(model, bare, None) == ''


def test_a_new_head_starts_with_a_step_of_its_own():
    """The weight of a head with other classes is not in the checkpoint, so its learned step does not belong to it."""
    learned = dict(LEARNED, first_last_bits=4)
    old, new = network(**learned), network(**learned)
    for layer in (old[0], old[2]):
        layer.weight_quant.start(layer.weight.detach() * 100)
    state = old.state_dict()
    state['2.weight'] = torch.rand(7, 8, 1, 1)
    load_weights(new, dict(state_dict=state), 'x.pth', learned, share=0.5, use='start')
    assert new[0].weight_quant.calibrated and same(new[0].weight_quant.state_dict(), old[0].weight_quant.state_dict())
    assert not new[2].weight_quant.calibrated


# ---- damaged at random: the short form of tests/campaigns/fuzz.py ----------------------------------------------------


@pytest.mark.parametrize('kind', ['bytes', 'crafted', 'changed'])
def test_a_mutated_checkpoint_is_used_or_refused_in_one_line(tmp_path, kind):
    """Its bytes; its pickle, its tensors and the format before torch 1.6; data of a whole file."""
    ends, crashes = attack(kind, getattr(Checkpoints(tmp_path), kind), 150, seed=0)
    assert crashes == [] and ends['refused'] > 20


@pytest.mark.parametrize('value', [torch.tensor([9, 1, 0, 7, 4], dtype=torch.int32), torch.zeros(0), 'x', 4.0])
def test_what_no_quantizer_writes_is_refused(value):
    model = network(**FOUR)
    state = {**model.state_dict(), '0.weight_quant.state': value}
    with pytest.raises(UserError, match=r'checkpoint x\.pth is damaged: 0\.weight_quant\.state is'):
        load_weights(model, dict(state_dict=state), 'x.pth', None)
