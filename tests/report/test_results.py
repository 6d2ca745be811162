"""Run records and the comparison table."""

import copy
import csv
import hashlib
import io
import json
import re
import subprocess
from importlib.metadata import version

import pytest
import torch
from mmengine.config import Config
from rich.console import Console

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.describe import make_record, model_name
from gdrq_mm.report import provenance
from gdrq_mm.report.compare import comparison_rows
from gdrq_mm.report.formats import comparison_markdown, comparison_table
from gdrq_mm.report.record import find_records, read_record, write_record
from gdrq_mm.report.text import print_whole
from tests.helpers import ROOT, UPSTREAM
from tests.records import MODEL, config, record
from tests.runs import QUANTIZATION, TEST_ONLY, checkpoint_of, train


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'epoch_1.pth')
    return str(tmp_path / 'epoch_1.pth')


def test_a_record_says_what_was_tested_and_with_what(checkpoint, tmp_path):
    found = record(checkpoint, 91.5, quantized=True)
    assert found['checkpoint']['sha256'] == hashlib.sha256(open(checkpoint, 'rb').read()).hexdigest()
    assert (found['task'], found['training']['seed'], found['metrics']) == ('cls', 3, {'accuracy/top1': 91.5})
    assert found['versions']['torch'] == version('torch') and found['versions']['mmcv' if UPSTREAM else 'onedl-mmcv']
    assert found['hardware']['cores'] >= 1 and len(found['git']['commit']) == 40
    assert found['quantization'] == {'weight': {'bits': 4}} and found['model']['name'] == 'ResNet-18'
    assert found['data']['name'] == 'digits/cls'
    assert '/somewhere' not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


def git(folder, *args):
    subprocess.run(['git', '-C', folder, '-c', 'user.name=x', '-c', 'user.email=x', *args], check=True)


def test_only_the_projects_own_checkout_is_named(tmp_path):
    """Not a repository of a user in which the package is installed, or into which it was copied."""
    nothing = dict(commit=None, dirty=None)

    def git_revision(folder):
        return provenance.git_revision(folder / 'gdrq_mm')

    ours = '[project]\nname = "gdrq-mm"\n'
    (tmp_path / 'pyproject.toml').write_text(ours)
    assert git_revision(tmp_path) == nothing  # no repository
    git(tmp_path, 'init', '-q')
    assert git_revision(tmp_path) == nothing  # no commit
    (tmp_path / 'docs/records').mkdir(parents=True)
    (tmp_path / 'docs/records/a.json').write_text('{}')
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-q', '-m', 'first')
    (tmp_path / 'docs/records/a.json').write_text('{"a": 1}')  # a cell of a sweep is done; the next one runs on
    found = git_revision(tmp_path)
    assert len(found['commit']) == 40 and found['dirty'] is False
    (tmp_path / 'pyproject.toml').write_text(ours + 'version = "1"\n')
    assert git_revision(tmp_path) == {**found, 'dirty': True}
    copied, installed = tmp_path / 'third_party', tmp_path / '.venv/lib/site-packages'
    copied.mkdir()
    (copied / 'pyproject.toml').write_text(ours)
    installed.mkdir(parents=True)
    assert git_revision(copied) == git_revision(installed) == nothing
    for other in ('[project]\nname = "mine"\n', '[tool.mine]\n', 'not toml'):
        (tmp_path / 'pyproject.toml').write_text(other)
        assert git_revision(tmp_path) == nothing
    built = dict(commit='a' * 40, dirty=False)
    (installed / 'gdrq_mm').mkdir()
    for text, expected in ((json.dumps(built), built), ('[]', nothing), ('{}', nothing), ('{', nothing)):
        (installed / 'gdrq_mm/revision.json').write_text(text)  # what setup.py puts into a wheel
        assert git_revision(installed) == expected


