"""What works around OpenMMLab and torch, each with the version it is for.

tests/openmmlab/test_compat.py fails where one is no longer needed. Three are larger and have files of their own, with
tests there too: batch normalization that is synchronized without a GPU (distributed.py), old checkpoints that go when
the new one is there (hooks/checkpoint.py), and the signal stack that OpenVINO leaves (deploy/runtime.py).
"""

from __future__ import annotations

import datetime
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dist import is_distributed

from ..core.errors import UserError

UPSTREAM = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain')

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
"""Private names of onedl-mmengine 0.10.12 that the package uses, as there is no public way; a test looks for each."""


def mend_bases() -> None:
    """Make `_base_ = 'mmseg::...'` and `_base_ = 'gdrq_mm::...'` work.

    onedl-mmengine 0.10.12 maps the former to mmsegmentation, a package that the onedl one does not have, and accepts no
    package that it does not list. It gives what a base config of a package builds the package's name as `_scope_`,
    where registries are looked for; ours has none, so that the scope is the config's default_scope. Not reported
    upstream.
    """
    MODULE2PACKAGE.update(mmseg='mmseg', gdrq_mm='gdrq_mm')
    if Config._get_cfg_path is not _path_and_scope:
        Config._get_cfg_path = staticmethod(_path_and_scope)


_get_cfg_path = Config._get_cfg_path


def _path_and_scope(path: str, filename: str) -> tuple[str, str | None]:
    """Path of a base config, and the scope of what it builds; None if its package has no registries."""
    path, scope = _get_cfg_path(path, filename)
    return path, scope if scope and find_spec(f'{scope}.registry') else None


def check_environment() -> None:
    """Refuse upstream OpenMMLab packages beside the onedl ones, which write the same import names, and transformers 5.

    onedl-mmpretrain 1.3.6 imports its multimodal models wherever transformers is installed; version 5 lacks what they
    take from it ("NoneType takes no arguments"). Not reported upstream.

    Raises:
        UserError: names the packages to remove.
    """
    if int((_installed('transformers') or '0').split('.')[0]) >= 5:
        raise UserError(
            f'transformers {_installed("transformers")} is installed; mmpretrain does not work with version 5 '
            '(pip install "transformers<5", or pip uninstall transformers)'
        )
    found = [f'{name} {_installed(name)}' for name in UPSTREAM if _installed(name)]
    if found:
        names = ' '.join(f.split()[0] for f in found)
        raise UserError(
            f'upstream OpenMMLab packages are installed beside the onedl ones and overwrite them: {", ".join(found)}; '
            f'remove them (pip uninstall {names}) and install requirements.txt again'
        )


def _installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        hosts = ('scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST'])
        os.environ['MASTER_ADDR'] = subprocess.check_output(hosts, text=True).split()[0]
    if options.get('timeout') is not None:
        options['timeout'] = datetime.timedelta(seconds=options['timeout'])
    torch.distributed.init_process_group(**{**options, 'backend': 'gloo'})
