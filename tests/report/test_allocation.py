"""Mixed precision in reports: the page of an allocation, and what a comparison calls a model with many overrides."""

import io
import re

from PIL import Image

from gdrq_mm.core.mixed.allocation import Allocation, LayerBits
from gdrq_mm.core.mixed.budgets import Budget, Pair
from gdrq_mm.core.mixed.choices import Choice
from gdrq_mm.core.mixed.program import Program
from gdrq_mm.report.allocation import allocation_page, curve_picture
from gdrq_mm.report.identity import method_of


def allocation():
    """A layer with a choice, and one called <b> whose bits are given."""
    choices = [
        Choice('conv.weight', 'weight', ('conv',), (2, 4)),
        Choice('conv.input', 'activation', ('conv',), (4,), 'by config', ours=False),
        Choice('<b>.weight', 'weight', ('<b>',), (8,), 'last', ours=False),
        Choice('<b>.input', 'activation', ('<b>',), (8,), 'last', ours=False),
    ]
    tables = {'conv.weight': {2: 0.25, 4: 0.0}, 'conv.input': {4: 0.0}, '<b>.weight': {8: 0.0}, '<b>.input': {8: 0.0}}
    costs = {'conv': {Pair(2, 4): 20.0, Pair(4, 4): 40.0}, '<b>': {Pair(8, 8): 8.0}}
    layers = {'conv': ('conv.weight', 'conv.input'), '<b>': ('<b>.weight', '<b>.input')}
    program = Program(tables, layers, [Budget('size', 30, 200, 1, costs)])
    best = program.solve()
    rows = [
        LayerBits('conv', Pair(2, 4), ('', 'by config'), ({2: 0.25, 4: 0.0}, {}), 20.0, 0.714, 0.1),
        LayerBits('<b>', Pair(8, 8), ('last', 'last'), ({}, {}), 8.0, 0.286, 0.9),
    ]
    return Allocation(choices, program, best, program.uniform(), program.curve(), rows)


def test_the_page():
    page = allocation_page(allocation(), 'loss', 'a <net>', dict(config='a.py'))
    assert 'a &lt;net&gt;' in page and '&lt;b&gt;' in page and '<b>' not in page
    heads = re.findall(r'<button type="button">(.*?)</button>', page)
    assert heads == ['layer', 'W', 'A', 'W2', 'W4', 'bytes', '% size', '% ops', 'given']
    cells = re.findall(r'<td data-sort="(.*?)" class="number">(.*?)</td>', page)
    texts = [text for _, text in cells]
    assert texts[:9] == [
        *('conv', '<strong>2</strong>', '<strong>4</strong>', '<strong>0.25</strong>', '0'),
        *('20', '71.4%', '10.0%', 'A by config'),
    ]
    assert texts[9:12] == ['&lt;b&gt;', '<strong>8</strong>', '<strong>8</strong>']
    assert 'Budget size: 30 bytes (0.1500 of float); used: 29 bytes (0.1450 of float).' in page
    assert 'src="data:image/png;base64,' in page and 'src="http' not in page


def test_the_picture():
    with Image.open(io.BytesIO(curve_picture(allocation(), 'loss'))) as picture:
        assert picture.size[0] > 500


def test_a_comparison_tells_models_with_many_overrides_apart():
    def named(overrides):
        options = dict(overrides=overrides) if overrides else {}
        return method_of(dict(model=dict(methods=['gdrq', 'gdrq'], options=options, deployable=True)))

    many = {f'layer{i}': dict(weight=dict(bits=3)) for i in range(9)}
    other = {**many, 'layer0': dict(weight=dict(bits=2))}
    assert re.fullmatch(r'GDRQ \(overrides=9 layers, [0-9a-f]{4}\)', named(many)) and named(many) != named(other)
    assert named({'fc': dict(weight=dict(bits=3))}) == "GDRQ (overrides={'fc': {'weight': {'bits': 3}}})"
