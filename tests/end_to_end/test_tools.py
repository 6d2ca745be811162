"""tools/ as a user runs them: a mistake ends in one clear line, and what succeeds writes what it promises."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import cifar10, digits
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.report.record import MAIN_METRICS
from tests.helpers import ENV, same

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST, PREPARE = (ROOT / 'tools' / name for name in ('train.py', 'test.py', 'prepare_data.py'))
FLOAT = ROOT / 'configs/cls/resnet18_width16_digits.py'
W4A4 = ROOT / 'configs/cls/resnet18_width16_gdrq_w4a4_digits.py'
TINY = (
    'train_dataloader.dataset.indices=24',  # the first 24 pictures of the training set: three iterations
    'train_dataloader.batch_size=8',
    'val_dataloader.dataset.indices=8',
    'test_dataloader.dataset.indices=8',
    'train_cfg.max_epochs=1',
    'load_from=None',
)


@pytest.fixture
def error_of(run, tmp_path):
    """Runs a tool that has to fail; returns its one line. Besides logs it may write nothing."""

    def error_of(tool, *args):
        before = set(tmp_path.rglob('*'))
        done = run(tool, *args)
        assert done.returncode != 0
        assert 'Traceback' not in done.stdout + done.stderr, done.stderr
        assert done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1, done.stderr
        new = [p for p in tmp_path.rglob('*') if p.is_file() and p not in before]
        assert [p for p in new if p.suffix not in ('.log', '.json', '.py') or p.name == 'record.json'] == []
        return done.stderr

    return error_of


@pytest.fixture(scope='session')
def data(tmp_path_factory, run_in):
    """The folder that holds data/digits."""
    folder = tmp_path_factory.mktemp('digits')
    (done,) = run_in(folder, [{}], PREPARE, 'digits')
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def home(tmp_path, data):
    """tmp_path with the digits."""
    (tmp_path / 'data').symlink_to(data / 'data')
    return tmp_path


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data):
    """Work directory of a quantized model, trained by tools/train.py for an epoch."""
    folder = tmp_path_factory.mktemp('trained')
    command = [sys.executable, TRAIN, W4A4, '--work-dir', folder, '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=data, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    return folder


@pytest.fixture
def leaf(tmp_path):
    """Writes a config that inherits the W4A4 one."""

    def leaf(text):
        path = tmp_path / 'leaf.py'
        path.write_text(f'_base_ = {str(W4A4)!r}\n{text}\n')
        return path

    return leaf


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def holds(message, *fragments):
    assert [f for f in fragments if f not in message] == [], message


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('quantization', 'fragments'),
    [
        ('dict(wieght=dict(bits=4))', ["quantization has no key 'wieght'", "did you mean 'weight'"]),
        ('dict(weight=dict(bit=4))', ["quantization.weight has no key 'bit'", "did you mean 'bits'"]),
        ('dict(weight=dict(method="gdqr"))', ["quantization.weight.method='gdqr'", "did you mean 'gdrq'"]),
        ('dict(weight=dict(bits=9))', ['quantization.weight.bits=9', '2 to 8']),
        ('dict(activation=dict(bits=1))', ['quantization.activation.bits=1', '2 to 8']),
        ('dict(first_last_bits=0)', ['quantization.first_last_bits=0', '2 to 8']),
        ('dict(weight=dict(groups=0))', ['quantization.weight.groups=0', "'channel'"]),
        ('dict(skip=["backbone.conv9"])', ["skip: the pattern 'backbone.conv9'", 'nearest: backbone.conv1']),
        ('dict(overrides={"head.fx": dict(weight=dict(bits=8))})', ["overrides: the pattern 'head.fx'", 'head.fc']),
    ],
)
def test_a_wrong_quantization_dict(home, error_of, leaf, quantization, fragments):
    config = leaf(f'quantization = {quantization}')
    holds(error_of(TRAIN, config, '--cfg-options', *TINY), *fragments)


@pytest.mark.parametrize(
    ('text', 'fragments'),
    [
        ('model = dict(', ['wrong.py', 'SyntaxError', 'line 1']),
        ('depth = 1 / 0', ['wrong.py', 'ZeroDivisionError']),
        ("_base_ = 'nothing.py'", ['wrong.py', 'nothing.py']),
        ("_base_ = 'mmpretrain::resnet/nothing.py'", ['wrong.py', 'nothing.py']),
        ('depth = 18', ['model']),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, error_of, text, fragments):
    (tmp_path / 'wrong.py').write_text(text)
    holds(error_of(TRAIN, 'wrong.py'), *fragments)


def test_a_config_that_does_not_exist(tmp_path, error_of):
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'resnet18_w4a4.py').write_text('depth = 18')
    message = 'does not exist; nearest: configs/resnet18_w4a4.py'
    for given in ('configs/resnet18_w4a5.py', 'config/resnet18_w4a4.py', 'resnet18_w4a4.py'):
        holds(error_of(TRAIN, given), f'config {given} {message}')
        holds(error_of(TEST, given, 'epoch_1.pth'), f'config {given} {message}')


@pytest.mark.parametrize(
    ('option', 'fragments'),
    [
        ('quantization.weight.bits=four', ["quantization.weight.bits='four'", '2 to 8']),
        ('quantization=4', ['quantization=4 is not a dict']),
        ('quantization.weight.bits', ['quantization.weight.bits', 'key=value']),
        ('quantization.weight.bits.x=1', ['bits']),
        ('model.type=ImageClasifier', ['ImageClasifier']),
        ('model.backbone.type=ResNet_CIFARR', ['ResNet_CIFARR']),
        ('model.backbone.depthh=18', ['depthh']),
        ('train_dataloader.dataset.type=CustomDataSet', ['CustomDataSet']),
        ('train_dataloader.dataset.pipeline.0.type=LoadImage', ['LoadImage']),
        ('optim_wrapper.optimizer.type=SDG', ['SDG']),
        ('val_evaluator.type=Acuracy', ['Acuracy']),
        ('runner_type=QuantRuner', ['QuantRuner']),
        ('runner_type=FlexibleRunner', ['FlexibleRunner', 'ignore', 'QuantRunner']),
        ('param_scheduler.type=CosineAnealingLR', ['CosineAnealingLR']),
        ('train_cfg.max_epochs=0', ['end=0']),
        ('model=[]', ['has no model']),
        ('x=[1,2', ['--cfg-options', 'x=[1,2', 'brackets']),
        ('a b=1', ['a b=1', 'key=value']),
        ('a..b=1', ['a..b=1', 'key=value']),
        ('train_dataloader=5', ['train_dataloader cannot be read']),
        ('train_dataloader.dataset.datasets=3', ['train_dataloader cannot be read']),
        ('train_dataloader.dataset.data_root=7', ['train_dataloader', 'data folder 7 does not exist']),
        ('auto_scale_lr=3', ['auto_scale_lr=3 is not a dict']),
        ('quantisation.weight.bits=5', ['quantisation', "did you mean 'quantization'"]),
        ('load_form=epoch_1.pth', ['load_form', "did you mean 'load_from'"]),
        ('memory_format=channel_last', ['memory_format', 'channel_last', 'channels_last']),
    ],
)
def test_a_wrong_option(home, error_of, option, fragments):
    holds(error_of(TRAIN, W4A4, '--cfg-options', *TINY, option), *fragments)


@pytest.mark.parametrize(
    ('tool', 'options', 'fragments'),
    [
        (TRAIN, ['--cfg-options', 'work_dir=4'], ['work_dir=4 is not a path']),
        (TRAIN, ['--amp', '--cfg-options', 'default_scope=[]'], ['default_scope=[]', 'mmpretrain']),
        (TRAIN, ['--amp', '--cfg-options', 'optim_wrapper=None'], ['the config cannot be used']),
        (TRAIN, ['--resume', '--cfg-options', 'default_hooks.checkpoint=3'], ['default_hooks.checkpoint cannot be']),
        (
            TEST,
            ['x.pth', '--tta', '--cfg-options', 'test_dataloader.dataset.pipeline=3'],
            ['the config cannot be used'],
        ),
    ],
)
def test_a_config_that_an_option_cannot_change(home, error_of, tool, options, fragments):
    holds(error_of(tool, W4A4, *options), *fragments)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Payload:
    """Creates a file called 'executed' when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('executed',)


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


