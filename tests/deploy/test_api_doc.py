"""docs/api.md: its examples run and give what they say."""

import doctest
import re

from gdrq_mm.core.compat import EXPORTS
from tests.helpers import ROOT


def test_the_examples_run():
    """Those of all sections; without the one about export, where torch is too old for it."""
    text = (ROOT / 'docs/api.md').read_text()
    if not EXPORTS:
        text, found = re.subn(r'^## export\(.*?(?=^## )', '', text, flags=re.DOTALL | re.MULTILINE)
        assert found == 1
    examples = doctest.DocTestParser().get_doctest(text, {}, 'api.md', 'docs/api.md', 0)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples)
    assert result.attempted >= 20 and result.failed == 0
