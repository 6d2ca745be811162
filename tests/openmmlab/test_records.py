"""The record of a real test: it states what the checkpoint was trained with, and no result of an evaluator is lost."""

import json
import os

import numpy as np
import pytest
import torch
from mmengine.config import Config

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.files import file_digest
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.cli import prepare_test, read_config
from gdrq_mm.openmmlab.describe import make_record, mean_of, model_name
from gdrq_mm.openmmlab.recipe import other_settings, settings_of, trained_as, training_of
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.report.compare import comparison_rows
from gdrq_mm.report.recipe import recipe_key
from gdrq_mm.report.record import read_record, write_record
from tests.helpers import ROOT
from tests.records import MODEL, config
from tests.runs import QUANTIZATION, TEST_ONLY, checkpoint_of, tiny_config

EPOCH = dict(by_epoch=True, max_epochs=1, val_interval=1)
OTHER = {**QUANTIZATION, 'weight': dict(bits=4, groups=4, gdrq=dict(clip='project'))}


@pytest.fixture(scope='module')
def tested(digits_root, tmp_path_factory, run_in):
    """What tools/test.py wrote and said: a config with another clip, absolute paths only, and a confusion matrix."""
    folder = tmp_path_factory.mktemp('records')
    cfg = tiny_config(digits_root, folder / 'run', epochs=1)
    runner = QuantRunner.from_cfg(cfg)
    runner.train()
    cfg = tiny_config(digits_root, folder / 'test', quantization=OTHER, log_level='INFO')
    cfg.test_evaluator = [dict(type='Accuracy', topk=(1,)), dict(type='ConfusionMatrix')]
    cfg.optim_wrapper.optimizer.lr = 0.5  # not what the checkpoint was trained with
    dataset = cfg.test_dataloader.dataset
    dataset.data_prefix = os.path.join(dataset.pop('data_root'), dataset.data_prefix)
    cfg.dump(folder / 'test.py')
    (done,) = run_in(folder, [{}], ROOT / 'tools/test.py', 'test.py', checkpoint_of(runner), '--record', 'record.json')
    assert done.returncode == 0, done.stderr
    return folder / 'record.json', done.stdout + done.stderr


def test_a_record_states_what_the_checkpoint_was_trained_with(tested):
    path, said = tested
    found = read_record(path)
    assert (
        found['quantization'] == QUANTIZATION
        and found['model']['options'] == settings_of(Quantization.from_dict(QUANTIZATION))['options']
    )
    assert comparison_rows([found])[0]['method'] == 'GDRQ'
    line = "weight.clip is 'not set' in the checkpoint and 'project' in the config; the record states the former"
    assert line in said
    recipe = found['training']['recipe']
    assert recipe['optim_wrapper']['optimizer']['lr'] == 0.02 and recipe['train_cfg']['max_epochs'] == 1
    assert recipe['batch_size'] == 16 and recipe['versions']['torch'] == torch.__version__.partition('+')[0]
    assert 'quantization' not in found['training']


def test_a_confusion_matrix_does_not_cost_the_result(tested):
    found = read_record(tested[0])
    assert 0 <= found['metrics']['accuracy/top1'] <= 100
    matrix = np.array(found['other_metrics']['confusion_matrix/result'])
    assert matrix.shape == (10, 10) and matrix.sum() == 40


def test_a_test_set_of_absolute_paths_has_a_record_without_folders_of_the_machine(tested, digits_root):
    found = read_record(tested[0])
    assert found['data']['name'].endswith('cls/test') or found['data']['name'] == 'test'
    assert found['data']['root'] == 'test'
    assert str(digits_root) not in json.dumps(found)


def test_a_training_that_is_resumed_with_other_settings_says_so(digits_root, tmp_path):
    QuantRunner.from_cfg(tiny_config(digits_root, tmp_path, epochs=2, **{'train_cfg': EPOCH})).train()
    changes = {'train_cfg': {**EPOCH, 'max_epochs': 2}, 'load_from': str(tmp_path / 'epoch_1.pth'), 'resume': True}
    same = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path / 'same', epochs=2, **changes))
    same.train()
    other = QuantRunner.from_cfg(
        tiny_config(digits_root, tmp_path / 'other', epochs=2, **changes, **{'optim_wrapper.optimizer.lr': 0.5})
    )
    other.train()
    kept = [read_checkpoint(checkpoint_of(runner, 'epoch_2.pth'))['meta'] for runner in (same, other)]
    assert 'changed' not in training_of(kept[0])
    assert training_of(kept[1])['changed'] == ['after iteration 4: optim_wrapper.optimizer.lr 0.02 → 0.5']


