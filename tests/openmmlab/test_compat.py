"""Each workaround is still needed: a test here fails when OpenMMLab or torch has mended what it works around."""

import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from mmcv.ops import DeformConv2d, RoIAlign, SyncBatchNorm
from mmengine.config import Config, utils
from mmengine.dist import init_dist
from mmengine.fileio import load
from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.models.losses import CrossEntropyLoss
from torch.nn.parallel import DistributedDataParallel

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab import compat
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.cli import ending, load_config, read_config
from gdrq_mm.openmmlab.compat import ONEDL, PRIVATE, TOLD_BY, check_environment, mend_bases, mend_losses
from gdrq_mm.openmmlab.data_only import data_only
from gdrq_mm.openmmlab.distributed import SYNCED, synchronized
from gdrq_mm.openmmlab.models import use_memory_format
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ENV, ROOT, UPSTREAM
from tests.tools import Payload

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='what is missing without a GPU')


@pytest.mark.parametrize('place', PRIVATE)
def test_the_private_names_are_there(place, make):
    """Attributes are set by the constructors, so those of a real run are looked at."""
    module, _, name = place.rpartition('.')
    runner = make(epochs=1)
    made = {'Runner': runner, 'Visualizer': runner.visualizer, 'CheckpointHook': CheckpointHook}
    if name == 'OptimWrapper':
        made[name] = runner.build_optim_wrapper(runner.optim_wrapper)
    assert isinstance(made[name], getattr(import_module(module), name)) or made[name] is CheckpointHook
    assert [each for each in PRIVATE[place] if not hasattr(made[name], each)] == []