def test_a_record_survives_writing_and_reading(checkpoint, tmp_path):
    found = record(checkpoint, 91.5, quantized=True)
    write_record(found, tmp_path / 'record.json')
    assert read_record(tmp_path / 'record.json') == json.loads(json.dumps(found))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['epoch_1.pth', 'record.json']


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"record_version": 99}', '\0\1'])
def test_what_is_not_a_record_is_refused(tmp_path, text):
    (tmp_path / 'record.json').write_text(text)
    with pytest.raises(UserError, match='record'):
        read_record(tmp_path / 'record.json')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda r: r.pop('task'), 'task is missing'),
        (lambda r: r.update(task='x'), "task='x' is not one of cls, det, seg"),
        (lambda r: r.update(model=[]), 'model is a list, not a dict'),
        (lambda r: r['model'].update(methods=['gdrq', 3]), 'model.methods is a int'),
        (lambda r: r['model'].update(bits=[4]), 'model.bits is not a list of 2'),
        (lambda r: r['model'].update(backend='x'), "model.backend='x' is not one of torch, onnxruntime, openvino"),
        (lambda r: r.update(training={}), 'training.seed is missing'),
        (lambda r: r['training'].update(start=3), 'training.start is a int, not a dict'),
        (lambda r: r['training'].update(start=dict(file='x')), 'training.start.sha256 is missing'),
        (lambda r: r['checkpoint'].update(sha256=[]), 'checkpoint.sha256 is a list'),
        (lambda r: r.update(hardware=dict(gpus=3)), 'hardware.gpus is a int'),
    ],
)
def test_a_record_without_what_a_comparison_needs_is_refused(checkpoint, tmp_path, change, message):
    found = record(checkpoint, 91.5, quantized=True)
    change(found)
    write_record(found, tmp_path / 'record.json')
    with pytest.raises(UserError, match=re.escape(f'record.json cannot be used: {message}')):
        read_record(tmp_path / 'record.json')


def test_a_deeply_nested_record_is_refused(tmp_path):
    (tmp_path / 'record.json').write_text('[' * 100_000)
    with pytest.raises(UserError, match='record'):
        read_record(tmp_path / 'record.json')


def test_names_of_models():
    assert model_name(config(**{'model.backbone.type': 'mmpretrain.VGG', 'model.backbone.depth': 16})) == 'VGG-16'
    assert model_name(config(**{'model.type': 'FasterRCNN'})) == 'FasterRCNN ResNet-18'


def test_the_model_of_a_pure_python_config_is_named_as_others_are(tmp_path):
    """Its types are classes."""
    parts = 'backbone=dict(type=ResNet, depth=18)'
    lines = [
        'from mmpretrain.models import ImageClassifier, ResNet',
        'from mmseg.models import EncoderDecoder, FCNHead',
        f'model = dict(type=ImageClassifier, {parts})',
        f'other = dict(type=EncoderDecoder, {parts}, decode_head=dict(type=FCNHead))',
    ]
    (tmp_path / 'pure.py').write_text('\n'.join(lines))
    cfg = Config.fromfile(tmp_path / 'pure.py')
    assert model_name(cfg) == 'ResNet-18'
    cfg.model = cfg.other
    assert model_name(cfg) == 'FCN ResNet-18'


def test_a_row_stands_beside_the_float_record_of_the_same_model_and_data(checkpoint):
    records = [record(checkpoint, 92.0, quantized=False), record(checkpoint, 91.5, quantized=True)]
    (row,) = comparison_rows(records)
    assert (row['float'], row['quantized'], row['drop'], row['bits']) == ('92.00', '91.50', '0.50', 'W4A4')
    assert row['size in MB'] == '4.00 → 0.50' and row['method'] == 'GDRQ'
    assert '| 92.00 | GDRQ | W4A4 | 91.50 | 1 | 0.50 |' in comparison_markdown(records)


def test_what_a_runtime_gave_stands_beside_torch(checkpoint):
    records = [record(checkpoint, 92.0, quantized=False), record(checkpoint, 91.5, quantized=True)]
    for backend, top1 in (('onnxruntime', 91.4), ('openvino', 91.6)):
        ran = record(checkpoint, top1, quantized=True)
        records.append({**ran, 'model': {**ran['model'], 'backend': backend}})
    (row,) = comparison_rows(records)
    assert [row[column] for column in ('quantized', 'seeds', 'drop', 'onnxruntime', 'openvino')] == [
        '91.50',
        '1',
        '0.50',
        '91.40',
        '91.60',
    ]
    assert '| 0.50 | 91.40 | 91.60 |' in comparison_markdown(records)
    (row,) = comparison_rows(records[:1] + records[2:3])
    assert (row['quantized'], row['onnxruntime']) == ('not run', '91.40')


