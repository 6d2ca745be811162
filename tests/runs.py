"""Small real runs of OpenMMLab configs that several test files share."""

import copy
import itertools
import re
from importlib import import_module
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook

from gdrq_mm.core.quantizers import Quantizer
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.tasks import dataset_of
from tests.helpers import ROOT

COUNTS = {'cls': {'train': 64, 'test': 40}, 'scenes': {'train': 1, 'test': 1}}
"""Pictures of the small data set; all ten classes are in both splits."""
SCENES = {'cls': {'train': 64, 'test': 20}, 'scenes': {'train': 8, 'test': 4}}
FEW_SCENES = SCENES['scenes']['test']
TASK_CONFIGS = dict(
    cls='cls/resnet18_width16_gdrq_w4a4_digits.py',
    det='det/faster_rcnn_r18_gdrq_w4a4_digits.py',
    seg='seg/pspnet_r18_gdrq_w4a4_digits.py',
)
"""A quantized config of each task."""
QUANTIZATION = dict(weight=dict(bits=4, groups=4), activation=dict(bits=4), calibration_batches=2)
TRAINING = (
    'train_dataloader',
    'train_cfg',
    'optim_wrapper',
    'param_scheduler',
    'val_dataloader',
    'val_cfg',
    'val_evaluator',
)
TEST_ONLY = dict.fromkeys(TRAINING)
"""What tools/test.py leaves out of a config."""

_number = itertools.count()


def tiny_config(data, work_dir, quantization=QUANTIZATION, epochs=3, **changes):
    """ResNet-18 of width 4 on the small digits: batches of 16, 4 iterations an epoch, a checkpoint after each epoch.

    `changes` are merged into it; `train_cfg` and `param_scheduler` replace what is there.
    """
    cfg = Config.fromfile(ROOT / 'configs/cls/resnet18_width16_digits.py')
    cfg.merge_from_dict(
        {
            'model.backbone.stem_channels': 4,
            'model.backbone.base_channels': 4,
            'model.backbone.zero_init_residual': False,  # else residual branches give 0 at first
            'model.head.in_channels': 32,
            'train_dataloader.batch_size': 16,
            'train_cfg.max_epochs': epochs,
            'param_scheduler.T_max': epochs,
            'default_hooks.logger.interval': 1,
            'default_hooks.checkpoint.max_keep_ckpts': -1,
            'optim_wrapper.optimizer.lr': 0.02,
            'log_level': 'ERROR',
        }
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(data / 'cls')
    cfg.work_dir = str(work_dir)
    # mmengine finds message hub and visualizer by this name; its own is the same for two runs of one second.
    cfg.experiment_name = f'test{next(_number)}'
    if quantization is not None:
        cfg.quantization = copy.deepcopy(quantization)
    for key in [key for key in ('train_cfg', 'param_scheduler') if key in changes]:
        cfg[key] = changes.pop(key)
    cfg.merge_from_dict(changes)
    hooks = cfg.get('custom_hooks') or []
    if all(hook['type'] != 'StatisticsHook' for hook in hooks):  # half of the time of a small run
        cfg.custom_hooks = [*hooks, dict(type='StatisticsHook', interval=0)]
    return cfg


def task_config(task, data, work_dir):
    """The config of TASK_CONFIGS on the pictures of SCENES: one epoch of two iterations, no validation."""
    cfg = read_config(ROOT / 'configs' / TASK_CONFIGS[task])
    cfg.work_dir, cfg.load_from, cfg.log_level = str(work_dir), None, 'ERROR'
    cfg.experiment_name = f'{task}-{work_dir.name}'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        dataset_of(loader).data_root = str(data / ('cls' if task == 'cls' else 'scenes'))
        loader.batch_size = FEW_SCENES
        loader.dataset.indices = 2 * FEW_SCENES
    if task == 'det':
        cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(data / 'scenes/annotations/test.json')
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = None
    cfg.quantization.calibration_batches = 1
    if task == 'det':  # an untrained model is sure of nothing
        cfg.model.test_cfg.rcnn.score_thr = 0.0
    return cfg


class At(Hook):
    """Calls a function with the runner: by default after each training iteration, when our hooks are done."""

    def __init__(self, function, point='after_train_iter', priority='LOWEST'):
        self.priority = priority
        setattr(self, point, lambda runner, *args, **kwargs: function(runner))


def train(runner, function=None):
    """Train, call the function after each iteration; returns the state of the model."""
    if function is not None:
        runner.register_hook(At(function))
    runner.train()
    return runner.model.state_dict()


def checkpoint_of(runner, name='epoch_1.pth'):
    """Path of a checkpoint of a run."""
    return str(Path(runner.work_dir) / name)


def scores_of(runner):
    """A list that evaluation fills with what the classifier puts out, a tensor a batch."""
    found = []
    runner.model.head.fc.register_forward_hook(lambda m, args, out: None if m.training else found.append(out.clone()))
    return found


def contents(runner, name):
    """What a checkpoint must hold to the last bit."""
    checkpoint = read_checkpoint(checkpoint_of(runner, name))
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    progress = {key: checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')}
    return {**{part: checkpoint[part] for part in parts if part in checkpoint}, 'progress': progress}


def tool_function(name):
    """What a script of tools/ runs, which does its work by sys.argv, to call it in this process."""
    (command,) = re.findall(r"^    main\('(\w+)'\)$", (ROOT / 'tools' / name).read_text(), re.MULTILINE)
    return import_module(f'gdrq_mm.commands.{command}').main


def quantizers_of(runner):
    """Name -> quantizer of a run's model."""
    return {name: m for name, m in runner.model.named_modules() if isinstance(m, Quantizer)}
