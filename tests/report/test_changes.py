"""What changed between two records: the rows, and where the page shows them."""

import json

import pytest

from gdrq_mm.report.changes import SPEED, changes
from gdrq_mm.report.html import html_report
from gdrq_mm.report.record import find_records, write_record
from tests.records import record


@pytest.fixture
def pair(tmp_path):
    """A float and a quantized record, each in a folder of its own."""
    for name, top1, quantized, size in (('float', 91.5, False, 4_000_000), ('w4a4', 90.25, True, 500_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'epoch_1.pth').write_bytes(name.encode())
        found = record(str(tmp_path / name / 'epoch_1.pth'), top1, quantized, model=dict(bytes=size))
        if not quantized:
            found['model']['bits'] = [32, 32]
        write_record(found, tmp_path / name / 'record.json')
    return find_records([tmp_path / 'float', tmp_path / 'w4a4'])


def write_speed(folder, exported, float32, **about):
    rows = [
        dict(graph='model', runtime='openvino', numbers=numbers, seconds=dict(median=ms / 1000))
        for numbers, ms in (('exported', exported), ('float32', float32))
    ]
    (folder / SPEED).write_text(json.dumps(dict(rows=rows, **about)))


def test_settings_accuracy_and_size(pair):
    found = changes(*pair)
    assert [*found] == ['settings', 'accuracy', 'size']
    settings = {row.name: row[1:3] for row in found['settings']}
    assert settings['quantization.weight.bits'] == ('not set', '4')
    assert 'seed' not in settings
    assert found['accuracy'] == [('top-1', '91.50', '90.25', '-1.25')]
    assert found['size'][0] == ('size in MB', '4.00', '0.50', '1/8.00')
    assert changes(*pair[::-1])['size'][0].change == '8.00 times'


def test_what_the_trainings_differ_in(pair):
    other = json.loads(json.dumps(pair[1]))
    other['training'] = {**other['training'], 'seed': 5, 'recipe': {'optimizer': {'lr': 0.1}}}
    rows = {row.name: row[1:3] for row in changes(pair[1], other)['settings']}
    assert rows == {'seed': ('3', '5'), 'optimizer.lr': ('not set', '0.1')}


def test_speed_is_that_of_the_benchmarks_beside_the_records(pair, tmp_path):
    write_speed(tmp_path / 'w4a4', 2.0, 9.0)
    assert changes(*pair)['speed'] == [('model in openvino, ms', '9.00', '2.00', '1/4.50')]
    write_speed(tmp_path / 'float', 8.0, 8.0)
    assert changes(*pair)['speed'] == [('model in openvino, ms', '8.00', '2.00', '1/4.00')]
    one = dict(threads=1, batch=1, hardware=dict(cpu='Xeon'), versions=dict(openvino='2026.4'))
    write_speed(tmp_path / 'float', 8.0, 8.0, **one)
    write_speed(tmp_path / 'w4a4', 2.0, 9.0, **one)
    assert changes(*pair)['speed'] == [('model in openvino, ms', '8.00', '2.00', '1/4.00')]
    write_speed(tmp_path / 'w4a4', 2.0, 9.0, **{**one, 'threads': 8, 'hardware': dict(cpu='EPYC')})
    assert changes(*pair)['speed'] == [
        ('speed: threads', '1', '8', ''),
        ('speed: processor', 'Xeon', 'EPYC', ''),
        ('model in openvino, ms', '8.00', '2.00', ''),
    ]
    for text in ('{', '[]', '{"rows": 3}', '{"rows": [{"graph": 1}]}', '\0'):
        (tmp_path / 'w4a4' / SPEED).write_text(text)
        assert 'speed' not in changes(*pair)


def test_the_page_of_two_records_says_what_changed(pair):
    page = html_report(pair)
    assert '<h2>What changed</h2>' in page and 'float/record.json' in page
    assert '<th scope="row">top-1</th><td>91.50</td><td>90.25</td><td>-1.25</td>' in page
    assert '<h2>What changed</h2>' not in html_report([*pair, {**pair[1], 'path': 'a third'}])
    assert '<h2>What changed</h2>' in html_report([*pair, pair[1]])  # one was given twice
