"""What the comparison shows: every metric of a task, differences of the recipe, several schedules of one model."""

import csv
import io
import json
import re

import pytest
import torch
from markupsafe import escape
from rich.console import Console

from gdrq_mm.core.errors import UserError
from gdrq_mm.report.compare import NOT_MEASURED, comparison_rows, recipe_notes
from gdrq_mm.report.formats import comparison_csv, comparison_markdown, comparison_table
from gdrq_mm.report.html import html_report
from gdrq_mm.report.identity import is_control
from gdrq_mm.report.metrics import main_metric, number_of
from gdrq_mm.report.record import read_record, write_record
from tests.helpers import ROOT
from tests.records import record

DET = {
    'default_scope': 'mmdet',
    'model.type': 'MaskRCNN',
    'test_dataloader.dataset.type': 'CocoDataset',
    'test_dataloader.dataset.data_root': 'data/coco',
    'test_evaluator.type': 'CocoMetric',
}


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'epoch_1.pth')
    return str(tmp_path / 'epoch_1.pth')


@pytest.fixture
def made(checkpoint):
    """Makes a record: its checkpoint is called as it says, and was trained by the recipe."""

    def make(name, top1=90.0, quantized=True, start=None, epoch=3, recipe=None, metrics=None, seed=0, **changes):
        found = record(checkpoint, top1, quantized, seed, start and dict(file=f'{start}.pth', sha256=start), **changes)
        found['checkpoint'] = dict(file=f'{name}.pth', sha256=name)
        found['training'] |= dict(epoch=epoch, iter=100 * epoch, **(dict(recipe=recipe) if recipe else {}))
        return found if metrics is None else {**found, 'metrics': metrics}

    return make


def recipe(lr=0.1, epochs=3, **more):
    return dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr)), train_cfg=dict(max_epochs=epochs), **more)


def cells(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]


def test_a_runtime_that_ran_other_checkpoints_is_told(made):
    runtime = dict(backend='onnxruntime', parts=False)
    records = [made('f', quantized=False), made('a', 88.0, seed=0), made('b', 80.0, seed=1)]
    ran = [made(name, value, seed=seed, model=runtime) for name, value, seed in (('b', 80.0, 1), ('c', 95.0, 2))]
    (row,) = comparison_rows([*records, *ran])
    assert (row['quantized'], row['onnxruntime']) == ('84.00 ± 5.66', '87.50 (other checkpoints)')
    (row,) = comparison_rows([*records, *ran[:1]])
    assert row['onnxruntime'] == '80.00 (1 of 2 seeds)'


def test_a_metric_of_two_evaluators_has_two_rows(made):
    def both(a, b):
        return {'accuracy/top1': a, 'v2/accuracy/top1': b}

    rows = comparison_rows([made('f', quantized=False, metrics=both(90.0, 70.0)), made('q', metrics=both(88.0, 50.0))])
    assert cells(rows, 'metric', 'float', 'quantized', 'drop') == [
        ('top-1', '90.00', '88.00', '2.00'),
        ('top-1 (v2/accuracy/top1)', '70.00', '50.00', '20.00'),
    ]


# ---- one checkpoint, tested twice -----------------------------------------------------------------------------------


def test_the_mean_of_the_last_checkpoints_stands_beside_the_last_one(made):
    def last(found, number, top1):
        return {**found, 'metrics': {'accuracy/top1': top1}, 'checkpoints': [found['checkpoint']] * number}

    before, after = made('f', 92.0, False), made('q', 91.0, start='f')
    records = [last(before, 3, 90.0), before, after, last(after, 3, 88.0)]
    for given in (records, records[::-1]):
        rows = comparison_rows(given)
        assert sorted(cells(rows, 'float', 'quantized', 'drop')) == [
            ('90.00', '88.00', '2.00'),
            ('92.00', '91.00', '1.00'),
        ]
        assert {row['recipe'] for row in rows} == {'A', 'B'}


