"""What several test files share."""

import pytest

from gdrq_mm.datasets import digits
from gdrq_mm.runner import QuantRunner
from tests.helpers import COUNTS, checkpoint_of, tiny_config


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """The embedded data set with a few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', COUNTS)
        return digits.build(tmp_path_factory.mktemp('data') / 'digits', show_progress=False)


@pytest.fixture
def config(digits_root, tmp_path):
    """Makes the config of a small run below tmp_path: `config(name, **changes)`."""
    return lambda name='run', **changes: tiny_config(digits_root, tmp_path / name, **changes)


@pytest.fixture
def make(config):
    """Builds a QuantRunner for it."""
    return lambda name='run', **changes: QuantRunner.from_cfg(config(name, **changes))


@pytest.fixture(scope='session')
def float_checkpoint(digits_root, tmp_path_factory):
    """Path of a training checkpoint of the float model after one epoch."""
    folder = tmp_path_factory.mktemp('float')
    runner = QuantRunner.from_cfg(tiny_config(digits_root, folder, quantization=None, epochs=1))
    runner.train()
    return checkpoint_of(runner)