@pytest.mark.parametrize(
    'change',
    [
        {'model.backbone.depth': 34},
        {'test_dataloader.dataset.type': 'ImageNet'},
        {'test_evaluator.topk': (1, 5)},
        {'test_dataloader.dataset.pipeline': [dict(type='CenterCrop')]},
    ],
)
def test_a_float_record_of_something_else_is_not_its_baseline(checkpoint, change):
    records = [record(checkpoint, 92.0, quantized=False, **change), record(checkpoint, 91.5, quantized=True)]
    if change.keys() & {'test_evaluator.topk', 'test_dataloader.dataset.pipeline', 'test_dataloader.dataset.type'}:
        with pytest.raises(UserError, match='different evaluation settings'):
            comparison_rows(records)
        return
    (row,) = comparison_rows(records)
    assert (row['float'], row['drop']) == ('not run', '')


def test_seeds_are_averaged(checkpoint, tmp_path):
    records = [record(checkpoint, 92.0, quantized=False)]
    for seed, top1 in enumerate((91.0, 91.5, 92.0)):
        records.append(
            {**record(checkpoint, top1, quantized=True, seed=seed), 'checkpoint': dict(file='', sha256=f'{seed}')}
        )
    (row,) = comparison_rows([*records, records[-1]])  # the last one is given twice
    assert (row['quantized'], row['seeds'], row['drop']) == ('91.50 ± 0.50', '3', '0.50')


def test_methods_and_bits_that_were_not_run_say_so(checkpoint):
    lsq, narrow = dict(methods=['lsq', 'lsq']), dict(bits=[2, 4])
    records = [record(checkpoint, 91.0, True), record(checkpoint, 90.0, True, model={**lsq, **narrow})]
    found = {(row['method'], row['bits']): row['quantized'] for row in comparison_rows(records)}
    assert found == {
        ('GDRQ', 'W4A4'): '91.00',
        ('GDRQ', 'W2A4'): 'not run',
        ('LSQ', 'W4A4'): 'not run',
        ('LSQ', 'W2A4'): '90.00',
    }


@pytest.mark.parametrize(
    'model, name',
    [
        (dict(methods=['dorefa', 'pact']), 'PACT'),
        (dict(methods=['gdrq', 'pact']), 'GDRQ/PACT'),
        (dict(options={'weight.clip': 'project', 'activation.k': 9.0}), 'GDRQ (clip=project, activation.k=9.0)'),
        (dict(deployable=False), 'GDRQ (deployable=False)'),
    ],
)
def test_a_method_is_named_with_its_settings(checkpoint, model, name):
    (row,) = comparison_rows([record(checkpoint, 91.0, True, model=model)])
    assert row['method'] == name


def other(found):
    """The record of another checkpoint."""
    return {**found, 'checkpoint': dict(file='other.pth', sha256='0' * 64)}


def test_what_is_not_comparable_is_refused(checkpoint):
    before, after = (
        record(checkpoint, 92.0, False),
        record(checkpoint, 91.0, True, start=dict(file='a.pth', sha256='1')),
    )
    with pytest.raises(UserError, match=r'trained from another checkpoint \(a\.pth\)'):
        comparison_rows([before, after])
    with pytest.raises(UserError, match=r'epoch_1\.pth and other\.pth are float baselines of .* and .* does not say'):
        comparison_rows([before, other(before), record(checkpoint, 91.0, True)])
    start = dict(file='a.pth', sha256=before['checkpoint']['sha256'])
    assert len(comparison_rows([before, {**after, 'training': dict(seed=3, start=start)}])) == 1


def test_published_numbers_stand_in_a_column_of_their_own(checkpoint):
    changes = {'test_dataloader.dataset.data_root': 'data/imagenet', 'model.backbone.depth': 50}
    (row,) = comparison_rows([record(checkpoint, 75.0, True, **changes, model=dict(methods=['lsq', 'lsq']))])
    assert row['published'] == '76.9 (ProhetTeam/cls_quant_config, reproduced)' and row['quantized'] == '75.00'
    changes['model.backbone.depth'] = 18
    mixture = dict(methods=['gdrq', 'pact'], bits=[3, 4])
    (row,) = comparison_rows([record(checkpoint, 69.0, True, **changes, model=mixture)])
    assert row['published'] == '69.1 (XiaotaoChen/mx_quant_op, README, float 69.7)'
    (row,) = comparison_rows([record(checkpoint, 75.0, True)])
    assert row['published'] == ''
    fifth = record(checkpoint, 75.0, True, **changes, model=mixture)
    fifth['metrics'] = {'accuracy/top5': 89.0}
    assert [row['published'] for row in comparison_rows([fifth])] == [''], 'they are top-1'


