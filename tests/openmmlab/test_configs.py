"""configs/: each builds and quantizes its model, the ImageNet ones train, stock tools run ours, the wheel has them."""

import copy
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import mmdet
import mmpretrain
import pytest
import torch
import yaml
from mmengine.registry import MODELS, DefaultScope

from gdrq_mm.commands import COMMANDS
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.core.quantizers import METHODS
from gdrq_mm.data import digits
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.models import drop_pretrained, read_quantization, record_plan
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.report.layers import layer_table
from tests.configs import ALL, CONFIGS, FULL_SCALE, QUANTIZED, TASKS, bits_in_name, load, name
from tests.helpers import ENV, ROOT, UPSTREAM

QUANTIZATION = sorted((CONFIGS / '_base_/quantization').glob('*.py'))
LAST = re.compile(
    r'(^|\.)(?<!attention\.)(fc|fc_cls|fc_reg|rpn_cls|rpn_reg|retina_cls|retina_reg|convs_pred\.\d|multi_level_conv_(cls|reg|obj)\.\d'
    r'|conv_seg|classifier\.6|rtm_(cls|reg)\.\d|cls_branches\.\d|reg_branches\.\d\.4|layers\.head)$'
)
"""Last layers of the heads in use, auxiliary ones too."""


# ---- the files ------------------------------------------------------------------------------------------------------


def test_every_config_is_tested_here():
    assert {path.parent.name for path in ALL} == set(TASKS)
    others = [path for path in CONFIGS.rglob('*.py') if path not in ALL]
    assert [name(path) for path in others if path.relative_to(CONFIGS).parts[0] != '_base_'] == []
    assert len(FULL_SCALE) >= 14 and len(QUANTIZATION) >= 5


@pytest.mark.parametrize('path', QUANTIZATION, ids=name)
def test_a_quantization_base_sets_its_two_keys_only(path):
    """Two bases of a config may not set the same key."""
    cfg = load(path)
    assert set(cfg) == {'runner_type', 'quantization'}
    assert cfg.runner_type == 'gdrq_mm.openmmlab.QuantRunner'
    quantization = Quantization.from_dict(cfg.quantization)
    assert (quantization.weight.bits, quantization.activation.bits) == bits_in_name(path)
    method = path.stem.rsplit('_', 1)[0]
    assert cfg.quantization.method == method
    if path.stem != 'hwgq_w1a2':  # the paper's: binary weights, which is a method of its own
        assert (quantization.weight.method, quantization.activation.method) == METHODS[method]


def test_every_method_has_a_quantization_base():
    assert {path.stem.rsplit('_', 1)[0] for path in QUANTIZATION} == set(METHODS)


@pytest.mark.parametrize('path', FULL_SCALE, ids=name)
def test_a_full_scale_config_is_short_and_starts_from_the_weights_of_its_base(path):
    assert len(path.read_text().splitlines()) <= 8
    package, base = re.search(r'(\w+)::([\w/.-]+)', path.read_text()).groups()
    folder = Path(import_module(package).__path__[0]) / '.mim/configs' / Path(base).parent
    published = [
        model['Weights']
        for metafile in folder.glob('metafile.y*ml')
        for model in yaml.safe_load(metafile.read_text())['Models']
        if Path(model['Config']).name == Path(base).name
    ]
    starts = load(path).load_from
    if UPSTREAM:  # its servers have the files under the same paths
        starts = starts.replace('https://mmassets.onedl.ai/', 'https://download.openmmlab.com/')
    if published:
        assert starts in published
    else:  # trained first, from the float config beside it
        stem = path.stem.replace('_gdrq_w4a4', '')
        epochs = load(path.with_name(f'{stem}.py')).train_cfg.max_epochs
        assert starts == f'work_dirs/{stem}/epoch_{epochs}.pth'


@pytest.mark.parametrize('path', [path for path in QUANTIZED if path not in FULL_SCALE], ids=name)
def test_a_small_config_starts_from_the_last_checkpoint_of_its_float_config(path):
    cfg = load(path)
    folder, stem, checkpoint = Path(cfg.load_from).parts
    assert folder == 'work_dirs' and stem == re.sub(r'_gdrq_w\da\d', '', path.stem)
    assert checkpoint == f'epoch_{load(path.with_name(f"{stem}.py")).train_cfg.max_epochs}.pth'


