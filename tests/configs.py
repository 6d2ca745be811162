"""The files of configs/ that several test files go through."""

import re

from mmengine.config import Config

from gdrq_mm.openmmlab.compat import mend_bases
from tests.helpers import ROOT

CONFIGS = ROOT / 'configs'
TASKS = {'cls': 'mmpretrain', 'det': 'mmdet', 'seg': 'mmseg'}
ALL = sorted(path for task in TASKS for path in (CONFIGS / task).rglob('*.py'))
QUANTIZED = [path for path in ALL if '_gdrq_' in path.name]
FULL_SCALE = [path for path in QUANTIZED if re.search(r"\[\s*'(mmpretrain|mmdet|mmseg)::", path.read_text())]
"""Those that quantize a model of OpenMMLab's own configs."""


def name(path):
    """A path below configs/."""
    return str(path.relative_to(CONFIGS))


def load(path):
    """The config of a file."""
    mend_bases()
    return Config.fromfile(path)


def bits_in_name(path):
    """(4, 4) of a file with w4a4 in its name."""
    weight, activation = re.search(r'_w(\d)a(\d)', path.stem).groups()
    return int(weight), int(activation)
