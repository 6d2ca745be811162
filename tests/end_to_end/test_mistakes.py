"""tools/ as a user runs them: a mistake ends in one clear line, a bug in its traceback."""

import os
import subprocess
import sys

import pytest
import torch

from gdrq_mm.data import digits
from tests.campaigns.fuzz import Commands, attack
from tests.helpers import ENV, ROOT, UPSTREAM
from tests.tools import TEST, TINY, TRAIN, W4A4, holds, weights

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
    (tmp_path / 'data/deep').mkdir(parents=True)
    (tmp_path / 'data/deep/vgg_w8a8.py').write_text('depth = 11')  # a folder of the user's may be a whole disk
    assert 'nearest' not in error_of(TRAIN, 'vgg_w8a8.py')


@pytest.mark.parametrize(
    ('option', 'fragments'),
    [
        ('quantization.weight.bits=four', ["quantization.weight.bits='four'", '2 to 8']),
        ('quantization=4', ['quantization=4 is not a dict']),
        ('quantization.weight.bits', ['quantization.weight.bits', 'key=value']),
        ('quantization.weight.bits.x=1', ['bits']),
        ('model.type=ImageClasifier', ["'ImageClasifier' is not in the registry mm", "did you mean 'ImageClassifier'"]),
        ('model.backbone.type=ResNet_CIFARR', ['ResNet_CIFARR']),
        ('model.backbone.depthh=18', ['depthh']),
        ('train_dataloader.dataset.type=CustomDataSet', ['CustomDataSet']),
        ('train_dataloader.dataset.pipeline.0.type=LoadImage', ['LoadImage']),
        (
            'optim_wrapper.optimizer.type=SDG',
            ["optim_wrapper.optimizer: 'SDG' is not in the registry", "did you mean 'SGD'"],
        ),
        ('val_evaluator.type=Acuracy', ['Acuracy']),
        ('runner_type=QuantRuner', ['QuantRuner']),
        ('runner_type=FlexibleRunner', ['FlexibleRunner', 'ignore', 'QuantRunner']),
        ('param_scheduler.type=CosineAnealingLR', ['CosineAnealingLR']),
        ('train_dataloader.batch_sizee=8', ['batch_sizee']),
        ('train_dataloader.batch_size=0', ['BatchSampler: batch_size should be a positive integer']),
        ('train_cfg.max_epochs=0', ['CosineAnnealingLR: end should be larger than begin', 'end=0']),
        ('model.backbone.norm_cfg.type=BNN', ["'BNN' is not in the registry"]),
        ('model=[]', ['has no model']),
        ('x=[1,2', ['--cfg-options', 'x=[1,2', 'brackets']),
        ('custom_hooks=[dict(type=EMAHook,momentum=0.1)]', ['--cfg-options', 'a dict goes into --cfg-values']),
        ('a b=1', ['a b=1', 'key=value']),
        ('a..b=1', ['a..b=1', 'key=value']),
        ('train_dataloader=5', ['train_dataloader=5 is not a dict']),
        ('train_dataloader.dataset.datasets=3', ['train_dataloader.dataset.datasets=3 is not a list']),
        ('train_dataloader.dataset.data_root=7', ['train_dataloader', 'data folder 7 does not exist']),
        ('auto_scale_lr=3', ['auto_scale_lr=3 is not a dict']),
        ('custom_hooks.type=EMAHook', ["custom_hooks={'type': 'EMAHook'} is not a list"]),
        ('visualizer.vis_backends.0.type=WandbVisBackend', ['pip install wandb']),
        ('randomness=3', ['randomness=3 is not a dict']),
        ('val_cfg=3', ['the config cannot be used', 'dict, but got 3']),
        ('quantisation.weight.bits=5', ['quantisation', "did you mean 'quantization'"]),
        ('load_form=epoch_1.pth', ['load_form', "did you mean 'load_from'"]),
        ('memory_format=channel_last', ['memory_format', 'channel_last', 'channels_last']),
        ('val_evaluator=None', ['the config has no val_evaluator: val_dataloader, val_cfg, val_evaluator']),
        ('optim_wrapper.type=AmpOptimWrapper', ["optim_wrapper.type='AmpOptimWrapper' needs a GPU", '--amp']),
    ],
)
def test_a_wrong_option(home, error_of, option, fragments):
    holds(error_of(TRAIN, W4A4, '--cfg-options', *TINY, option), *fragments)


@pytest.mark.parametrize(
    ('tool', 'options', 'fragments'),
    [
        (TRAIN, ['--cfg-options', 'work_dir=4'], ['work_dir=4 is not a path']),
        (TRAIN, ['--amp', '--cfg-options', 'default_scope=[]'], ['default_scope=[]', 'mmpretrain']),
        (TRAIN, ['--amp', '--cfg-options', 'optim_wrapper=None'], ['--amp: optim_wrapper=None']),
        (TRAIN, ['--auto-scale-lr', '--cfg-options', 'auto_scale_lr=3'], ['auto_scale_lr=3 is not a dict']),
        (TRAIN, ['--auto-scale-lr'], ['--auto-scale-lr: the config has no auto_scale_lr.base_batch_size']),
        (TEST, ['x.pth', '--cfg-options', 'default_scope=mmpose'], ["default_scope='mmpose'", 'mmpretrain']),
        (
            TRAIN,
            ['--resume', '--cfg-options', 'default_hooks.checkpoint=3'],
            ['default_hooks.checkpoint=3 is not a dict'],
        ),
        (
            TEST,
            ['x.pth', '--tta', '--cfg-options', 'test_dataloader.dataset.pipeline=3'],
            ['--tta: the pipeline of the test data is 3'],
        ),
        (TEST, ['x.pth', '--tta', '--cfg-options', 'test_dataloader=None'], ['the config has no test_dataloader']),
    ],
)
def test_a_config_that_an_option_cannot_change(home, error_of, tool, options, fragments):
    holds(error_of(tool, W4A4, *options), *fragments)