def test_a_checkpoint_of_another_quantization(home, error_of, trained):
    more_bits = (*TINY, 'quantization.weight.bits=5')
    message = error_of(TEST, W4A4, trained / 'epoch_1.pth', '--cfg-options', *more_bits)
    holds(message, 'another quantization', '4 bits in the checkpoint and 5 in the config')
    holds(error_of(TEST, FLOAT, trained / 'epoch_1.pth', '--cfg-options', *TINY), 'another quantization')


# ---- data, folders, outputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'fragments'),
    [
        ('resnet18_width16_gdrq_w4a4_digits.py', ['data/digits/cls', 'python tools/prepare_data.py digits']),
        (
            'resnet18_width16_gdrq_w4a4_cifar10.py',
            ['data/cifar10', 'python tools/prepare_data.py cifar10 --source PATH'],
        ),
        ('resnet18_gdrq_w4a4.py', ['data/imagenet']),
    ],
)
def test_missing_data(error_of, tmp_path, config, fragments):
    holds(error_of(TRAIN, ROOT / 'configs/cls' / config), 'train_dataloader', 'does not exist', *fragments)
    assert not (tmp_path / 'work_dirs').exists()


def test_a_data_folder_without_pictures(tmp_path, error_of):
    (tmp_path / 'data/digits/cls/train').mkdir(parents=True)
    holds(error_of(TRAIN, W4A4, '--cfg-options', *TINY), 'dataloader: the data set cannot be read', 'data/digits/cls')