@pytest.mark.parametrize('path', QUANTIZED, ids=name)
def test_the_learning_rate_ends_with_the_training(path):
    """A leaf that shortens the training has to shorten the schedule."""
    cfg = load(path)
    schedules = cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else [cfg.param_scheduler]
    last = schedules[-1]
    end = last.get('begin', 0) + last.T_max if 'T_max' in last else last.end
    by_epoch = last.get('by_epoch', True)
    assert end == (cfg.train_cfg.max_epochs if by_epoch else cfg.train_cfg.max_iters)


# ---- models ---------------------------------------------------------------------------------------------------------


def predict(model, scope, size):
    """A prediction for one image of noise."""
    classes = dict(mmpretrain='DataSample', mmdet='DetDataSample', mmseg='SegDataSample')
    sample = getattr(import_module(f'{scope}.structures'), classes[scope])(
        metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0))
    )
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    return model.test_step(dict(inputs=[image], data_samples=[sample]))


@pytest.mark.parametrize('path', ALL, ids=name)
def test_a_config_builds_a_model_of_its_kind(path):
    cfg = load(path)
    scope = TASKS[path.parent.name]
    assert cfg.default_scope == scope
    drop_pretrained(cfg.model)
    # The others take small pictures.
    size = 224 if cfg.model.backbone.type in ('VGG', 'SwinTransformer') and scope == 'mmpretrain' else 64
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg.model)
        plan = record_plan(model, lambda: predict(model, scope, size))
    quantization = read_quantization(cfg)
    if path not in QUANTIZED:
        assert quantization is None and cfg.get('runner_type') is None
        return
    assert (quantization.weight.bits, quantization.activation.bits) == bits_in_name(path)
    report = quantize_model(model, quantization, plan)
    notes = {row.name: row.note.split(', ') for row in report.layers if row.note}
    assert {each for note in notes.values() for each in note} <= {'first', 'last', 'training only'}
    assert {key for key, note in notes.items() if 'training only' in note} == {
        row.name for row in report.layers if row.name.startswith('auxiliary_head.')
    }
    edges = {key: note[0] for key, note in notes.items() if note[0] != 'training only'}
    layers = quant_layers(model)
    assert [key for key, note in edges.items() if note == 'first'] == [next(iter(layers))]
    assert {key for key in layers if LAST.search(key)} <= {key for key, note in edges.items() if note == 'last'}
    assert 'last' in edges.values()
    assert {row.name for row in report.layers} == set(layers)
    assert {layer.bits for key, layer in layers.items() if key not in edges} == {bits_in_name(path)}
    table = {line.split()[0]: line.split() for line in layer_table(model, report).splitlines() if line}
    for key, expected in edges.items():
        _, _, _, weight, _, activation, _, note = table[key][:8]
        assert (weight, activation, note.rstrip(',')) == ('8', '8', expected)


# ---- other people's tools and projects ------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder that holds data/digits, with few pictures."""
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', {'cls': {'train': 64, 'test': 20}, 'scenes': {'train': 16, 'test': 4}})
        digits.build(home / 'data/digits', show_progress=False)
    return home