def test_the_whole_graph_of_an_export_counts_where_its_parts_were_tested_too(made):
    """By `gdrq test --backend`, and again with --parts, of one checkpoint."""

    def ran(top1, **parts):
        found = made('q', top1, start='f')
        return {**found, 'model': {**found['model'], 'backend': 'openvino', **parts}}

    records = [made('f', 92.0, False), made('q', 91.0, start='f'), ran(90.5), ran(90.75, parts=True)]
    for given in (records, records[::-1]):
        assert cells(comparison_rows(given), 'quantized', 'openvino') == [('91.00', '90.50')]


# ---- the float model, trained on ------------------------------------------------------------------------------------


def control(made, name, top1, **changes):
    """A record of a training with every quantizer off."""
    found = made(name, top1, start='float', **changes)
    return {**found, 'quantization': dict(weight=dict(bits=4), control=True)}


def test_a_control_stands_beside_the_float_model(made):
    records = [
        made('float', 90.0, quantized=False),
        made('a', 89.0, start='float', recipe=recipe()),
        control(made, 'b', 91.0, recipe=recipe(), seed=0),
        control(made, 'c', 92.0, recipe=recipe(), seed=1),
    ]
    columns = ('float', 'trained on', 'quantized', 'seeds', 'drop', 'drop, trained on')
    assert cells(comparison_rows(records), *columns) == [('90.00', '91.50 ± 0.71', '89.00', '1', '1.00', '2.50')]
    assert 'trained on' in comparison_markdown(records) and 'trained on' in html_report(records)
    assert 'trained on' not in comparison_markdown(records[:2])


def test_a_control_of_the_same_recipe_counts_where_there_are_several(made):
    records = [
        made('float', 90.0, quantized=False),
        made('a', 89.0, start='float', recipe=recipe(lr=0.1)),
        made('b', 88.0, start='float', recipe=recipe(lr=0.2)),
        control(made, 'c', 91.0, recipe=recipe(lr=0.1)),
        control(made, 'd', 92.0, recipe=recipe(lr=0.2)),
    ]
    assert cells(comparison_rows(records), 'quantized', 'trained on') == [('89.00', '91.00'), ('88.00', '92.00')]


DISTILL = dict(weight=dict(bits=4), distill=dict(temperature=2.0, teacher='float.pth'))
ONNX = dict(backend='onnxruntime')
SETTLED = dict(weight=dict(bits=4), schedule=dict(settle=0.1))


def with_settings(found, quantization):
    return {**found, 'quantization': {**quantization, **dict(control=is_control(found) or None)}}


def test_a_control_of_another_training_does_not_count(made):
    """Another length of the same training, another recipe, another epilogue; without any the cell is empty."""
    quantized, controlled = made('q', 83.0, start='float', epoch=2, recipe=recipe()), []
    for name, top1, changes in (('a', 80.0, dict(epoch=1)), ('b', 84.0, {}), ('c', 85.0, dict(recipe=recipe(lr=0.2)))):
        controlled.append(control(made, name, top1, **{**dict(epoch=2, recipe=recipe()), **changes}))
    controlled.append(with_settings(control(made, 'd', 86.0, epoch=2, recipe=recipe()), SETTLED))
    columns = ('quantized', 'trained on', 'drop, trained on')
    assert cells(comparison_rows([quantized, *controlled]), *columns) == [('83.00', '84.00', '1.00')]
    del controlled[1]
    assert cells(comparison_rows([quantized, *controlled]), *columns) == [('83.00', '', '')]


def test_a_control_with_the_distillation_of_the_row_comes_first(made):
    plain_, taught = (made(name, 83.0, start='float', recipe=recipe()) for name in 'pt')
    taught = with_settings(taught, DISTILL)
    taught['model']['options'] = dict(distill='T 2, weight 1')
    without = control(made, 'a', 84.0, recipe=recipe())
    own = with_settings(control(made, 'b', 86.0, recipe=recipe()), DISTILL)
    for controls, expected in (
        ([without, own], ['84.00', '86.00']),
        ([without], ['84.00'] * 2),
        ([own], ['', '86.00']),
    ):
        rows = comparison_rows([plain_, taught, *controls])
        assert [row['trained on'] for row in rows] == expected


