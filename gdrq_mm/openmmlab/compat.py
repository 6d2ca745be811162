"""Checks of what is installed."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mmengine.logging

from ..core.errors import UserError

UPSTREAM = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain')

_print_log = mmengine.logging.print_log


def mute_debug_prints() -> None:
    """Keep back what libraries print at debug level: without a logger, mmengine 0.10.12's print_log ignores the level.

    "Could not import OneDL", of a data format that nobody here uses, looks like a broken installation.
    """

    def print_log(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        if logger is not None or level >= logging.INFO:
            _print_log(msg, logger, level)

    mmengine.logging.print_log = print_log


def check_environment() -> None:
    """Refuse upstream OpenMMLab packages beside the onedl ones, which write the same import names, and transformers 5.

    mmpretrain 1.3.6 imports its multimodal models wherever transformers is installed; version 5 lacks what they take
    from it ("NoneType takes no arguments").

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
