"""docs/methods.md: its table, its combinations, and the method that it adds."""

import re

import pytest
import torch

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.quantizers import ACTIVATION_METHODS, METHODS, WEIGHT_METHODS
from tests.helpers import ROOT
from tests.runs import train

GUIDE = (ROOT / 'docs/methods.md').read_text()
COMBINATIONS, METHOD = re.findall(r'```python\n(.*?)```', GUIDE, re.DOTALL)


@pytest.fixture
def added(monkeypatch):
    """The method of the guide, removed afterwards."""
    for registry in (WEIGHT_METHODS, METHODS):
        for name in list(registry):
            monkeypatch.setitem(registry, name, registry[name])
        monkeypatch.delitem(registry, 'quantile', raising=False)
    names: dict = {}
    exec(compile(METHOD, 'docs/methods.md', 'exec'), names)
    yield names['QuantileWeight']
    for registry in (WEIGHT_METHODS, METHODS):
        del registry['quantile']


def test_the_table_lists_every_method_with_its_bits():
    rows = dict(re.findall(r'^\| `(\w+)` \|.*?\| ([\d to]+) \|', GUIDE, re.MULTILINE))
    assert list(rows) == list(METHODS)
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


def test_the_added_method_trains(added, make):
    quantization = dict(method='quantile', weight=dict(bits=4, quantile=dict(q=0.98)), calibration_batches=1)
    runner = make(quantization=quantization, epochs=1)
    train(runner)
    layer = runner.model.backbone.layer1[0].conv1
    assert type(layer.weight_quant) is added and layer.weight_quant.q == 0.98
    expected = torch.quantile(layer.weight.detach().flatten(1).abs(), 0.98, dim=1)
    assert torch.equal(layer.weight_quant.threshold_of(layer.weight), expected)
    assert ACTIVATION_METHODS[METHODS['quantile'][1]] is type(layer.input_quant)