def test_a_float_model_behind_a_quantized_one_is_the_baseline(made):
    """2 bits are trained from 4 bits, which were trained from float."""
    first, second = made('a', 89.0, start='float'), made('b', 88.0, start='a', recipe=recipe())
    second['training']['start']['start'] = first['training']['start']
    rows = comparison_rows([made('float', 90.0, quantized=False), first, second])
    assert cells(rows, 'float', 'quantized', 'drop') == [('90.00', '89.00', '1.00'), ('90.00', '88.00', '2.00')]
    del second['training']['start']['start']
    with pytest.raises(UserError, match='another checkpoint'):
        comparison_rows([made('float', 90.0, quantized=False), first, second])


@pytest.mark.parametrize(
    ('settings', 'other', 'line'),
    [
        ({}, dict(calibration_batches=64), 'calibration batches: A 8; B 64'),
        (DISTILL, {**DISTILL, 'distill': dict(teacher='large.pth')}, 'teacher: A float.pth; B large.pth'),
    ],
)
def test_other_settings_are_not_another_seed(made, settings, other, line):
    records = [made('float', 90.0, quantized=False)]
    for seed, each in enumerate((settings, other)):
        records.append(with_settings(made(f'q{seed}', 80.0 + seed, start='float', recipe=recipe(), seed=seed), each))
    assert cells(comparison_rows(records), 'recipe', 'quantized', 'seeds') == [('A', '80.00', '1'), ('B', '81.00', '1')]
    assert line in recipe_notes(records)


def test_a_training_that_was_resumed_otherwise_is_another_recipe(made):
    records = [made(f'q{seed}', 80.0, start='float', recipe=recipe(), seed=seed) for seed in range(2)]
    records[1]['training']['changed'] = ['after iteration 4: optim_wrapper.optimizer.lr 0.2 → 0.1']
    assert [row['recipe'] for row in comparison_rows(records)] == ['A', 'B']
    assert any('changed when resumed: A nothing; B after iteration 4' in line for line in recipe_notes(records))


def test_a_runtime_that_ran_some_seeds_says_so(made):
    records = [made(f'q{seed}', 80.0 + seed, start='float', recipe=recipe(), seed=seed) for seed in range(3)]
    ran = [made(f'q{n}', 70.0 + n, start='float', recipe=recipe(), seed=n, model=ONNX) for n in range(3)]
    assert comparison_rows([*records, ran[2]])[0]['onnxruntime'] == '72.00 (1 of 3 seeds)'
    assert comparison_rows([*records, *ran])[0]['onnxruntime'] == '71.00'


def test_a_page_has_a_line_for_each_float_model(made):
    records = [
        made('f', 90.0, quantized=False),
        made('g', 92.0, quantized=False),
        made('a', 89.0, start='f', recipe=recipe()),
        made('b', 91.0, start='g', recipe=recipe(lr=0.2)),
    ]
    page = html_report(records)
    assert 'float of A' in page and 'float of B' in page and 'float of' not in html_report(records[::2])


# ---- several metrics ------------------------------------------------------------------------------------------------


def test_a_loss_of_mask_ap_stands_beside_that_of_box_ap(made):
    both = [
        made(
            'a', quantized=False, metrics={'coco/bbox_mAP': 0.40, 'coco/segm_mAP': 0.37, 'coco/bbox_mAP_50': 0.6}, **DET
        ),
        made('b', metrics={'coco/bbox_mAP': 0.39, 'coco/segm_mAP': 0.17, 'coco/bbox_mAP_50': 0.6}, **DET),
    ]
    found = cells(comparison_rows(both), 'metric', 'float', 'quantized', 'drop')
    assert found == [('box AP', '40.00', '39.00', '1.00'), ('mask AP', '37.00', '17.00', '20.00')]
    assert 'mask AP' in shown(both) and 'mask AP' in comparison_markdown(both) and 'mask AP' in html_report(both)


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        ({'coco/segm_mAP': 0.5}, [('mask AP', '50.00')]),
        ({'coco_panoptic/PQ': 50.0}, [('PQ', '50.00')]),
        ({'lvis/bbox_AP': 0.5, 'lvis/segm_AP': 0.25}, [('LVIS box AP', '50.00'), ('LVIS mask AP', '25.00')]),
        ({'coco/AR@100': 0.5}, [('AR@100', '50.00')]),
        ({'mine/bbox_mAP': 0.5}, [('box AP (mine/bbox_mAP)', '50.00')]),
        ({'mine/number': 3.5}, [('mine/number', '3.50')]),
        ({}, [('box AP', '0.00')]),
        ({'mine/text': 'good'}, [('none', NOT_MEASURED)]),
    ],
)
def test_every_detector_has_a_row(made, metrics, expected):
    assert cells(comparison_rows([made('a', metrics=metrics, **DET)]), 'metric', 'quantized') == expected