def test_importing_changes_nothing():
    """No fork hook, no handler of a signal, no patch, no CUDA; what mend_bases changes it changes when it is called."""
    program = """
import os, signal
hooks = []
os.register_at_fork = lambda **given: hooks.extend(map(str, (h.__module__ for h in given.values())))
import torch, mmengine.logging, mmengine.config.utils
import mmpretrain.models, mmdet.models, mmseg.models
numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
state = lambda: ([signal.getsignal(n) for n in numbers], mmengine.logging.print_log, torch.cuda.set_device,
                 dict(mmengine.config.utils.MODULE2PACKAGE), dict(os.environ))
before = state()
import gdrq_mm.openmmlab, gdrq_mm.openmmlab.cli, gdrq_mm.openmmlab.sweep, gdrq_mm.openmmlab.bundle
assert state() == before
assert not [name for name in hooks if name.startswith('gdrq_mm')], hooks
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, '-c', program], env=ENV, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def base_of(scope, tmp_path):
    """Reads a config of a package by its scope, in a process in which nothing was mended."""
    (tmp_path / 'leaf.py').write_text(f'_base_ = {scope!r}')
    program = 'import sys; from mmengine.config import Config; Config.fromfile(sys.argv[1])'
    command = [sys.executable, '-c', program, str(tmp_path / 'leaf.py')]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


@pytest.mark.parametrize(
    ('scope', 'message'),
    [
        pytest.param(
            *('mmseg::_base_/models/fcn_r50-d8.py', 'mmsegmentation'),
            marks=pytest.mark.skipif(UPSTREAM, reason="the package of upstream's stack has that name"),
        ),
        ('gdrq_mm::_base_/quantization/gdrq_w4a4.py', 'does not support to load gdrq_mm'),
    ],
)
def test_mend_bases_is_needed(tmp_path, scope, message):
    done = base_of(scope, tmp_path)
    assert done.returncode != 0 and message in done.stderr
    assert utils.MODULE2PACKAGE.get('mmdet') == 'mmdet'


@pytest.mark.skipif(not UPSTREAM, reason="onedl's mmengine does not import pkg_resources")
def test_mmengine_lets_setuptools_warn(tmp_path):
    done = base_of('mmpretrain::_base_/models/resnet18.py', tmp_path)
    assert done.returncode == 0 and 'pkg_resources is deprecated' in done.stderr


def test_the_scope_of_a_base_is_a_package_with_registries(tmp_path):
    """Ours has none: what its configs build is looked for in their default_scope."""
    bases = {
        'ours': 'gdrq_mm::_base_/default_runtime_cls.py',
        'theirs': 'mmpretrain::_base_/models/resnet18.py',
    }
    (tmp_path / 'leaf.py').write_text(f'_base_ = {list(bases.values())}\nhooks = {{{{_base_.default_hooks}}}}')
    mend_bases()
    mend_bases()
    cfg = Config.fromfile(tmp_path / 'leaf.py')
    assert cfg.model['_scope_'] == 'mmpretrain'
    assert '_scope_' not in cfg.visualizer and not cfg.hooks.get('_scope_')


BASES = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmpretrain::resnet/resnet18_8xb32_in1k.py',
    'mmseg::_base_/models/fcn_hr18.py',
]


@pytest.mark.parametrize('config', BASES)
def test_mmengine_reads_the_lists_of_all_models_for_nothing(config, monkeypatch):
    mend_bases()
    theirs = compat._get_cfg_path(config, '')
    read = []
    monkeypatch.setattr(utils, 'load', lambda path: read.append(path) or load(path))
    assert Config._get_cfg_path(config, '') == theirs and not read
    assert compat._get_cfg_path(config, '') == theirs and len(read) > 10


def test_a_config_of_this_package_is_a_base_that_trains(tmp_path, digits_root):
    (tmp_path / 'leaf.py').write_text("_base_ = 'gdrq_mm::cls/resnet18_width16_gdrq_w4a4_digits.py'")
    cfg = read_config(tmp_path / 'leaf.py')
    cfg.work_dir, cfg.load_from, cfg.log_level = str(tmp_path), None, 'ERROR'
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root, loader.batch_size = str(digits_root / 'cls'), 32
    cfg.train_cfg.max_epochs = cfg.param_scheduler.T_max = 1
    QuantRunner.from_cfg(cfg).train()
    assert (tmp_path / 'epoch_1.pth').is_file() and init_model(cfg, tmp_path / 'epoch_1.pth').plan.calls


@pytest.mark.parametrize('stack', [ONEDL, compat.UPSTREAM, (*ONEDL[1:], 'torch'), ()])
def test_one_stack_is_let_in(stack, monkeypatch):
    monkeypatch.setattr(compat, 'installed', lambda name: '1.0' if name in stack else None)
    check_environment()


def test_a_mixture_of_stacks_is_refused_and_told_how_to_end(monkeypatch):
    monkeypatch.setattr(compat, 'installed', lambda name: '1.0' if name in ('onedl-mmcv', 'mmdet', 'mmcv') else None)
    with pytest.raises(
        UserError, match=r'onedl-mmcv and mmcv, mmdet; remove both \(pip uninstall onedl-mmcv mmcv mmdet\)'
    ):
        check_environment()
    monkeypatch.setattr(compat, 'installed', lambda name: '5.1' if name == 'transformers' else None)
    with pytest.raises(UserError, match='transformers 5'):
        check_environment()


@pytest.mark.parametrize('avg_non_ignore', [False, True])
def test_class_weights_beside_ignored_labels(avg_non_ignore):
    """What torch's own cross entropy gives; mmseg fails, onedl's only if it averages without what is ignored."""
    settings = dict(class_weight=[1.0, 2.0, 0.5], avg_non_ignore=avg_non_ignore)
    loss = CrossEntropyLoss(**settings)
    scores, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    if UPSTREAM or avg_non_ignore:
        with pytest.raises(IndexError):
            loss(scores, labels, ignore_index=255)
    mend_losses(nn.ModuleList([loss, nn.Conv2d(1, 1, 1)]))
    expected = nn.functional.cross_entropy(scores, labels, torch.tensor(settings['class_weight']), ignore_index=255)
    torch.testing.assert_close(loss(scores, labels, ignore_index=255), expected)
    without = CrossEntropyLoss(avg_non_ignore=True)
    before = without(scores, labels, ignore_index=255)
    mend_losses(without)
    assert torch.equal(without(scores, labels, ignore_index=255), before)


@without_gpu
@pytest.mark.parametrize('launcher', TOLD_BY)
def test_mmengine_selects_a_gpu_for_each_process(launcher, monkeypatch):
    for names in TOLD_BY.values():
        for ours, theirs in names.items():
            monkeypatch.setenv(ours, '0')
            monkeypatch.setenv(theirs, '0')
    for name, value in dict(LOCAL_RANK='0', RANK='0', SLURM_NODELIST='localhost', MASTER_ADDR='127.0.0.1').items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('MASTER_PORT', '1')
    with pytest.raises(Exception, match=r'(?i)cuda|nvidia'):
        init_dist(launcher, backend='gloo')


@without_gpu
def test_torch_has_no_synchronized_batch_norm_without_a_gpu(tmp_path):
    """See distributed.py."""
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.SyncBatchNorm(3))
        with pytest.raises(ValueError, match='GPU'):
            model(torch.zeros(2, 3, 4, 4))
        with pytest.raises(ValueError, match='GPU'):
            DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_pretrained_init_is_executed_without_the_guard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={}, more=Payload()), 'given.pth')
    with data_only(), pytest.raises(UserError, match=r'given\.pth holds more than tensors.*--unsafe-load'):
        CheckpointLoader.load_checkpoint('given.pth')
    assert not (tmp_path / 'executed').exists()
    CheckpointLoader.load_checkpoint('given.pth')
    assert (tmp_path / 'executed').exists()


def test_mmengine_removes_the_old_checkpoint_before_it_writes_the_new_one(make):
    """And so loses both where the disk is full: hooks/checkpoint.py."""
    runner = make(epochs=2, **{'default_hooks.checkpoint.max_keep_ckpts': 1})
    (ours,) = (hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    runner._hooks.remove(ours)
    runner.register_hook(dict(type='CheckpointHook', max_keep_ckpts=1))

    def full(out_dir, filename, *args, **kwargs):
        if filename == 'epoch_2.pth':
            raise UserError('the disk is full')
        type(runner).save_checkpoint(runner, out_dir, filename, *args, **kwargs)

    runner.save_checkpoint = full
    with pytest.raises(UserError, match='full'):
        runner.train()
    assert list((ROOT / runner.work_dir).glob('*.pth')) == []


STACK = """
import ctypes, sys
import numpy as np, onnx
from onnx import TensorProto, helper
from gdrq_mm.deploy.runtime import OpenVino, _SignalStack

