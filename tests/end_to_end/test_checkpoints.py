"""tools/ as a user runs them, on checkpoints that are damaged, hostile or of another model."""

import io

import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from tests.helpers import ROOT
from tests.tools import FLOAT, TEST, TINY, TRAIN, W4A4, Payload, holds, weights

# ---- checkpoints ----------------------------------------------------------------------------------------------------


def old_format(value):
    """What torch.save wrote before version 1.6."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def cut(path, good, share):
    path.write_bytes(good.read_bytes()[: int(good.stat().st_size * share)])


CHECKPOINTS = {
    'missing': (lambda path, good: None, ['does not exist', 'near.pth']),
    'empty': (lambda path, good: path.touch(), ['is empty']),
    'half': (lambda path, good: cut(path, good, 0.5), ['damaged']),
    'almost whole': (lambda path, good: cut(path, good, 0.999), ['damaged']),
    'half in the old format': (lambda path, good: path.write_bytes(old_format(weights(good))[:9000]), ['damaged']),
    'a web page': (lambda path, good: path.write_text('<!DOCTYPE html><html>Not found</html>'), ['damaged']),
    'a list': (lambda path, good: torch.save([1, 2], path), ['list']),
    'a list as state': (lambda path, good: torch.save(dict(state_dict=[1, 2]), path), ['list']),
    'numbers as names': (lambda path, good: torch.save({3: torch.zeros(2)}, path), ['3']),
    'another model': (
        lambda path, good: torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), path),
        ['is of another model', '0 of 62 parameters', 'backbone.conv1.weight'],
    ),
    'code': (
        lambda path, good: torch.save(dict(state_dict=weights(good), more=Payload()), path),
        ['more than tensors', 'mkdir', '--unsafe-load'],
    ),
    'code in the old format': (
        lambda path, good: path.write_bytes(old_format(dict(state_dict=weights(good), more=Payload()))),
        ['more than tensors', 'mkdir', '--unsafe-load'],
    ),
}


@pytest.mark.parametrize('entry', ['test', 'load_from', 'resume'])
@pytest.mark.parametrize('kind', CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(home, error_of, trained, kind, entry):
    make, fragments = CHECKPOINTS[kind]
    make(home / 'given.pth', trained / 'epoch_1.pth')
    (home / 'near.pth').touch()
    command = {
        'test': (TEST, W4A4, 'given.pth', '--cfg-options', *TINY),
        'load_from': (TRAIN, W4A4, '--cfg-options', *TINY, 'load_from=given.pth'),
        'resume': (TRAIN, W4A4, '--resume', 'given.pth', '--cfg-options', *TINY),
    }
    holds(error_of(*command[entry]), 'given.pth', *fragments)
    assert not (home / 'executed').exists()


@pytest.mark.parametrize(
    ('tool', 'options'),
    [
        ('export.py', ['--out', 'exported']),
        ('analyze.py', []),
        ('calibrate.py', []),
        ('infer.py', ['data/digits/cls/test/3/00007.png', '--out', 'prediction.png']),
    ],
)
def test_code_in_a_checkpoint_is_refused_by_the_other_tools(home, error_of, trained, tool, options):
    make, fragments = CHECKPOINTS['code']
    make(home / 'given.pth', trained / 'epoch_1.pth')
    holds(error_of(ROOT / 'tools' / tool, W4A4, 'given.pth', *options), 'given.pth', *fragments)
    assert not (home / 'executed').exists()


def test_code_in_a_checkpoint_is_refused_by_the_python_api(home, trained, monkeypatch):
    make, _ = CHECKPOINTS['code']
    make(home / 'given.pth', trained / 'epoch_1.pth')
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=r'given\.pth holds more than tensors'):
        init_model(str(W4A4), 'given.pth')
    assert not (home / 'executed').exists()


def test_the_payload_runs_when_the_user_says_so(home, run, trained):
    """Otherwise the tests above would pass with a payload that does nothing."""
    torch.save(dict(state_dict=weights(trained / 'epoch_1.pth'), more=Payload()), home / 'given.pth')
    assert run(TEST, W4A4, 'given.pth', '--unsafe-load', '--cfg-options', *TINY).returncode == 0
    assert (home / 'executed').exists()


@pytest.mark.parametrize('new_format', [True, False])
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path, new_format):
    path = tmp_path / 'cut.pth'
    state = dict(state_dict=dict(a=torch.zeros(5), b=torch.zeros(3)), meta=dict(epoch=1))
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    whole = path.read_bytes()
    for size in range(1, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_checkpoint(str(path))


def test_a_float_checkpoint_with_a_quantized_config(home, error_of, run):
    assert run(TRAIN, FLOAT, '--work-dir', 'float', '--cfg-options', *TINY).returncode == 0
    message = error_of(TEST, W4A4, 'float/epoch_1.pth', '--cfg-options', *TINY)
    holds(message, 'backbone.conv1', 'no threshold', 'float checkpoint')
    message = error_of(TRAIN, W4A4, '--cfg-options', *TINY, 'load_from=float/epoch_1.pth', 'resume=True')
    holds(message, 'the model of the checkpoint is float', 'without resume')


def test_a_checkpoint_of_another_quantization(home, error_of, trained):
    more_bits = (*TINY, 'quantization.weight.bits=5')
    message = error_of(TEST, W4A4, trained / 'epoch_1.pth', '--cfg-options', *more_bits)
    holds(message, 'another quantization', 'quantization.weight.bits is 4 in the checkpoint and 5 in the config')
    holds(error_of(TEST, FLOAT, trained / 'epoch_1.pth', '--cfg-options', *TINY), 'another quantization')
