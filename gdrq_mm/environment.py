"""Checks of what is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .errors import UserError

UPSTREAM = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain')


def check_environment() -> None:
    """Refuse upstream OpenMMLab packages beside the onedl ones: both write the same import names.

    Raises:
        UserError: names the packages to remove.
    """
    found = []
    for name in UPSTREAM:
        try:
            found.append(f'{name} {version(name)}')
        except PackageNotFoundError:
            pass
    if found:
        names = ' '.join(f.split()[0] for f in found)
        raise UserError(
            f'upstream OpenMMLab packages are installed beside the onedl ones and overwrite them: {", ".join(found)}; '
            f'remove them (pip uninstall {names}) and install requirements.txt again'
        )