@pytest.mark.parametrize('folder', ['occupied', 'occupied/below'])
def test_a_work_directory_that_cannot_be_written(home, error_of, folder):
    (home / 'occupied').write_text('mine')
    message = f'work directory {folder} cannot be written'
    holds(error_of(TRAIN, W4A4, '--work-dir', folder, '--cfg-options', *TINY), message)
    holds(error_of(TEST, W4A4, 'x.pth', '--work-dir', folder, '--cfg-options', *TINY), message)
    assert (home / 'occupied').read_text() == 'mine'


@pytest.mark.parametrize('record', ['folder', 'occupied/record.json'])
def test_a_record_that_cannot_be_written(home, error_of, trained, record):
    (home / 'folder').mkdir()
    (home / 'occupied').touch()
    options = ('--record', record, '--cfg-options', *TINY)
    holds(error_of(TEST, W4A4, trained / 'epoch_1.pth', *options), record.split('/')[0], 'cannot be written')


@pytest.mark.parametrize(
    ('options', 'fragments'),
    [
        (['--out', 'predictions.txt'], ['--out predictions.txt', '.pkl']),
        (['--tta', '--show-dir', 'shown'], ['--tta', '--show-dir']),
    ],
)
def test_options_that_do_not_go_together(home, error_of, trained, options, fragments):
    command = (TEST, W4A4, trained / 'epoch_1.pth', *options, '--cfg-options', *TINY)
    holds(error_of(*command), *fragments)


