"""report/analysis.py: order, table, JSON and picture of a result of the analysis."""

import json
import math

import cv2
import numpy as np

from gdrq_mm.report.analysis import Analysis, Metric, Row, analysis_dict, analysis_table, cost_picture, worst_first
from gdrq_mm.report.damage import Damage

TOP1 = 'accuracy/top1'
GOOD = Damage(4, 20.0, 0.01, 0.1, 0.5)
MADE = Analysis(
    [
        Row('a', 'layer', ('a',), GOOD, None, 80.0, 10.0),
        Row('b (input of 2)', 'shared input', ('b', 'c'), None, Damage(8, math.inf, 0, 0, 0.2), 91.0, -1.0),
        Row('d', 'layer', ('d',), GOOD, GOOD, 90.0, 0.0),
    ],
    Metric(TOP1, 'top-1', 1, 'float', 90.0, 75.0, True),
    pictures=1000,
    available=4000,
)


def picture(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


def test_the_order():
    rows = [
        Row('cheap', 'layer', (), GOOD, None, cost=0.0),
        Row('cheap and noisy', 'layer', (), GOOD, Damage(4, 3.0, 0, 0, 0), cost=0.0),
        Row('helps', 'layer', (), Damage(4, 1.0, 0, 0, 0), None, cost=-1.0),
        Row('dear', 'layer', (), Damage(4, 40.0, 0, 0, 0), None, cost=1.0),
    ]
    assert [row.name for row in worst_first(rows)] == ['dear', 'cheap and noisy', 'cheap', 'helps']
    assert [row.bits for row in MADE.rows] == ['W4', 'A8', 'W4A4']


def test_the_json():
    written = json.loads(json.dumps(analysis_dict(MADE, task='cls'), allow_nan=False))
    assert list(written)[:2] == ['analysis_version', 'task']
    assert written['rows'][0] == dict(
        name='a',
        kind='layer',
        readers=['a'],
        weight=dict(bits=4, sqnr=20.0, clip_ratio=0.01, quantized_loss=0.1, distance_to_uniform=0.5),
        input=None,
        metric=80.0,
        cost=10.0,
    )
    assert written['rows'][1]['input']['sqnr'] is None
    expected = dict(key=TOP1, title='top-1', factor=1, reference='float', unquantized=90.0, quantized=75.0)
    expected['of_pictures'] = True
    assert written['metric'] == expected


def test_the_table():
    table = analysis_table(MADE)
    header = [column.header for column in table.columns]
    cells = dict(zip(header, ([*map(str, column.cells)] for column in table.columns)))
    assert cells['layer'] == ['a', 'b (input of 2)', 'd'] and cells['cost'] == ['10.00', '-1.00', '0.00']
    assert cells['SQNR A'] == ['', 'inf', '20.0'] and cells['clip % W'] == ['1.00', '', '1.00']
    assert cells['note'] == ['', 'read by b, c', '']
    assert 'drop 15.00' in str(table.title) and '1000 of 4000 test pictures' in str(table.title)
    assert 'in sum 9.00' in str(table.title)
    assert 'cost' not in [c.header for c in analysis_table(Analysis(MADE.rows, None, 10, 40)).columns]


def test_a_cost_of_a_few_pictures_is_called_chance():
    """64 pictures, nothing lost, nine units of one picture each: 14.06 in sum, which says nothing."""
    rows = [Row(f'{n}', 'layer', (), GOOD, None, 75.0 - 100 / 64, 100 / 64) for n in range(9)]
    found = Analysis(rows, Metric(TOP1, 'top-1', 1, 'float', 75.0, 75.0, True), pictures=64, available=1000)
    assert 'drop 0.00' in found.summary() and 'do not add up to the drop' in found.summary()
    assert 'One picture is 1.56: what costs up to 10.83 may be chance' in found.summary()
    drawn = picture(cost_picture(found))
    red, gray = ((drawn == color).all(-1).sum() for color in ((40, 39, 214), (127, 127, 127)))
    assert red == 0 < gray
    other = Analysis(rows, Metric('mIoU', 'mIoU', 1, 'float', 75.0, 75.0), pictures=64, available=1000)
    assert 'One picture' not in other.summary()


def test_a_name_in_brackets_stays_in_the_table():
    found = Analysis([Row('layers[0]', 'layer', (), GOOD, None)], None, 10, 40)
    assert str(next(iter(analysis_table(found).columns[0].cells))) == 'layers[0]'


def test_the_picture_of_costs():
    drawn = picture(cost_picture(MADE))
    assert drawn.shape[1] > 1000
    red, gray = ((drawn == color).all(-1).sum() for color in ((40, 39, 214), (127, 127, 127)))
    assert red > 5 * gray > 100  # bars of 10 and of -1
    more = Analysis(MADE.rows * 10, MADE.metric, 10, 40)
    assert picture(cost_picture(more)).shape[0] > 2 * drawn.shape[0]
    bare = picture(cost_picture(Analysis(MADE.rows, None, 10, 40)))
    assert bare.shape[1] < drawn.shape[1] and (bare != 255).any()