@pytest.mark.parametrize(
    ('metrics', 'expected'),
    [
        ({'multi-label/mAP': 50.0, 'multi-label/f1-score': 40.0}, [('mAP', '50.00')]),
        ({'multi-label/precision': 30.0, 'multi-label/f1-score': 40.0}, [('F1', '40.00')]),
        ({'accuracy/top5': 50.0}, [('top-5', '50.00')]),
        ({'accuracy/top1': '91.5', 'accuracy/top5': 99.0}, [('top-1', '91.50')]),
        ({'top1': 91.5}, [('top-1 (top1)', '91.50')]),
    ],
)
def test_every_classifier_has_a_row(made, metrics, expected):
    assert cells(comparison_rows([made('a', metrics=metrics)]), 'metric', 'quantized') == expected


def test_a_metric_of_unknown_direction_has_no_drop(made):
    rows = comparison_rows([made('a', quantized=False, metrics={'rmse': 1.0}), made('b', metrics={'rmse': 2.0})])
    assert cells(rows, 'metric', 'float', 'quantized', 'drop') == [('rmse', '1.00', '2.00', '')]


def test_a_metric_that_one_record_lacks_leaves_the_others(made):
    both = [
        made('a', quantized=False, metrics={'coco/bbox_mAP': 0.4, 'coco/segm_mAP': 0.3}, **DET),
        made('b', metrics={'coco/segm_mAP': 0.2}, **DET),
    ]
    found = cells(comparison_rows(both), 'metric', 'float', 'quantized', 'drop')
    assert found == [('box AP', '40.00', NOT_MEASURED, ''), ('mask AP', '30.00', '20.00', '10.00')]
    assert NOT_MEASURED in html_report(both)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_differences_of_the_recipe_are_shown_one_line_each(made):
    lsq = dict(methods=['lsq', 'lsq'])
    one = made('a', recipe=recipe(0.1, 3, versions=dict(torch='2.1.0')))
    other = made('b', recipe=recipe(0.01, 300, versions=dict(torch='2.2.0')), epoch=300, model=lsq)
    other['versions'] = {**other['versions'], 'torch': '2.2.0'}
    assert cells(comparison_rows([one, other]), 'method', 'recipe') == [('GDRQ', 'A'), ('LSQ', 'B')]
    notes = recipe_notes([one, other])
    assert 'epochs: A 3; B 300' in notes and 'optim_wrapper.optimizer.lr: A 0.1; B 0.01' in notes
    assert 'versions.torch: A 2.1.0; B 2.2.0' in notes and 'train_cfg.max_epochs: A 3; B 300' in notes
    assert f'tested with torch: A {one["versions"]["torch"]}; B 2.2.0' in notes
    assert not [note for note in notes if 'SGD' in note]


def test_every_output_says_what_differs(made, tmp_path, run):
    records = [made('a', recipe=recipe(0.1)), made('b', recipe=recipe(0.01), model=dict(methods=['lsq', 'lsq']))]
    note = 'optim_wrapper.optimizer.lr: A 0.1; B 0.01'
    assert note in html_report(records) and note in comparison_markdown(records)
    assert all(note in row['differences'] for row in csv.DictReader(io.StringIO(comparison_csv(records))))
    for number, found in enumerate(records):
        write_record(found, tmp_path / f'{number}.json')
    done = run(ROOT / 'tools/compare_results.py', '0.json', '1.json')
    assert done.returncode == 0 and note in done.stdout.splitlines()