@pytest.mark.parametrize(
    ('packages', 'fragments'),
    [
        ({'mmcv': '2.1.0', 'mmdet': '3.3.0'}, ['mmcv 2.1.0, mmdet 3.3.0', 'pip uninstall mmcv mmdet']),
        ({'transformers': '5.17.0'}, ['transformers 5.17.0', 'pip uninstall transformers']),
    ],
)
def test_packages_that_break_openmmlab(home, tmp_path, packages, fragments):
    for name, version in packages.items():
        folder = tmp_path / f'{name}-{version}.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    path = os.pathsep.join([str(tmp_path), *filter(None, [ENV.get('PYTHONPATH')])])
    env = {**ENV, 'PYTHONPATH': path}
    command = [sys.executable, TRAIN, W4A4, '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    holds(done.stderr, 'error: ', *fragments)
    assert len(done.stderr.splitlines()) == 1


# ---- a loss that is not finite --------------------------------------------------------------------------------------


def finite(path):
    return all(torch.isfinite(value.float()).all() for value in weights(path).values())


@pytest.mark.parametrize('lr', ['1e12', '1e30'])
@pytest.mark.parametrize('config', [FLOAT, W4A4])
def test_a_loss_that_diverges_leaves_only_finite_checkpoints(home, run, config, lr):
    epochs = ('train_cfg.max_epochs=3', f'optim_wrapper.optimizer.lr={lr}')
    done = run(TRAIN, config, '--work-dir', 'work', '--cfg-options', *TINY, *epochs)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    holds(done.stderr, 'error: ', 'training stops')
    written = sorted((home / 'work').glob('*.pth'))
    assert [path.name for path in written if not finite(path)] == []
    holds(done.stderr, 'the last good checkpoint is' if written else 'no checkpoint had been written')


def test_a_diverging_run_keeps_the_last_good_checkpoint(home, run, trained):
    shutil.copytree(trained, home / 'work')
    (home / 'work' / 'last_checkpoint').write_text(str(home / 'work' / 'epoch_1.pth'))
    state = torch.load(home / 'work' / 'epoch_1.pth', weights_only=False)
    for group in state['optimizer']['param_groups']:
        group['lr'] = group['initial_lr'] = 1e30
    torch.save(state, home / 'work' / 'epoch_1.pth')
    before = (home / 'work' / 'epoch_1.pth').read_bytes()
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--resume', '--cfg-options', *TINY, 'train_cfg.max_epochs=2')
    assert done.returncode == 1
    holds(
        done.stderr,
        'has values that are not finite after iteration',
        f'the last good checkpoint is {home}/work/epoch_1.pth',
    )
    assert [p.name for p in (home / 'work').glob('*.pth')] == ['epoch_1.pth']
    assert (home / 'work' / 'epoch_1.pth').read_bytes() == before


def test_a_parameter_that_is_not_a_number(home, error_of, trained):
    state = weights(trained / 'epoch_1.pth')
    state['backbone.layer1.0.conv1.weight'][0] = float('nan')
    torch.save(dict(state_dict=state), home / 'nan.pth')
    for command in ((TRAIN, W4A4), (TEST, W4A4, 'nan.pth')):
        message = error_of(*command, '--cfg-options', *TINY, 'load_from=nan.pth')
        holds(message, 'nan.pth has NaN', 'in backbone.layer1.0.conv1.weight')


def test_a_model_whose_layers_do_not_fit(home, error_of):
    message = error_of(TRAIN, W4A4, '--cfg-options', *TINY, 'model.head.in_channels=77')
    holds(message, 'the model cannot be built', '1x128 and 77x10')


def test_a_launcher_without_its_processes(home, error_of):
    holds(error_of(TRAIN, W4A4, '--launcher', 'pytorch'), '--launcher pytorch', 'torchrun', 'tools/dist_train.sh')
    holds(error_of(TRAIN, W4A4, '--launcher', 'slurm'), '--launcher slurm', 'srun', 'tools/slurm_train.sh')


# ---- what succeeds --------------------------------------------------------------------------------------------------


def test_training_writes_checkpoints_config_and_layer_table(trained):
    assert (trained / 'last_checkpoint').read_text() == str(trained / 'epoch_1.pth')
    assert (trained / W4A4.name).is_file()
    state = weights(trained / 'epoch_1.pth')
    assert int(state['backbone.layer1.0.conv1.weight_quant.state'][-1]) == 4
    (log,) = trained.glob('*/*.log')
    holds(log.read_text(), 'backbone.layer1.0.conv1', '699,056 of 701,466 parameters quantized', 'Epoch(val) [1]')


def test_testing_writes_a_record_and_predictions(home, trained):
    """As a user runs it, in a process of its own; nothing is on stderr."""
    checkpoint = trained / 'epoch_1.pth'
    command = [sys.executable, TEST, W4A4, checkpoint, '--out', 'predictions.pkl', '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=home, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    record = json.loads((home / 'work_dirs' / W4A4.stem / 'record.json').read_text())
    assert 0 <= record['metrics']['accuracy/top1'] <= 100
    assert (record['task'], record['model']['bits'], record['data']['name']) == ('cls', [4, 4], 'digits/cls')
    predictions = pickle.loads((home / 'predictions.pkl').read_bytes())
    assert [int(p['pred_score'].numel()) for p in predictions] == [10] * 8
    right = sum(int(p['pred_label']) == int(p['gt_label']) for p in predictions)
    assert record['metrics']['accuracy/top1'] == pytest.approx(100 * right / 8)


def test_a_record_goes_where_the_user_says(home, run, trained):
    options = ('--work-dir', 'work', '--record', 'records/first.json', '--cfg-options', *TINY)
    assert run(TEST, W4A4, trained / 'epoch_1.pth', *options).returncode == 0
    assert json.loads((home / 'records/first.json').read_text())['quantization']['weight']['bits'] == 4
    assert not (home / 'work/record.json').exists()


def test_predictions_are_drawn(home, run, trained):
    options = ('--work-dir', 'work', '--show-dir', 'shown', '--cfg-options', *TINY)
    assert run(TEST, W4A4, trained / 'epoch_1.pth', *options).returncode == 0
    pictures = [cv2.imread(str(path)) for path in (home / 'shown').rglob('*.png')]
    assert len(pictures) == 8 and all(picture is not None for picture in pictures)


def test_test_time_augmentation_changes_the_scores(home, run, trained):
    for name, options in (('plain', ()), ('tta', ('--tta',))):
        command = (TEST, W4A4, trained / 'epoch_1.pth', '--work-dir', name, '--out', f'{name}.pkl', *options)
        done = run(*command, '--cfg-options', *TINY)
        assert done.returncode == 0, done.stderr
    plain, tta = (pickle.loads((home / f'{name}.pkl').read_bytes()) for name in ('plain', 'tta'))
    assert len(plain) == len(tta) == 8
    assert not torch.equal(plain[0]['pred_score'], tta[0]['pred_score'])


def test_resuming_continues_as_if_nothing_had_happened(home, run):
    command = (TRAIN, W4A4, '--cfg-options', *TINY, 'train_cfg.max_epochs=2')
    assert run(*command, '--work-dir', 'whole').returncode == 0
    (home / 'work').mkdir()
    shutil.copy(home / 'whole/epoch_1.pth', home / 'work')
    (home / 'work/last_checkpoint').write_text(str(home / 'work/epoch_1.pth'))
    resumed = run(*command, '--work-dir', 'work', '--resume')
    holds(resumed.stdout, 'resumed epoch: 1, iter: 3', 'Epoch(train) [2][3/3]')
    assert 'Epoch(train) [1]' not in resumed.stdout
    one, other = weights(home / 'work/epoch_2.pth'), weights(home / 'whole/epoch_2.pth')
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_resuming_an_empty_work_directory_starts_anew(home, run, trained):
    assert run(TRAIN, W4A4, '--work-dir', 'work', '--resume', '--cfg-options', *TINY).returncode == 0
    one, other = weights(home / 'work/epoch_1.pth'), weights(trained / 'epoch_1.pth')
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_mixed_precision_on_a_cpu(home, run, trained):
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--amp', '--cfg-options', *TINY)
    assert (done.returncode, done.stderr) == (0, '')
    state, float32 = weights(home / 'work/epoch_1.pth'), weights(trained / 'epoch_1.pth')
    assert finite(home / 'work/epoch_1.pth')
    name = 'backbone.layer1.0.conv1.weight'
    assert state[name].dtype == torch.float32
    assert not torch.equal(state[name], float32[name])
    torch.testing.assert_close(state[name], float32[name], rtol=0, atol=0.05)


def test_the_learning_rate_is_scaled_with_the_batch_size(home, run):
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--auto-scale-lr', '--cfg-options', *TINY)
    assert done.returncode == 0, done.stderr
    groups = torch.load(home / 'work/epoch_1.pth', weights_only=False)['optimizer']['param_groups']
    assert {group['initial_lr'] for group in groups} == {0.01 * 8 / 256}


def test_options_reach_the_model_and_validation_can_be_left_out(home, run):
    options = ('quantization.weight.bits=3', 'model.head.num_classes=12', 'quantization.skip=[backbone.layer4.*]')
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--no-validate', '--cfg-options', *TINY, *options)
    assert done.returncode == 0, done.stderr
    state = weights(home / 'work/epoch_1.pth')
    assert int(state['backbone.layer1.0.conv1.weight_quant.state'][-1]) == 3
    assert state['head.fc.weight'].shape == (12, 128)
    assert 'backbone.layer4.0.conv1.weight_quant.state' not in state
    assert 'Epoch(val)' not in done.stdout


SCENES = dict(det='det/faster_rcnn_r18_gdrq_w4a4_digits.py', seg='seg/pspnet_r18_gdrq_w4a4_digits.py')
FEW = (*TINY, 'train_dataloader.dataset.indices=8', 'test_dataloader.dataset.indices=4')


@pytest.mark.parametrize(('task', 'out'), [('det', 'predictions.pkl'), ('seg', 'predictions')])
def test_detection_and_segmentation(home, run, task, out):
    config = ROOT / 'configs' / SCENES[task]
    done = run(TRAIN, config, '--work-dir', 'work', '--no-validate', '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    outputs = ('--work-dir', 'tested', '--out', out, '--show-dir', 'shown')
    done = run(TEST, config, 'work/epoch_1.pth', *outputs, '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    record = json.loads((home / 'tested/record.json').read_text())
    assert (record['task'], record['model']['bits']) == (task, [4, 4])
    assert any(key in record['metrics'] for key in MAIN_METRICS[task])
    if task == 'det':
        predictions = pickle.loads((home / out).read_bytes())
        assert [p['pred_instances']['bboxes'].shape[1] for p in predictions] == [4] * 4
    else:
        masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (home / out).glob('*.png')]
        assert [mask.shape for mask in masks] == [(96, 96)] * 4 and max(mask.max() for mask in masks) <= 10
    assert len(list((home / 'shown').rglob('*.png'))) == 4


@pytest.mark.parametrize('config', [W4A4.relative_to(ROOT / 'configs'), *SCENES.values()])
def test_the_same_seed_gives_the_same_model(home, run, config):
    """To the last bit, on a CPU: weights, thresholds, optimizer, and the losses on the way."""
    ends = []
    for work_dir in ('one', 'two'):
        options = (*FEW, 'train_dataloader.batch_size=4', 'default_hooks.logger.interval=1')
        done = run(TRAIN, ROOT / 'configs' / config, '--work-dir', work_dir, '--no-validate', '--cfg-options', *options)
        assert done.returncode == 0, done.stderr
        checkpoint = read_checkpoint(str(home / work_dir / 'epoch_1.pth'))
        losses = checkpoint['message_hub']['log_scalars']['train/loss'].data[0].tolist()
        ends.append({**{part: checkpoint[part] for part in ('state_dict', 'optimizer')}, 'losses': losses})
    assert len(losses) == 2 and same(*ends)


def test_mixed_precision_on_a_cpu_for_segmentation(home, run):
    command = (TRAIN, ROOT / 'configs' / SCENES['seg'], '--work-dir', 'work', '--amp', '--no-validate')
    done = run(*command, '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    assert finite(home / 'work/epoch_1.pth')


def test_mixed_precision_on_a_cpu_is_refused_for_detection(home, error_of):
    """mmcv's NMS has no bfloat16 kernel on a CPU."""
    command = (TRAIN, ROOT / 'configs' / SCENES['det'], '--amp', '--cfg-options', *FEW)
    holds(error_of(*command), '--amp', 'GPU', 'NMS')


# ---- prepare_data: CIFAR-10 -----------------------------------------------------------------------------------------


def batch(labels=(3, 0), seed=0, **more):
    """An official batch of random pictures."""
    planes = np.random.default_rng(seed).integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
    return {b'data': planes, b'labels': list(labels), **more}


def archive(path, members):
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def per_class(number=2):
    rng = np.random.default_rng(0)
    pictures = {
        f'cifar10/{split}/{name}/{i}.png': cv2.imencode('.png', rng.integers(0, 256, (32, 32, 3), np.uint8))[1]
        for split in ('train', 'test')
        for name in cifar10.CLASSES
        for i in range(number)
    }
    return {name: png.tobytes() for name, png in pictures.items()}


def damaged(path):
    content = bytearray(archive(path, per_class()))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


SOURCES = {
    'missing': (lambda path: None, ['given.tar.gz', 'No such file']),
    'empty': (lambda path: path.touch(), ['given.tar.gz', 'not a readable CIFAR-10 archive']),
    'no archive': (lambda path: path.write_text('junk ' * 100), ['given.tar.gz', 'not a readable CIFAR-10 archive']),
    'an empty folder': (lambda path: path.mkdir(), ['given.tar.gz', 'cifar*10*.tar.gz']),
    'too few': (lambda path: archive(path, per_class()), ['20 train pictures', '50000']),
    'truncated': (
        lambda path: path.write_bytes(archive(path, per_class(20))[:-60000]),
        ['given.tar.gz', 'not a readable CIFAR-10 archive'],
    ),
    'damaged': (damaged, ['given.tar.gz']),  # tarfile takes a damaged header for the end: the counts tell
    'something else': (lambda path: archive(path, {'readme.txt': b'hello'}), ['0 train pictures', '50000']),
    'a batch of code': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps(Payload())}),
        ['given.tar.gz', 'mkdir is not allowed'],
    ),
    'a batch without data': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps({b'labels': [1]})}),
        ['given.tar.gz', 'data'],
    ),
    'a batch with a wrong label': (
        lambda path: archive(path, {'data_batch_1': pickle.dumps(batch([3, 10]))}),
        ['given.tar.gz', '10'],
    ),
}


