"""Crafted files at every door: the short form of tests/campaigns/doors.py."""

import pickle

import numpy as np
import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab import data_only as guard
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.campaigns.doors import CHECKPOINTS, COMMAND, DOORS, EXECUTED, GENUINE, PICKLES, Home, bring, with_meta

FEW = {
    'pth': ['code', 'code in the format of before torch 1.6', 'deflated', 'array: fields beyond the item'],
    'pkl': ['code, protocol 2', 'code, protocol 4', 'array: fields beyond the item'],
    'yml': ['YAML'],
    'json': ['code, protocol 2'],
    'npy': ['an array of objects'],
}
"""Suffix -> kinds that are tried at every door of it; the campaign tries all."""
UNGUARDED = (
    'init_cfg',
    'teacher_ckpt',
    *(name for name, (suffix, _) in DOORS.items() if suffix == 'pkl'),
)

LET_IN = ('load_from', '--resume', '--resume auto', 'init_model', 'init_cfg', 'tools/analyze.py')


@pytest.fixture(scope='module')
def home(digits_root, float_checkpoint, tmp_path_factory):
    return Home(tmp_path_factory.mktemp('doors'), digits_root, float_checkpoint)


@pytest.mark.parametrize('door', DOORS)
def test_nothing_in_a_file_runs_at_any_door(home, door):
    for kind in FEW[DOORS[door][0]]:
        write = {**CHECKPOINTS, **PICKLES}[kind]
        assert bring(home, door, write) != 'used', f'{kind} was let in'


@pytest.mark.parametrize('door', [name for name in UNGUARDED if 'prepare_data' not in name])
def test_the_libraries_would_run_it(home, door, monkeypatch):
    """Otherwise the test above would pass at a door that nothing enters."""
    monkeypatch.setattr(guard, '_active', True)  # as if it stood already
    suffix = DOORS[door][0]
    write = CHECKPOINTS['code'] if suffix == 'pth' else PICKLES['code, protocol 2']
    with pytest.raises(AssertionError, match='code ran'):
        bring(home, door, write)


@pytest.mark.parametrize(
    'door', ['load_from', '--resume', '--resume auto', 'init_model', 'init_cfg', 'tools/analyze.py']
)
@pytest.mark.parametrize('kind', GENUINE)
def test_a_genuine_checkpoint_is_let_in(home, door, kind):
    """That of a training under NumPy 1 too."""
    assert bring(home, door, GENUINE[kind]) == 'used'


def test_the_config_in_a_checkpoint_is_never_parsed_when_it_is_resumed(home, tmp_path, monkeypatch):
    """mmengine's Runner.resume parses it as Python; all else in the file is plain."""
    monkeypatch.chdir(tmp_path)
    torch.save(with_meta(home.checkpoint, config=COMMAND, cfg=COMMAND), 'given.pth')
    for load in (dict(load_from='given.pth', resume=True), dict(load_from='given.pth', resume=True, unsafe_load=True)):
        runner = QuantRunner.from_cfg(home.config(**load))
        runner.train()
        assert runner.iter == read_checkpoint('given.pth')['meta']['iter'], 'it was resumed'
    assert not (tmp_path / EXECUTED).exists()


def test_plain_annotations_and_weights_in_a_pickle_are_used(home):
    """As mmengine.dump writes them."""

    def annotations(path, base):
        picture = next((home.data / 'cls/train').rglob('*.png'))
        data = [dict(img_path=str(picture), gt_label=[1])]
        path.write_bytes(pickle.dumps(dict(metainfo=dict(classes=['a', 'b']), data_list=data), 2))

    assert bring(home, 'ann_file of MultiLabelDataset', annotations) == 'used'
    assert bring(home, 'class_weight', lambda path, base: path.write_bytes(pickle.dumps(np.ones(3)))) == 'used'
    assert bring(home, 'class_weight, YAML', lambda path, base: path.write_text('[1.0, 2.0]')) == 'used'


def test_an_outer_guard_ends_with_its_block_alone(tmp_path):
    before = torch.load
    with guard.data_only():
        with guard.data_only():
            pass
        assert torch.load is not before
        tensor = torch.arange(3)
        assert torch.equal(torch.load(_saved(tmp_path, tensor)), tensor)
    assert torch.load is before
    with pytest.raises(UserError), guard.data_only():
        raise UserError('an end')
    assert torch.load is before


def _saved(folder, value):
    torch.save(value, folder / 'x.pth')
    return folder / 'x.pth'


def test_another_runner_is_refused_as_it_runs_what_files_hold(home):
    message = bring(home, 'runner_type', GENUINE['genuine'])
    assert "runner_type='Runner'" in message and '--unsafe-load' in message
