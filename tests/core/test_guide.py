"""docs/methods.md: its table and its combinations."""

import re

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.quantizers import METHODS, WEIGHT_METHODS
from tests.helpers import ROOT

GUIDE = (ROOT / 'docs/methods.md').read_text()
COMBINATIONS = re.findall(r'```python\n(.*?)```', GUIDE, re.DOTALL)[0]


def test_the_table_lists_every_method_with_its_bits():
    rows = dict(re.findall(r'^\| `(\w+)` \|.*?\| ([\d to]+) \|', GUIDE, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for name, bits in rows.items():
        allowed = WEIGHT_METHODS[METHODS[name][0]].allowed_bits
        assert bits == ' to '.join(str(b) for b in dict.fromkeys((allowed[0], allowed[-1]))), name


def test_the_combinations_are_valid():
    lines = [line for line in COMBINATIONS.splitlines() if line.strip()]
    found = []
    for line in lines:
        names: dict = {}
        exec(line, {}, names)
        cfg = Quantization.from_dict(names['quantization'])
        found.append((cfg.weight.method, cfg.activation.method))
    assert found == [('gdrq', 'pact'), ('lsq', 'lsq'), ('xnor', 'hwgq')]