@pytest.mark.parametrize('kind', SOURCES)
def test_a_wrong_source(tmp_path, error_of, kind):
    """A half-filled data folder would pass for the whole data set, so none may be left."""
    make, fragments = SOURCES[kind]
    make(tmp_path / 'given.tar.gz')
    holds(error_of(PREPARE, 'cifar10', '--source', 'given.tar.gz'), *fragments)
    assert not (tmp_path / 'executed').exists()
    assert not (tmp_path / 'data/cifar10').exists()


def test_cifar10_needs_a_source(error_of):
    holds(error_of(PREPARE, 'cifar10'), '--source PATH')


@pytest.mark.parametrize('dataset', ['digits', 'cifar10'])
def test_a_folder_that_cannot_be_written(tmp_path, error_of, dataset):
    (tmp_path / 'occupied').touch()
    archive(tmp_path / 'given.tar.gz', per_class())
    holds(error_of(PREPARE, dataset, '--source', 'given.tar.gz', '--out', 'occupied'), 'occupied')


def test_an_official_batch_is_read():
    content = batch([3, 0])
    planes = content[b'data'].reshape(2, 3, 32, 32)
    for name, split in (('data_batch_5', 'train'), ('test_batch', 'test')):
        pictures = list(cifar10._official(name, pickle.dumps(content)))
        assert [place for place, _, _ in pictures] == [f'{split}/cat', f'{split}/airplane']
        assert len({file for _, file, _ in pictures}) == 2
        for (_, _, png), rgb in zip(pictures, planes):
            bgr = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
            np.testing.assert_array_equal(bgr[..., ::-1].transpose(2, 0, 1), rgb)