def test_an_equal_recipe_needs_no_word(made):
    records = [made('a', recipe=recipe()), made('b', recipe=recipe(), seed=1)]
    assert recipe_notes(records) == [] and cells(comparison_rows(records), 'recipe', 'seeds') == [('', '2')]


def test_old_records_show_how_long_they_were_trained(made):
    records = [made('a', epoch=3), made('b', epoch=300, model=dict(methods=['lsq', 'lsq']))]
    assert 'epochs: A 3; B 300' in recipe_notes(records)
    assert 'recipe: A not recorded; B recorded' in recipe_notes([records[0], made('c', recipe=recipe())])


def test_seeds_of_different_recipes_are_not_averaged(made):
    records = [
        made(f'{seed}', top1, recipe=recipe(lr), seed=seed) for seed, (top1, lr) in enumerate([(80, 0.1), (90, 0.2)])
    ]
    assert cells(comparison_rows(records), 'recipe', 'quantized', 'seeds') == [('A', '80.00', '1'), ('B', '90.00', '1')]


def test_seeds_that_stopped_early_are_averaged_and_the_lengths_shown(made):
    records = [made(f'{seed}', recipe=recipe(), seed=seed, epoch=epoch) for seed, epoch in enumerate((2, 3))]
    assert cells(comparison_rows(records), 'recipe', 'seeds') == [('', '2')]
    assert 'epochs: quantized 2 or 3' in recipe_notes(records)


# ---- several schedules of one model ---------------------------------------------------------------------------------


def test_two_schedules_of_one_model_are_both_shown_with_what_differs(made):
    records = [made('a', 80.0, recipe=recipe(0.1, 3)), made('b', 90.0, recipe=recipe(0.1, 300), epoch=300)]
    assert cells(comparison_rows(records), 'recipe', 'quantized') == [('A', '80.00'), ('B', '90.00')]
    assert 'epochs: A 3; B 300' in recipe_notes(records)
    page = html_report(records)
    assert 'GDRQ W4A4, recipe A' in page and 'GDRQ, recipe B' in page


def test_two_checkpoints_of_one_training_are_both_shown(made):
    records = [made('a', 80.0, recipe=recipe(), epoch=1), made('b', 90.0, recipe=recipe(), epoch=3)]
    assert cells(comparison_rows(records), 'recipe', 'quantized') == [('A', '80.00'), ('B', '90.00')]
    assert 'epochs: A 1; B 3' in recipe_notes(records)


def test_two_runs_that_differ_in_nothing_are_both_shown(made):
    records = [made('a', 80.0, recipe=recipe()), made('b', 81.0, recipe=recipe())]
    assert cells(comparison_rows(records), 'recipe', 'quantized') == [('A', '80.00'), ('B', '81.00')]
    assert 'checkpoint: A a.pth; B b.pth' in recipe_notes(records)


def test_two_float_schedules_stand_beside_what_was_trained_from_them(made):
    records = [
        made('short', 80.0, quantized=False),
        made('long', 90.0, quantized=False, epoch=300),
        made('a', 79.0, start='short'),
        made('b', 88.0, start='long'),
    ]
    found = cells(comparison_rows(records), 'float', 'quantized', 'drop', 'recipe')
    assert found == [('80.00', '79.00', '1.00', 'A'), ('90.00', '88.00', '2.00', 'B')]
    assert any(note.startswith('trained from: ') and 'A short.pth' in note for note in recipe_notes(records))
    page = html_report(records)
    assert 'top-1 80.00 %' in page and 'top-1 90.00 %' in page
    with pytest.raises(UserError, match='does not say from which of them'):
        comparison_rows([*records, made('c')])


def test_a_runtime_stands_in_the_row_of_its_checkpoint(made):
    records = [made('a', 80.0, recipe=recipe(0.1)), made('b', 90.0, recipe=recipe(0.2))]
    ran = [
        {**r, 'model': {**r['model'], 'backend': 'openvino'}, 'metrics': {'accuracy/top1': 70.0 + n}}
        for n, r in enumerate(records)
    ]
    found = cells(comparison_rows([*records, *ran]), 'quantized', 'openvino')
    assert found == [('80.00', '70.00'), ('90.00', '71.00')]


