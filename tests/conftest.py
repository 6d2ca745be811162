"""What all test files share. The fixtures that need OpenMMLab are loaded where tests outside of the inner ring run."""

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch.utils.data._utils import signal_handling

from gdrq_mm.core import compat

if not compat.EXPORTS:  # what exports is skipped; tests/core/test_compat.py sees what a user is told
    SKIPPED = f'ONNX export needs torch 2.8 or newer, this is {torch.__version__}'
    compat.check_export = lambda: pytest.skip(SKIPPED, allow_module_level=True)

settings.register_profile('any machine', deadline=None)  # how long an example takes is no matter of right or wrong
settings.load_profile('any machine')

# A data loader with workers installs a handler of SIGCHLD for good, which then runs whenever a later test's child ends;
# where OpenVINO had left a signal stack that is not mapped (see deploy/runtime.py), that ended the process.
signal_handling._set_SIGCHLD_handler = lambda: None


def pytest_collection_finish():
    """Leave what the imports made out of garbage collection: mmengine collects whenever it builds a data set."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    inner = [Path(__file__).parent / ring for ring in ('core', 'deploy')]
    paths = [(config.invocation_params.dir / arg.split('::')[0]).resolve() for arg in config.args]
    if not all(any(path.is_relative_to(ring) for ring in inner) for path in paths):
        config.pluginmanager.import_plugin('tests.fixtures')
