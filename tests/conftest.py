"""What several test files share."""

import pytest

from gdrq_mm.datasets import digits


@pytest.fixture(scope='session')
def digits_root(tmp_path_factory):
    """The embedded data set."""
    return digits.build(tmp_path_factory.mktemp('data') / 'digits', show_progress=False)