def test_2_bits_that_start_from_4_bits_name_the_float_model(digits_root, tmp_path):
    started = []
    for name, quantization, before in (('f', None, None), ('a', QUANTIZATION, 'f'), ('b', OTHER, 'a')):
        start = before and str(tmp_path / before / 'epoch_1.pth')
        cfg = tiny_config(digits_root, tmp_path / name, quantization, epochs=1, load_from=start)
        QuantRunner.from_cfg(cfg).train()
        started.append(read_checkpoint(str(tmp_path / name / 'epoch_1.pth'))['meta']['start'])
    assert started[0] is None and started[1]['start'] is None
    assert started[2]['start'] == started[1] and started[1]['sha256'] == file_digest(tmp_path / 'f/epoch_1.pth')


def test_a_calibrated_model_was_trained_for_no_epoch(digits_root, tmp_path):
    runner = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path, epochs=1))
    runner.calibrate(str(tmp_path / 'calibrated.pth'))
    meta = read_checkpoint(str(tmp_path / 'calibrated.pth'))['meta']
    assert (meta['epoch'], meta['iter']) == (0, 0)


def test_a_record_does_not_call_the_tested_checkpoint_the_teacher(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path, {**QUANTIZATION, 'distill': dict(temperature=2.0)}, load_from='x.pth')
    prepare_test(cfg, 'tested.pth')
    with pytest.raises(UserError, match=r'tested\.pth does not exist'):
        QuantRunner.from_cfg(cfg)
    assert 'teacher' not in cfg.quantization.distill


def test_a_record_does_not_show_the_folder_of_the_teacher():
    quantization = {**QUANTIZATION, 'distill': dict(temperature=2.0, teacher='/home/someone/float.pth')}
    record = make_record(config(), 'none.pth', {}, MODEL, dict(quantization=quantization))
    assert record['quantization']['distill']['teacher'] == 'float.pth' and 'someone' not in str(record)


def evaluation(**dataset):
    cfg = config()
    cfg.test_dataloader.dataset = dict(type='CustomDataset', **dataset)
    cfg.test_evaluator = [dict(type='CocoMetric', ann_file=dataset.get('ann_file'))]
    return make_record(cfg, 'none.pth', {}, MODEL, {})['data']


def test_where_absolute_paths_lie_does_not_matter():
    here, there = (
        evaluation(ann_file=f'{root}/data/coco/ann/val.json', data_prefix=dict(img=f'{root}/data/coco/val'))
        for root in ('/one', '/another/place')
    )
    assert here['name'] == there['name'] == 'coco'
    assert here['evaluation_sha256'] == there['evaluation_sha256']
    other = evaluation(ann_file='/one/data/coco/ann/test.json', data_prefix=dict(img='/one/data/coco/val'))
    assert other['evaluation_sha256'] != here['evaluation_sha256']


@pytest.mark.parametrize('dataset', [dict(), dict(data_root=''), dict(data_root=None), dict(ann_file='')])
def test_a_test_set_without_any_path_has_a_record(dataset):
    assert evaluation(**dataset)['name'] == 'CustomDataset'


def test_data_sets_that_are_put_together_have_a_record():
    both = [dict(type='A', data_root='/x/data/digits/a'), dict(type='B', data_root='/x/data/digits/b')]
    assert evaluation(datasets=both)['name'] == 'digits'


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (torch.tensor(3.5), 3.5),
        (np.float32(3.5), 3.5),
        (torch.tensor([3.5]), 3.5),
        (True, 1.0),
    ],
)
def test_what_is_a_number_is_a_metric(value, expected):
    assert make_record(config(), 'none.pth', {'a': value}, MODEL, {})['metrics'] == {'a': expected}


@pytest.mark.parametrize(
    'value',
    [
        'text',
        None,
        [1, 2],
        {'a': np.arange(3)},
        torch.zeros(2, 3),
        np.array(['a']),
        object(),
        {1, 2},
        torch.zeros(999, 999),
    ],
)
def test_what_is_no_number_does_not_cost_the_metrics(tmp_path, value):
    found = make_record(config(), 'none.pth', {'accuracy/top1': 1.0, 'odd': value}, MODEL, dict(seed=0))
    write_record(found, tmp_path / 'record.json')
    read = read_record(tmp_path / 'record.json')
    assert read['metrics'] == {'accuracy/top1': 1.0} and 'odd' in read['other_metrics']
    assert (tmp_path / 'record.json').stat().st_size < 200_000


def test_a_checkpoint_of_an_older_version_is_described_by_the_config():
    cfg = config(quantization=OTHER)
    found = make_record(cfg, 'none.pth', {}, MODEL, training_of(dict(seed=1, epoch=2, iter=3)))
    assert found['quantization'] == OTHER and found['training'] == dict(seed=1, epoch=2, iter=3)