def test_a_random_command_line_is_accepted_or_refused_in_one_line(tmp_path, monkeypatch):
    """The short form of tests/campaigns/fuzz.py; a traceback of any kind counts as a crash there."""
    monkeypatch.setattr(digits, 'COUNTS', digits.COUNTS)  # the campaign sets it for good
    ends, crashes = attack('command lines', Commands(tmp_path).one, 150, seed=0)
    assert crashes == [] and ends['valid'] > 10 and ends['refused'] > 50


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
        (['--out', 'text/predictions.pkl'], ['--out text/predictions.pkl cannot be written']),
        (['--show-dir', 'text/shown'], ['--show-dir text/shown cannot be written']),
        (['--tta', '--show-dir', 'shown'], ['--tta', '--show-dir']),
    ],
)
def test_options_that_do_not_go_together(home, error_of, trained, options, fragments):
    (home / 'text').touch()
    command = (TEST, W4A4, trained / 'epoch_1.pth', *options, '--cfg-options', *TINY)
    holds(error_of(*command), *fragments)


@pytest.mark.parametrize(
    ('packages', 'fragments'),
    [
        (
            {'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1'},
            ['onedl-mmcv, onedl-mmdetection and mmengine, ', 'pip uninstall onedl-mmcv'],
        )
        if UPSTREAM
        else (
            {'mmcv': '2.1.0', 'mmdet': '3.3.0'},
            ['and mmcv, mmdet', 'pip uninstall onedl-mmengine'],
        ),
        ({'transformers': '5.17.0'}, ['transformers 5.17.0', 'pip uninstall transformers']),
    ],
)
def test_packages_that_break_openmmlab(home, tmp_path, packages, fragments):
    for name, version in packages.items():
        folder = tmp_path / f'{name.replace("-", "_")}-{version}.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    path = os.pathsep.join([str(tmp_path), *filter(None, [ENV.get('PYTHONPATH')])])
    env = {**ENV, 'PYTHONPATH': path}
    command = [sys.executable, TRAIN, W4A4, '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    holds(done.stderr, 'error: ', *fragments)
    assert len(done.stderr.splitlines()) == 1


def test_a_parameter_that_is_not_a_number(home, error_of, trained):
    state = weights(trained / 'epoch_1.pth')
    state['backbone.layer1.0.conv1.weight'][0] = float('nan')
    torch.save(dict(state_dict=state), home / 'nan.pth')
    for command in ((TRAIN, W4A4), (TEST, W4A4, 'nan.pth')):
        message = error_of(*command, '--cfg-options', *TINY, 'load_from=nan.pth')
        holds(message, 'nan.pth has NaN', 'in backbone.layer1.0.conv1.weight')


# ---- what may be a bug ----------------------------------------------------------------------------------------------

MINE = """
from mmengine.registry import MODELS
from mmpretrain.models import ResNet_CIFAR


@MODELS.register_module()
class Mine(ResNet_CIFAR):
    def __init__(self, depth, flavour=None, **kwargs):
        {}
        super().__init__(depth, **kwargs)
"""


@pytest.mark.parametrize(
    ('line', 'last'),
    [
        ('None.width', "AttributeError: 'NoneType' object has no attribute 'width'"),
        ('{}["width"]', "KeyError: 'width'"),
        ("kwargs['flavour'] = flavour", "got an unexpected keyword argument 'flavour'"),
        ('assert depth > 100', 'AssertionError'),
    ],
)
def test_a_bug_in_a_class_of_the_users_own_shows_its_traceback(home, run, leaf, line, last):
    (home / 'mine.py').write_text(MINE.format(line))
    path = f"__import__('sys').path.insert(0, {str(home)!r})\n"
    config = leaf(f"{path}custom_imports = dict(imports=['mine'])\nmodel = dict(backbone=dict(type='Mine', flavour=3))")
    done = run(TRAIN, config, '--cfg-options', *TINY)
    assert done.returncode == 1
    assert 'Traceback' in done.stderr and 'mine.py' in done.stderr
    assert done.stderr.splitlines()[-1].endswith(last)


def test_values_that_a_library_refuses_show_where(home, run):
    done = run(TRAIN, W4A4, '--cfg-options', *TINY, 'model.head.in_channels=77')
    assert done.returncode == 1 and 'Traceback' in done.stderr
    holds(' '.join(done.stderr.splitlines()[-2:]), '1x128 and 77x10')  # a note on what was tried may stand behind it


def test_a_launcher_without_its_processes(home, error_of):
    holds(error_of(TRAIN, W4A4, '--launcher', 'pytorch'), '--launcher pytorch', 'torchrun', 'tools/dist_train.sh')
    holds(error_of(TRAIN, W4A4, '--launcher', 'slurm'), '--launcher slurm', 'srun', 'tools/slurm_train.sh')