# ---- odd names and numbers ------------------------------------------------------------------------------------------


def shown(records):
    console = Console(file=io.StringIO(), width=400)
    console.print(comparison_table(records))
    return console.file.getvalue()


@pytest.mark.parametrize(
    'name', ['digits[v2]', '[red]x[/red]', '[/]', 'a|b', '\\|', '<b>&amp;', '*x*', '_x_', '`x`', '$x$']
)
def test_a_name_is_shown_as_it_is(made, name):
    found = made('a')
    found['data']['name'] = found['model']['name'] = name
    assert name in shown([found])
    page = html_report([found])
    assert str(escape(name)) in page
    assert columns_of(comparison_markdown([found]))['data'] == name


def columns_of(table):
    """The only row of a Markdown table as a dict, with what is escaped taken back."""
    head, _, row = (re.split(r'(?<!\\)(?:\\\\)*\|', line)[1:-1] for line in table.splitlines())
    plain = (re.sub(r'\\([^a-zA-Z0-9\s])', r'\1', cell.strip()) for cell in row)
    return dict(zip(map(str.strip, head), plain, strict=True))


def test_a_name_stays_on_one_line(made):
    found = made('a')
    found['data']['name'] = 'a\nb\r\x1b[31m'
    table = comparison_markdown([found])
    assert len(table.splitlines()) == 3 and columns_of(table)['data'] == 'a\\nb\\r\\x1b[31m'
    assert 'a\\nb\\r\\x1b[31m' in shown([found])
    html_report([found])


@pytest.mark.parametrize(
    ('value', 'expected'),
    [(float('nan'), 'nan'), (float('inf'), 'inf'), (1e308, '1e+308'), (10**400, 'inf'), ('91.5', '91.50')],
)
def test_odd_numbers_break_nothing(made, tmp_path, value, expected):
    records = [made(f'{seed}', metrics={'accuracy/top1': value}, seed=seed) for seed in range(2)]
    records += [made('f', quantized=False, metrics={'accuracy/top1': value})]
    for found in records:
        write_record(found, tmp_path / 'record.json')
        text = (tmp_path / 'record.json').read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
        read = read_record(tmp_path / 'record.json')
        assert read['task'] == 'cls' and main_metric(read)[1] == pytest.approx(number_of(value), nan_ok=True)
    assert expected in shown(records) and expected in comparison_markdown(records)
    assert expected in html_report(records)


def test_numbers_that_are_strings_are_numbers(made, tmp_path):
    found = made('a')
    found['training'] |= dict(seed='3', iter='391', epoch='1.5')
    found['model'] |= dict(bytes='500', bits=['4', '4'])
    write_record(found, tmp_path / 'record.json')
    read = read_record(tmp_path / 'record.json')
    assert [read['training'][key] for key in ('seed', 'iter', 'epoch')] == [3, 391, 1.5]
    assert read['model']['bytes'] == 500 and read['model']['bits'] == [4, 4]
    read['quantization']['schedule'] = dict(reshape='0.5')
    html_report([{**read, 'path': str(tmp_path / 'record.json')}])


def test_half_a_character_can_be_written(made, tmp_path):
    found = made('a')
    found['data']['name'] = '\ud800'
    (tmp_path / 'record.json').write_text(json.dumps(found))
    read = read_record(tmp_path / 'record.json')
    for text in (comparison_markdown([read]), comparison_csv([read]), html_report([read])):
        assert '\\ud800' in text.encode().decode()


def test_a_float_model_with_another_model_config_is_told(made):
    """As where the quantized config has another loss, or frozen stages: it is another model by its config."""
    before, after = made('a', 91.0, quantized=False), made('b', start='a')
    after['model'] = {**after['model'], 'config_sha256': 'another'}
    (note,) = [note for note in recipe_notes([before, after]) if 'not compared' in note]
    assert note.startswith(
        'b.pth was trained from a.pth, and they are not compared: the `model` of their configs differs'
    )
    assert not [note for note in recipe_notes([before, made('c', start='a')]) if 'not compared' in note]
