"""Where a result comes from: the versions and the commit that it was measured with, and the hardware."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__

PACKAGE = Path(__file__).resolve().parents[1]
REVISION = 'revision.json'
"""File of an installed package with the commit that it was built from; setup.py writes it."""

ONEDL = ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain')
UPSTREAM = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain')
"""The two stacks of OpenMMLab, package by package."""
PACKAGES = (
    ('gdrq-mm',),
    ('torch',),
    ('torchvision',),
    *zip(ONEDL, UPSTREAM),
    ('numpy',),
)
"""Packages that decide a result; of those of OpenMMLab one of two stacks is installed, or none."""


def git_revision(package: Path = PACKAGE) -> dict[str, Any]:
    """Commit of the project, and whether anything but `docs/` had uncommitted changes; None where neither can be known.

    In a checkout it is asked of git; an installed package has it in a file. That package may lie in a repository of its
    user (a `.venv` in a project), whose commit is not ours.
    """
    folder = package.parent

    def git(*args: str) -> str:
        return subprocess.run(['git', '-C', folder, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        ours = '\nname = "gdrq-mm"\n' in (folder / 'pyproject.toml').read_text()
        if ours and Path(git('rev-parse', '--show-toplevel')) == folder.resolve():
            # A sweep writes its records below docs/: they change no result of its other cells.
            dirty = bool(git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!docs'))
            return dict(commit=git('rev-parse', 'HEAD'), dirty=dirty)
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass  # no pyproject.toml or that of another project, no git, no repository, or one without a commit
    try:
        found = json.loads((package / REVISION).read_text())
        return dict(commit=found['commit'], dirty=found['dirty'])
    except (OSError, ValueError, KeyError, TypeError):
        return dict(commit=None, dirty=None)


def provenance() -> dict[str, Any]:
    """When something was measured, with which versions and commit, and on which hardware."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    return dict(date=now, versions=versions(), hardware=hardware(), git=git_revision())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result."""
    found: dict[str, str | None] = {'python': platform.python_version()}
    for names in PACKAGES:
        there = [name for name in names if installed(name)] or names[:1]
        found.update({name: installed(name) for name in there})
    return {**found, 'gdrq-mm': __version__}


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Processor and cores; where torch was imported, its threads and accelerators."""
    name = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as file:
            name = next((line.split(':', 1)[1].strip() for line in file if line.startswith('model name')), name)
    found: dict[str, Any] = dict(cpu=name or platform.machine(), cores=os.cpu_count())
    if torch := sys.modules.get('torch'):
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found.update(threads=torch.get_num_threads(), gpus=gpus)
    return found