def test_names_of_official_batches_do_not_collide():
    names = [n for i in range(1, 6) for _, n, _ in cifar10._official(f'data_batch_{i}', pickle.dumps(batch()))]
    assert len(set(names)) == 10


# ---- prepare_data: digits -------------------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def scenes(data):
    return data / 'data/digits/scenes'


def test_digits_are_the_same_to_the_byte(data, tmp_path):
    first, second = data / 'data/digits', digits.build(tmp_path / 'again', show_progress=False)
    files = {p.relative_to(first) for p in first.rglob('*') if p.is_file()}
    assert files == {p.relative_to(second) for p in second.rglob('*') if p.is_file()}
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []


def test_an_unfinished_build_is_finished(tmp_path, data):
    shutil.copytree(data / 'data/digits', tmp_path / 'digits')
    (tmp_path / 'digits/complete.json').unlink()
    missing = tmp_path / 'digits/scenes/train/00007.png'
    missing.unlink()
    digits.build(tmp_path / 'digits', show_progress=False)
    assert missing.read_bytes() == (data / 'data/digits/scenes/train/00007.png').read_bytes()


def test_training_and_test_share_no_digit():
    parts = {name: {image.tobytes() for image in images} for name, (images, _) in digits.split_digits().items()}
    assert len(parts['train']) > 1200 and len(parts['test']) > 450
    assert parts['train'].isdisjoint(parts['test'])