def test_two_data_sets_of_one_layout_are_two(checkpoint):
    """As ImageNet and ImageNet-V2, with the same checkpoints."""
    found = []
    for root, before, after in (('data/imagenet', 90.0, 88.0), ('data/imagenetv2', 61.0, 52.0)):
        for value, quantized in ((before, False), (after, True)):
            one = record(checkpoint, value, quantized, **{'test_dataloader.dataset.data_root': root})
            one['checkpoint'] = dict(file='a.pth', sha256='quantized' if quantized else 'float')
            found.append(one)
    assert found[0]['data']['evaluation_sha256'] == found[2]['data']['evaluation_sha256']
    rows = comparison_rows(found)
    assert [(r['data'], r['float'], r['quantized']) for r in rows] == [
        ('imagenet', '90.00', '88.00'),
        ('imagenetv2', '61.00', '52.00'),
    ]


def test_a_metric_that_is_nan_stays_a_metric(checkpoint):
    """It was taken for one that was not measured, and left out of the mean."""
    records = [record(checkpoint, value, True, seed) for seed, value in enumerate((88.0, float('nan')))]
    for number, each in enumerate(records):
        each['checkpoint'] = dict(file=f'{number}.pth', sha256=str(number))
    (row,) = comparison_rows(records)
    assert row['quantized'].startswith('nan') and row['seeds'] == '2'


COMPARE = ROOT / 'tools/compare_results.py'


def test_the_tool_writes_every_format(checkpoint, tmp_path, run):
    write_record(record(checkpoint, 92.0, False), tmp_path / 'float.json')
    (tmp_path / 'run').mkdir()
    write_record(record(checkpoint, 91.0, True), tmp_path / 'run/record.json')
    (tmp_path / 'run/scalars.json').write_text('{"loss": 1}')
    done = run(COMPARE, 'float.json', 'run', '--markdown', 'new/table.md', '--csv', 'new/table.csv')
    assert done.returncode == 0, done.stderr
    assert 'GDRQ' in done.stdout and '91.00' in done.stdout and '1.00' in done.stdout
    assert '| GDRQ | W4A4 | 91.00 |' in (tmp_path / 'new/table.md').read_text()
    (row,) = csv.DictReader((tmp_path / 'new/table.csv').open())
    assert (row['float'], row['quantized'], row['published']) == ('92.00', '91.00', '')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['none.json'], 'none.json does not exist'),
        (['damaged.json'], 'record damaged.json cannot be read'),
        (['empty'], 'empty has no run record'),
        (['float.json'], 'all records are of float models'),
        (['old.json'], 'old.json is not a run record of version'),
        (['float.json', 'run.json', '--csv', 'float.json/a.csv'], '--csv float.json/a.csv cannot be written'),
        (['float.json', 'run.json', '--markdown', 'empty'], '--markdown empty is a folder'),
        (['float.json', 'run.json', '--csv', '/dev/full'], 'error: No space left on device'),
    ],
)
def test_bad_records_end_in_one_line(checkpoint, tmp_path, run, arguments, message):
    write_record(record(checkpoint, 92.0, False), tmp_path / 'float.json')
    write_record(record(checkpoint, 91.0, True), tmp_path / 'run.json')
    (tmp_path / 'damaged.json').write_text('{"record_version": 2, ')
    (tmp_path / 'old.json').write_text('{"record_version": 1}')
    (tmp_path / 'empty').mkdir()
    done = run(COMPARE, *arguments)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and message in done.stderr.splitlines()[-1]