def stack():
    found = _SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.start, found.flags, found.size

weight = helper.make_tensor('w', TensorProto.FLOAT, [4, 3, 3, 3], [i % 7 - 3.0 for i in range(108)])
x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (('x', [1, 3, 8, 8]), ('y', None)))
graph = helper.make_graph([helper.make_node('Conv', ['x', 'w'], ['y'])], 'graph', [x], [y], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
inputs, before = [np.zeros((1, 3, 8, 8), np.float32)], stack()
compiled = OpenVino(model.SerializeToString())
getattr(compiled, sys.argv[1])(inputs)
print('kept' if stack() == before else 'left')
"""


@pytest.mark.parametrize(('call', 'stack'), [('_run', 'left'), ('__call__', 'kept')])
def test_openvino_leaves_a_signal_stack(call, stack):
    """See deploy/runtime.py."""
    pytest.importorskip('openvino')
    done = subprocess.run([sys.executable, '-c', STACK, call], env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, stack), done.stderr


class Operators(nn.Module):
    """Two of mmcv's operators that take contiguous tensors only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.deform = RoIAlign((7, 7), 1.0, 0), DeformConv2d(4, 4, 3, padding=1)
        self.x, self.offsets = torch.randn(2, 4, 16, 16), torch.randn(2, 18, 16, 16)
        self.regions = torch.tensor([[0, 1, 1, 9, 9], [1, 2, 2, 12, 14.0]])

    def forward(self, memory_format):
        x, offsets = (value.to(memory_format=memory_format) for value in (self.x, self.offsets))
        return self.pool(x, self.regions), self.deform(x, offset=offsets)


def test_operators_of_mmcv_get_contiguous_tensors():
    model = Operators()
    expected = model(torch.contiguous_format)
    assert not torch.allclose(model.pool(model.x.to(memory_format=torch.channels_last), model.regions), expected[0])
    use_memory_format(model, Config(dict(memory_format='channels_last')))
    torch.testing.assert_close(model(torch.channels_last), expected)


@pytest.mark.parametrize('sync_bn', [None, 'mmcv'])
def test_the_synchronized_bn_of_mmcv_becomes_that_of_torch(monkeypatch, sync_bn):
    """It is no BN to torch: nothing would fold it into a layer or freeze its statistics."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2) if sync_bn else SyncBatchNorm(4, eps=1e-3, momentum=0.2)
    finally:
        torch.distributed.destroy_process_group()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    before = {name: (id(value), value.clone()) for name, value in model.named_parameters()}
    model = synchronized(model, sync_bn)
    assert isinstance(model[1], SYNCED) and (model[1].eps, model[1].momentum) == (1e-3, 0.2)
    assert {name: id(value) for name, value in model.named_parameters()} == {n: i for n, (i, _) in before.items()}


@pytest.mark.parametrize(
    ('launcher', 'variables', 'lacking'),
    [
        ('pytorch', dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_PORT='1'), 'MASTER_ADDR is not set'),
        ('slurm', dict(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0'), 'SLURM_JOB_ID, SLURM_NODELIST are not'),
        (
            'mpi',
            dict.fromkeys(('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'), '0'),
            'MASTER_ADDR is not set',
        ),
    ],
)
def test_a_launcher_without_its_variables(monkeypatch, launcher, variables, lacking):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_JOB_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f'--launcher {launcher} is for processes that .* starts: {lacking}'):
        load_config(SimpleNamespace(launcher=launcher))


def test_a_library_that_cannot_be_imported_is_told_in_one_line(tmp_path, monkeypatch):
    """As mmcv without its operators, which mmdet finds while it is imported."""
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('assert False, "MMCV==9 is used but incompatible"')

    def run():
        import_module('mmcv')

    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition('.')[0] == 'mmcv']:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(tmp_path)
        message = ending(run)
    assert message.startswith('error: OpenMMLab cannot be imported: MMCV==9 is used but incompatible; ')
    assert message.endswith('doctor tells more')