def test_digit_classes_open_with_mmpretrain(data):
    from mmpretrain.datasets import CustomDataset

    for split, number in (('train', 6000), ('test', 1000)):
        dataset = CustomDataset(data_root=str(data / 'data/digits/cls'), data_prefix=split)
        assert len(dataset) == number and tuple(dataset.CLASSES) == digits.CLASSES
        assert cv2.imread(dataset.get_data_info(0)['img_path']).shape == (32, 32, 3)
        assert set(dataset.get_gt_labels()) == set(range(10))


@pytest.mark.parametrize(('split', 'number'), [('train', 600), ('test', 150)])
def test_boxes_open_with_mmdet_and_pycocotools(scenes, split, number):
    from mmdet.datasets import CocoDataset
    from pycocotools.coco import COCO

    dataset = CocoDataset(
        data_root=str(scenes),
        ann_file=f'annotations/{split}.json',
        data_prefix=dict(img=f'{split}/'),
        metainfo=dict(classes=digits.CLASSES),
        filter_cfg=dict(filter_empty_gt=True),
    )
    coco = COCO(str(scenes / 'annotations' / f'{split}.json'))
    assert len(dataset) == len(coco.imgs) == number
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(digits.CLASSES)
    for info in dataset:
        boxes = coco.loadAnns(coco.getAnnIds(info['img_id']))
        assert [i['bbox_label'] for i in info['instances']] == [b['category_id'] for b in boxes]
        for instance, box in zip(info['instances'], boxes):
            left, top, width, height = box['bbox']
            assert instance['bbox'] == [left, top, left + width, top + height]
    assert cv2.imread(dataset[0]['img_path']).shape == (96, 96, 3)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_boxes_fit_the_masks(scenes, split):
    content = json.loads((scenes / 'annotations' / f'{split}.json').read_text())
    boxes = {image['id']: [] for image in content['images']}
    for box in content['annotations']:
        boxes[box['image_id']].append(box)
    for image in content['images']:
        mask = cv2.imread(str(scenes / 'masks' / split / image['file_name']), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (image['height'], image['width']) and mask.dtype == np.uint8
        assert boxes[image['id']]
        for box in boxes[image['id']]:
            left, top, width, height = box['bbox']
            assert left >= 0 and top >= 0 and left + width <= image['width'] and top + height <= image['height']
            inside = mask[top : top + height, left : left + width]
            assert set(np.unique(inside)) <= {0, box['category_id'] + 1}
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))  # tight
            mask[top : top + height, left : left + width] = 0
        assert not mask.any()  # no digit without a box