def test_records_are_found_among_other_things_and_behind_links(checkpoint, tmp_path):
    """Work directories lie on another disk, and hold what is called .json without being a file."""
    runs = tmp_path / 'runs'
    (runs / 'folder.json').mkdir(parents=True)
    (runs / 'gone.json').symlink_to('nothing')
    (tmp_path / 'disk/run').mkdir(parents=True)
    write_record(record(checkpoint, 92.0, False), tmp_path / 'disk/run/record.json')
    (runs / 'run').symlink_to(tmp_path / 'disk/run')
    (tmp_path / 'disk/run/back').symlink_to(runs)
    assert [found['path'] for found in find_records([runs])] == [str(runs / 'run/record.json')]


@pytest.mark.parametrize('width', [40, 400])
def test_no_cell_of_a_table_is_cut(checkpoint, width):
    records = [record(checkpoint, 92.0, False), record(checkpoint, 91.234, True)]
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    print_whole(console, comparison_table(records))
    assert '…' not in console.file.getvalue() and '91.23' in console.file.getvalue() and console.width == width


def test_where_the_first_weights_came_from_does_not_matter(checkpoint):
    other = record(checkpoint, 92.0, quantized=False, **{'model.backbone.init_cfg': None})
    (row,) = comparison_rows([other, record(checkpoint, 91.5, quantized=True)])
    assert row['float'] == '92.00'


def test_the_config_is_not_changed(checkpoint):
    cfg = config()
    before = copy.deepcopy(cfg)
    make_record(cfg, checkpoint, {'accuracy/top1': 1.0}, MODEL, {})
    assert cfg.to_dict() == before.to_dict()


# ---- a real test run ------------------------------------------------------------------------------------------------


@pytest.fixture
def tested(make):
    """Runs what tools/test.py runs: (checkpoint, **changes) to the record."""

    def test(checkpoint, **changes):
        runner = make('test', load_from=checkpoint, **TEST_ONLY, **changes)
        return make_record(runner.cfg, checkpoint, runner.test(), runner.describe(), runner.training)

    return test


@pytest.fixture
def quantized_checkpoint(make):
    runner = make(epochs=1)
    train(runner)
    return checkpoint_of(runner)


def test_the_record_of_a_real_run(tested, quantized_checkpoint, tmp_path):
    found = tested(quantized_checkpoint)
    fields = 'record_version time task model data metrics quantization config checkpoint training git versions hardware'
    assert list(found) == fields.split()
    assert found['quantization'] == QUANTIZATION and found['task'] == 'cls'
    assert 0 <= found['metrics']['accuracy/top1'] <= 100
    model = found['model']
    assert (model['methods'], model['bits'], model['stage']) == (['gdrq', 'gdrq'], [4, 4], 'quantize')
    state = read_checkpoint(quantized_checkpoint)['state_dict']
    parameters = [value.numel() for name, value in state.items() if name.endswith(('.weight', '.bias'))]
    assert model['parameters'] == sum(parameters) and model['float_bytes'] > 6 * model['bytes'] > 0
    with open(quantized_checkpoint, 'rb') as file:
        assert found['checkpoint'] == dict(file='epoch_1.pth', sha256=hashlib.sha256(file.read()).hexdigest())
    write_record(found, tmp_path / 'record.json')
    assert read_record(tmp_path / 'record.json') == found


def test_a_record_holds_no_path_of_the_machine(tested, quantized_checkpoint):
    text = json.dumps(tested(quantized_checkpoint))
    assert re.findall(r'(?<![\w.:/])/[\w.-]+/[\w./-]+', text) == []


def test_real_records_make_a_row(tested, float_checkpoint, quantized_checkpoint):
    before, after = tested(float_checkpoint, quantization=None), tested(quantized_checkpoint)
    assert before['quantization'] is None and before['model']['bits'] == [32, 32]
    assert before['model']['float_bytes'] == before['model']['bytes'] == after['model']['float_bytes']
    (row,) = comparison_rows([after, before])
    scores = [record['metrics']['accuracy/top1'] for record in (before, after)]
    assert [row[column] for column in ('float', 'quantized', 'drop')] == [
        f'{score:.2f}' for score in (*scores, scores[0] - scores[1])
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(comparison_table([before, after], narrow=True))
    shown = console.file.getvalue()
    assert 'ResNet_CIFAR-18' in shown and row['quantized'] in shown and 'top-1 in %' in shown
    assert comparison_rows([before]) == []