@pytest.mark.parametrize(
    ('package', 'config'),
    [
        (mmpretrain, 'cls/resnet18_width16_gdrq_w4a4_digits.py'),
        pytest.param(mmdet, 'det/faster_rcnn_r18_gdrq_w4a4_digits.py', marks=pytest.mark.full),
    ],
)
def test_a_stock_tool_trains_a_quantized_model(package, config, home, tmp_path):
    tool = Path(package.__path__[0]) / '.mim/tools/train.py'
    options = ('train_dataloader.dataset.indices=8', 'train_dataloader.batch_size=4', 'train_cfg.max_epochs=1')
    command = [sys.executable, tool, CONFIGS / config, '--work-dir', tmp_path, '--cfg-options', *options]
    command += ['load_from=None', 'val_dataloader.dataset.indices=4', 'quantization.calibration_batches=1']
    done = subprocess.run(command, cwd=home, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    bits = [int(value[-1]) for key, value in state.items() if key.endswith('.weight_quant.state')]
    assert len(bits) > 15 and set(bits) == {4, 8}


def test_a_pretrained_init_among_others_is_dropped():
    others, init = [dict(type='Kaiming')], dict(type='Pretrained', checkpoint='x.pth')
    cfg = dict(a=dict(init_cfg=[*others, init]), b=[dict(init_cfg=[init])], c=dict(init_cfg=others[0]))
    drop_pretrained(cfg)
    assert cfg == dict(a=dict(init_cfg=others), b=[dict(init_cfg=None)], c=dict(init_cfg=others[0]))


def test_a_pretrained_init_that_load_from_replaces_is_not_downloaded(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    cfg = load(CONFIGS / 'cls/resnet18_width16_gdrq_w4a4_digits.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        state = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'float.pth')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='http://127.0.0.1:9/never.pth')
    cfg.work_dir, cfg.train_cfg.max_epochs = str(tmp_path), 1
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_dataloader.dataset.indices = cfg.train_dataloader.batch_size = 8
    cfg.load_from = None
    for resume in (False, True):  # without load_from it is needed; a checkpoint to resume may not be there yet
        cfg.resume = resume
        with pytest.raises(OSError, match='refused'):
            QuantRunner.from_cfg(copy.deepcopy(cfg)).train()
    cfg.resume = False
    cfg.load_from = str(tmp_path / 'float.pth')
    runner = QuantRunner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 1


def test_another_project_inherits_a_quantization_base(tmp_path):
    bases = ['mmpretrain::resnet/resnet18_8xb32_in1k.py', 'gdrq_mm::_base_/quantization/gdrq_w4a4.py']
    (tmp_path / 'mine.py').write_text(f'_base_ = {bases}\n')
    cfg = load(tmp_path / 'mine.py')
    assert cfg.model.backbone.depth == 18
    assert cfg.quantization == load(CONFIGS / '_base_/quantization/gdrq_w4a4.py').quantization


@pytest.mark.parametrize(
    'config', ['gdrq_mm::cls/resnet18_width16_gdrq_w4a4_digits.py', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py']
)
def test_a_config_of_a_package_is_a_base_and_an_argument(config, tmp_path):
    (tmp_path / 'mine.py').write_text(f'_base_ = {config!r}\n')
    cfg, base = read_config(tmp_path / 'mine.py'), read_config(config)
    assert cfg.model.type == base.model.type and cfg.train_cfg.max_epochs == base.train_cfg.max_epochs
    with pytest.raises(UserError, match=r'config gdrq_mm::cls/none\.py cannot be found'):
        read_config('gdrq_mm::cls/none.py')


def test_a_stock_tool_finds_our_bases_by_the_path_that_the_docs_name(tmp_path):
    """mmengine alone does not know `gdrq_mm::`, and imports what a config asks for when its bases have been read."""
    text = (ROOT / 'docs/openmmlab.md').read_text()
    (base,) = re.findall(r'^_base_ = .*CONFIGS.*$', text, re.MULTILINE)
    (tmp_path / 'my_float_model.py').write_text("model = dict(type='ImageClassifier')\n")
    (tmp_path / 'mine.py').write_text(base + '\n')
    program = "from mmengine.config import Config; print(Config.fromfile('mine.py').quantization.method)"
    done = subprocess.run([sys.executable, '-c', program], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ['gdrq'], done.stderr


def test_the_wheel_has_the_configs_the_commands_and_its_revision(tmp_path):
    source = tmp_path / 'source'
    source.mkdir()
    for part in ('gdrq_mm', 'configs', 'tools'):  # a copy: building leaves files in the source tree
        shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    for part in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / part, source)
    git = ['git', '-C', source, '-c', 'user.name=x', '-c', 'user.email=x']
    for step in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'first']):
        subprocess.run([*git, *step], check=True)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob('*.whl')
    files = zipfile.ZipFile(wheel)
    names = set(files.namelist())
    expected = {f'gdrq_mm/.mim/configs/{path.relative_to(CONFIGS)}' for path in CONFIGS.rglob('*.py')}
    expected |= {f'gdrq_mm/report/{name}' for name in ('published.json', 'report.html.j2')}
    scripts = [path.name for path in (ROOT / 'tools').iterdir() if path.suffix in ('.py', '.sh')]
    expected |= {f'gdrq_mm/.mim/tools/{name}' for name in scripts if name != 'setup.sh'}
    expected |= {f'gdrq_mm/commands/{name}.py' for name in COMMANDS} | {'gdrq_mm/.mim/model-index.yml'}
    assert expected - names == set()
    (about,) = [name for name in names if name.endswith('.dist-info/entry_points.txt')]
    assert b'gdrq = gdrq_mm.commands:main' in files.read(about)
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
    assert json.loads(files.read('gdrq_mm/revision.json')) == dict(commit=commit, dirty=False)
