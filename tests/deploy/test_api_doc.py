"""docs/api.md: its examples run and give what they say."""

import doctest

from tests.helpers import ROOT


def test_the_examples_run():
    result = doctest.testfile(str(ROOT / 'docs/api.md'), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted >= 20 and result.failed == 0