def test_masks_open_with_mmseg(scenes):
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets import BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    for split, number in (('train', 600), ('test', 150)):
        dataset = BaseSegDataset(
            data_root=str(scenes),
            data_prefix=dict(img_path=split, seg_map_path=f'masks/{split}'),
            img_suffix='.png',
            seg_map_suffix='.png',
            metainfo=dict(classes=('background', *digits.CLASSES)),
            pipeline=[LoadImageFromFile(), LoadAnnotations()],
        )
        assert len(dataset) == number
        sample = dataset[0]
        assert sample['img'].shape == (96, 96, 3) and sample['gt_seg_map'].shape == (96, 96)
        assert 2 <= len(np.unique(sample['gt_seg_map'])) and sample['gt_seg_map'].max() <= 10


@pytest.mark.parametrize('example', ['classify.py', 'segment.py'])
def test_an_example_says_how_it_is_called(run, example):
    done = run(ROOT / 'examples' / example, 'nowhere', 'picture.png', *['mask.png'] * (example == 'segment.py'))
    assert done.returncode == 1 and 'EXPORTED_FOLDER PICTURE' in done.stderr and 'Traceback' not in done.stderr


def test_nothing_is_said_of_a_data_format_that_nobody_uses(tmp_path):
    """At debug level: mmengine prints it all the same, and it looks like a broken installation."""
    imports = 'import mmdet.datasets, mmpretrain.datasets'
    program = f'import gdrq_mm.openmmlab.cli as cli; cli.read_config(cli.sys.argv[1]); {imports}'
    command = [sys.executable, '-c', program, W4A4]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and 'OneDL' not in done.stdout + done.stderr, done.stderr
