"""What works around OpenMMLab, each with the version it is for; what older torch lacks is in core/compat.py.

There are two stacks of OpenMMLab: the `onedl-` packages, which are maintained, and upstream's own. Both work.

tests/openmmlab/test_compat.py fails where one is no longer needed. Three are larger and have files of their own, with
tests there too: batch normalization that is synchronized without a GPU (distributed.py), old checkpoints that go when
the new one is there (hooks/checkpoint.py), and the signal stack that OpenVINO leaves (deploy/runtime.py).
"""

from __future__ import annotations

import datetime
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dist import is_distributed
from mmengine.utils import get_installed_path, is_installed
from torch import Tensor

from .. import CONFIGS
from ..core.errors import UserError
from ..report.provenance import ONEDL, UPSTREAM, installed

PRIVATE = {
    'mmengine.runner.Runner': (
        '_train_loop',
        '_hooks',
        '_load_from',
        '_resume',
        '_has_loaded',
        '_randomness_cfg',
        '_maybe_compile',
    ),
    'mmengine.optim.OptimWrapper': ('_accumulative_counts', '_inner_count'),
    'mmengine.visualization.Visualizer': ('_vis_backends',),
    'mmengine.hooks.CheckpointHook': ('_save_checkpoint_with_step', '_save_best_checkpoint'),
}
"""Private names of mmengine 0.10.7 and onedl-mmengine 0.10.12 that the package uses, as there is no public way; a test
looks for each."""


def mend_bases() -> None:
    """Make `_base_ = 'mmseg::...'` and `_base_ = 'gdrq_mm::...'` work.

    onedl-mmengine 0.10.12 maps the former to mmsegmentation, a package that its stack does not have. Neither it nor
    mmengine 0.10.7 accepts a package that it does not list, and both look for an editable one where it does not lie.
    They give what a base config of a package builds the package's name as `_scope_`, where registries are looked for;
    ours has none, so that the scope is the config's default_scope. For each base in a package they read the lists of
    all its models and never find it there, as they leave out the `.py`: half a second for mmdet's, several times a
    config. Not reported upstream.
    """
    if not installed('mmsegmentation'):
        MODULE2PACKAGE.update(mmseg='mmseg')
    if Config._get_cfg_path is not _path_and_scope:
        Config._get_cfg_path = staticmethod(_path_and_scope)


_get_cfg_path = Config._get_cfg_path


def _path_and_scope(path: str, filename: str) -> tuple[str, str | None]:
    """Path of a base config, and the scope of what it builds; None if its package has no registries."""
    package, _, name = path.partition('::')
    if package == 'gdrq_mm' and name:
        return str(CONFIGS / name), None
    if package in MODULE2PACKAGE and is_installed(MODULE2PACKAGE[package]):
        found = Path(get_installed_path(MODULE2PACKAGE[package]), '.mim', 'configs', name)
        if found.is_file():
            return str(found), package
    return _get_cfg_path(path, filename)  # raises what is wrong


def check_environment() -> None:
    """Refuse a mixture of both stacks, which write the same import names, and transformers 5.

    mmpretrain 1.2.0 and onedl-mmpretrain 1.3.6 import their multimodal models wherever transformers is installed;
    version 5 lacks what they take from it ("NoneType takes no arguments"). Not reported upstream.

    Raises:
        UserError: names the packages to remove.
    """
    if int((installed('transformers') or '0').split('.')[0]) >= 5:
        raise UserError(
            f'transformers {installed("transformers")} is installed; mmpretrain does not work with version 5 '
            '(pip install "transformers<5", or pip uninstall transformers)'
        )
    ours, theirs = ([name for name in stack if installed(name)] for stack in (ONEDL, UPSTREAM))
    if ours and theirs:
        raise UserError(
            f'two stacks of OpenMMLab are installed, and overwrite each other: {", ".join(ours)} and '
            f'{", ".join(theirs)}; remove both (pip uninstall {" ".join(ours + theirs)}) and install one again'
        )


def mute_warnings() -> None:
    """Keep a warning off the screen that is for mmengine, not for its users.

    mmengine 0.10.7 imports pkg_resources where a config has a base in a package, and setuptools 80 warns whoever sees
    that import; onedl-mmengine 0.10.12 does not import it.
    """
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)


TOLD_BY = {
    'pytorch': {},
    'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID'),
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
    },
}
"""Launcher -> variable of torch.distributed -> the variable in which the launcher tells it."""


def needed_variables(launcher: str) -> list[str]:
    """Variables that the processes of a launcher find; [] for 'none'. MASTER_ADDR is that of the first process."""
    if launcher == 'pytorch':
        return ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT']
    own = list(TOLD_BY.get(launcher, {}).values())
    more = dict(slurm=['SLURM_JOB_ID', 'SLURM_NODELIST'], mpi=['MASTER_ADDR'])
    return own + more.get(launcher, [])


def init_without_gpu(launcher: str, options: dict[str, Any]) -> None:
    """Start the process group by gloo where there is no GPU; mmengine's setup_env then leaves it as it is.

    onedl-mmengine 0.10.12 calls torch.cuda.set_device in each process of a launcher. Not reported upstream.

    Args:
        launcher: 'pytorch', 'slurm' or 'mpi'; nothing is done for 'none'.
        options: `env_cfg.dist_cfg` of the config.
    """
    if torch.cuda.is_available() or launcher not in TOLD_BY or is_distributed():
        return
    options = {key: value for key, value in options.items() if key != 'init_backend'}
    os.environ.update({ours: os.environ[theirs] for ours, theirs in TOLD_BY[launcher].items()})
    if 'port' in options:
        os.environ['MASTER_PORT'] = str(options.pop('port'))
    os.environ.setdefault('MASTER_PORT', '29500')  # as mmengine does
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        hosts = ('scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST'])
        os.environ['MASTER_ADDR'] = subprocess.check_output(hosts, text=True).split()[0]
    if options.get('timeout') is not None:
        options['timeout'] = datetime.timedelta(seconds=options['timeout'])
    torch.distributed.init_process_group(**{**options, 'backend': 'gloo'})


def mend_losses(model: nn.Module) -> None:
    """Let mmseg's cross entropy with class weights work where labels are ignored, in place.

    mmsegmentation 1.2.2 looks up a weight for the ignored label (https://github.com/open-mmlab/mmsegmentation/issues/
    3734), onedl-mmsegmentation 1.4.2 fails with avg_non_ignore=True.
    """
    module: Any = sys.modules.get('mmseg.models.losses.cross_entropy_loss')
    if module is None:
        return
    loss: Any
    for loss in model.modules():
        if getattr(loss, 'cls_criterion', None) is module.cross_entropy:
            loss.cls_criterion = functools.partial(_cross_entropy, module.cross_entropy)  # type: ignore[arg-type]


def _cross_entropy(
    original: Callable[..., Tensor], pred: Tensor, label: Tensor, *args: Any, ignore_index: int = -100, **options: Any
) -> Tensor:
    """mmseg's, averaged over the weights of the labels that are not ignored."""
    weights = options.get('class_weight')
    if weights is not None and options.get('reduction') == 'mean' and options.get('avg_factor') is None:
        options['avg_factor'] = weights[label[label != ignore_index]].sum()
    return original(pred, label, *args, ignore_index=ignore_index, **options)