def test_differences_of_settings_are_named():
    assert other_settings(OTHER, OTHER) == [] == other_settings(None, None)
    assert other_settings(OTHER, QUANTIZATION) == [
        "weight.clip is 'project' in the checkpoint and 'not set' in the config"
    ]
    assert any(line.startswith('bits is [4, 4] in the checkpoint and [32, 32]') for line in other_settings(OTHER, None))


def test_a_recipe_holds_what_decides_the_training_and_no_folder(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path, custom_hooks=[dict(type='EMAHook', momentum=0.1)])
    found = trained_as(cfg, True, 2)['recipe']
    assert found['custom_hooks'][:1] == [dict(type='EMAHook', momentum=0.1)] and found['processes'] == 2
    assert found['param_scheduler']['T_max'] == 3
    assert str(digits_root) not in json.dumps(found)
    calibrated = trained_as(cfg, False, 1)['recipe']
    assert 'optim_wrapper' not in calibrated and calibrated['batch_size'] == 16


@pytest.mark.parametrize('path', sorted((ROOT / 'docs/records').glob('*_gdrq_w4a4_*.json')), ids=lambda p: p.stem)
def test_committed_records_stay_comparable_with_new_ones(path):
    """Their digests of architecture, data and evaluation are those that a test of the config would write today."""
    found = read_record(path)
    file = ROOT / found['config']['file']
    if not file.is_file():
        pytest.skip('its config has another name today')
    made = make_record(read_config(file), 'none.pth', {}, MODEL, {})
    assert made['data']['evaluation_sha256'] == found['data']['evaluation_sha256']
    assert made['data']['name'] == found['data']['name']
    assert made['model']['config_sha256'] == found['model']['config_sha256']


def test_classes_in_a_config_have_their_names():
    class ResNet:
        pass

    class ImageClassifier:
        pass

    cfg = Config(dict(model=dict(type=ImageClassifier, backbone=dict(type=ResNet, depth=18))))
    assert model_name(cfg) == 'ResNet-18'


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_checkpoint_that_detects_nothing_counts_in_the_mean(order):
    """mmdet returns no metrics for it."""
    runs = [({'coco/bbox_mAP': 0.5}), {}, {'coco/bbox_mAP': 0.4}]
    last, *others = (runs[number] for number in order)
    found = dict(task='det', metrics=last, checkpoint=dict(file='3.pth', sha256=None))
    mean = mean_of(found, {f'{number}.pth': metrics for number, metrics in enumerate(others)})
    assert mean['metrics'] == {'coco/bbox_mAP': pytest.approx(0.3)}
    assert [one['metrics'] for one in mean['checkpoints']] == [last, *others]
    assert mean_of({**found, 'metrics': {}}, {'2.pth': {}})['metrics'] == {}


def test_the_last_checkpoints_make_one_record(digits_root, tmp_path, run_in):
    runner = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path / 'run', epochs=2))
    runner.train()
    shares = np.bincount(runner.test_dataloader.dataset.get_gt_labels(), minlength=10)
    alone = []
    for epoch, digit in ((2, shares.argmin()), (1, shares.argmax())):
        file = str(tmp_path / f'run/epoch_{epoch}.pth')
        checkpoint = torch.load(file, weights_only=False)
        checkpoint['state_dict']['head.fc.bias'][digit] = 100  # says this digit to every picture, so the epochs differ
        torch.save(checkpoint, file)
        cfg = tiny_config(digits_root, tmp_path / 'test', load_from=file, **TEST_ONLY)
        alone.append(QuantRunner.from_cfg(cfg).test()['accuracy/top1'])
    tiny_config(digits_root, tmp_path / 'test').dump(tmp_path / 'test.py')
    tool = [ROOT / 'tools/test.py', 'test.py', 'run/epoch_2.pth', '--record', 'record.json', '--last']
    done, too_many = (run_in(tmp_path, [{}], *tool, last)[0] for last in (2, 3))
    assert done.returncode == 0, done.stderr
    found = read_record(tmp_path / 'record.json')
    assert [one['metrics']['accuracy/top1'] for one in found['checkpoints']] == alone and alone[0] != alone[1]
    assert found['metrics']['accuracy/top1'] == pytest.approx(sum(alone) / 2)
    assert [one['file'] for one in found['checkpoints']] == ['run/epoch_2.pth', 'run/epoch_1.pth']
    assert too_many.stderr.strip() == (
        'error: --last 3: at most 2, run has 1 checkpoints before epoch_2.pth; '
        'a training keeps default_hooks.checkpoint.max_keep_ckpts'
    )
    assert recipe_key(found) != recipe_key({**found, 'checkpoints': None})
