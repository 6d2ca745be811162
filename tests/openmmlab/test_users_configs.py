"""Configs as users write them: what they leave out, name otherwise, or have elsewhere than this project's own."""

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.amp import use_amp
from gdrq_mm.openmmlab.apis import draw, infer, init_model
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.cli import check_data, read_config
from gdrq_mm.openmmlab.hooks import WholeCheckpointHook, with_whole_checkpoints
from gdrq_mm.openmmlab.mixed import check_target
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.runs import TASK_CONFIGS, task_config, tool_function

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def floats(scenes_root, tmp_path):
    """Makes the float config of a task."""

    def floats(task):
        cfg = task_config(task, scenes_root, tmp_path / task)
        cfg.pop('quantization')
        return cfg

    return floats


@pytest.fixture
def tested(tmp_path, monkeypatch):
    """Runs tools/test.py in this process, on random weights of a config's model."""

    def tested(cfg, *options):
        config, checkpoint = tmp_path / 'config.py', tmp_path / 'random.pth'
        cfg.dump(config)
        torch.save(dict(state_dict=init_model(cfg, device='cpu').state_dict()), checkpoint)
        monkeypatch.setattr(sys, 'argv', ['test.py', str(config), str(checkpoint), *map(str, options)])
        tool_function('test.py')()

    return tested


# ---- names of the libraries -----------------------------------------------------------------------------------------


def test_the_rate_is_scaled_with_a_sampler_of_batches(scenes_root, tmp_path):
    """As mmdet's configs have one: its data loader knows no batch size."""
    cfg = task_config('det', scenes_root, tmp_path)
    cfg.train_dataloader.batch_sampler = dict(type='AspectRatioBatchSampler')
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=4 * cfg.train_dataloader.batch_size)
    rate = cfg.optim_wrapper.optimizer.lr
    runner = QuantRunner.from_cfg(cfg)
    runner._train_loop = runner.build_train_loop(runner._train_loop)  # as in training, which comes first
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    assert {group['lr'] for group in runner.optim_wrapper.param_groups} == {rate / 4}


def test_batch_norms_folded_by_mmengine_are_refused(make):
    with pytest.raises(UserError, match='efficient_conv_bn_eval changes convolutions'):
        make(efficient_conv_bn_eval='[backbone]')
    assert make(quantization=None, efficient_conv_bn_eval='[backbone]')


def test_an_optimizer_of_the_library_trains(make):
    """mmpretrain has optimizers of its own, which only its registry knows."""
    runner = make(epochs=1, optim_wrapper=dict(_delete_=True, optimizer=dict(type='Lamb', lr=0.01)))
    runner.train()
    assert type(runner.optim_wrapper.optimizer).__name__ == 'Lamb'


@pytest.mark.parametrize('kind', ['CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook])
def test_checkpoints_are_written_whole_however_their_hook_is_named(kind):
    assert with_whole_checkpoints(dict(checkpoint=dict(type=kind)))['checkpoint']['type'] is WholeCheckpointHook


def test_a_config_of_a_package_is_the_same_base_from_everywhere(tmp_path):
    name = 'gdrq_mm::cls/resnet18_width16_gdrq_w4a4_digits.py'
    assert check_target(tmp_path / 'new.py', name) == name
    assert check_target(tmp_path / 'new.py', str(tmp_path / 'a.py')) == 'a.py'


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason='without a GPU')
def test_options_of_the_wrapper_for_GPUs_do_not_stop_one_for_CPUs():
    cfg = Config(dict(default_scope='mmpretrain', optim_wrapper=dict(type='AmpOptimWrapper', loss_scale=512.0)))
    cfg.optim_wrapper.update(dtype='float16', accumulative_counts=2)
    use_amp(cfg)
    assert set(cfg.optim_wrapper) == {'type', 'accumulative_counts'}


# ---- data that are not there ----------------------------------------------------------------------------------------


def test_a_test_needs_the_test_data_only(floats, tested):
    cfg = floats('cls')
    cfg.train_dataloader.dataset.data_root = 'nowhere'
    tested(cfg)
    assert (Path(cfg.work_dir) / 'record.json').is_file()
    with pytest.raises(UserError, match='train_dataloader: the data folder nowhere does not exist'):
        check_data(cfg)


@pytest.mark.parametrize('place', ['dataset', 'pipeline'])
def test_data_behind_a_storage_backend_are_no_folder(place):
    options = dict(backend_args=dict(backend='petrel', path_mapping={'data/': 's3://data/'}))
    dataset = dict(data_root='data/elsewhere', pipeline=[dict(type='LoadImageFromFile')])
    (dataset if place == 'dataset' else dataset['pipeline'][0]).update(options)
    check_data(Config(dict(train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dataset)))))


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_models_of_several_tasks_are_drawn_in_one_program(floats):
    """Each by its own library, and by its own settings: mmengine keeps visualizers by their name."""
    models = [init_model(floats(task), device='cpu') for task in TASK_CONFIGS]
    for model in models:
        assert draw(model, NOISE, infer(model, NOISE), 0.0).shape == (320, 320, 3)
    opaque = floats('seg')
    opaque.visualizer.alpha = 1.0
    model = init_model(opaque, device='cpu')
    model.load_state_dict(models[-1].state_dict())
    prediction = infer(model, NOISE)
    assert (draw(model, NOISE, prediction) != draw(models[-1], NOISE, prediction)).any()


@pytest.mark.parametrize('task', TASK_CONFIGS)
def test_a_model_is_drawn_without_a_visualizer_and_without_names_of_classes(floats, task):
    cfg = floats(task)
    cfg.pop('visualizer')
    cfg.test_dataloader.dataset.pop('metainfo', None)
    model = init_model(cfg, device='cpu')
    assert draw(model, NOISE, infer(model, NOISE), 0.0).shape == (320, 320, 3)


def test_classes_are_those_of_the_data_set_or_of_an_old_checkpoint(floats, tmp_path):
    cfg = floats('seg')
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[dict(type='CityscapesDataset', pipeline=[])])
    cfg.test_dataloader.dataset.datasets[0].pipeline = floats('seg').test_dataloader.dataset.pipeline
    model = init_model(cfg, device='cpu')
    assert len(model.dataset_meta['classes']) == len(model.dataset_meta['palette']) == 19
    meta = dict(CLASSES=['a'] * 11, PALETTE=[[1, 2, 3]] * 11)  # where mmsegmentation 0.x wrote them
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'old.pth')
    assert init_model(cfg, tmp_path / 'old.pth', device='cpu').dataset_meta == dict(
        classes=['a'] * 11, palette=meta['PALETTE']
    )


@pytest.mark.parametrize('task', TASK_CONFIGS)
def test_predictions_are_drawn_without_default_hooks_and_visualizer(floats, tested, tmp_path, task):
    cfg = floats(task)
    cfg.pop('default_hooks')
    cfg.pop('visualizer')
    tested(cfg, '--show-dir', tmp_path / 'shown')
    assert list((tmp_path / 'shown').rglob('*.png')) or list((tmp_path / 'shown').rglob('*.jpg'))


# ---- evaluators -----------------------------------------------------------------------------------------------------


def test_predictions_of_several_data_sets_are_written(floats, tested, tmp_path):
    """mmdet's evaluator of several data sets asks one metric for each of them, and no other."""
    cfg = floats('det')
    del cfg.test_dataloader.dataset['indices']
    datasets = [copy.deepcopy(cfg.test_dataloader.dataset) for _ in range(2)]
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=datasets)
    metrics = [copy.deepcopy(cfg.test_evaluator) for _ in range(2)]
    cfg.test_evaluator = dict(type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['one', 'two'])
    tested(cfg, '--out', tmp_path / 'found.pkl')
    found = pickle.loads((tmp_path / 'found.pkl').read_bytes())
    assert len(found) == 8 and all('pred_instances' in each for each in found)


def test_masks_are_written_where_the_evaluator_is_spelt_out(floats, tested, tmp_path):
    cfg = floats('seg')
    cfg.test_evaluator = dict(type='Evaluator', metrics=[cfg.test_evaluator])
    tested(cfg, '--out', tmp_path / 'masks')
    assert len(list((tmp_path / 'masks').glob('*.png'))) == 4


def test_predictions_that_are_not_evaluated_are_no_result(floats, tested, tmp_path):
    """Without metrics a record would say that nothing was detected: a box AP of 0."""
    cfg = floats('det')
    cfg.test_evaluator.update(format_only=True, outfile_prefix=str(tmp_path / 'found'))
    tested(cfg, '--record', tmp_path / 'record.json')
    assert (tmp_path / 'found.bbox.json').exists() and not (tmp_path / 'record.json').exists()


# ---- what else users write ------------------------------------------------------------------------------------------


def test_a_config_that_stops_early_is_tested(floats, tested):
    cfg = floats('cls')
    cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=3)]
    tested(cfg)
    assert (Path(cfg.work_dir) / 'record.json').is_file()


def test_other_ways_to_evaluate_have_records_of_their_own(floats, tested):
    cfg = floats('cls')
    cfg.tta_model = dict(type='AverageClsScoreTTA')
    cfg.tta_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
                [dict(type='PackInputs')],
            ],
        ),
    ]
    tested(cfg)
    before = (Path(cfg.work_dir) / 'record.json').read_bytes()
    tested(cfg, '--tta')
    assert (Path(cfg.work_dir) / 'record.json').read_bytes() == before
    assert (Path(cfg.work_dir) / 'record_tta.json').is_file()


def test_a_hook_of_checkpoints_needs_no_type():
    """As with `--cfg-options default_hooks.checkpoint.interval=2` and no default_hooks in the config."""
    hook = with_whole_checkpoints(dict(checkpoint=dict(max_keep_ckpts=2)))['checkpoint']
    assert hook == dict(type=WholeCheckpointHook, interval=1, max_keep_ckpts=2)


def written(tmp_path, text):
    (tmp_path / 'config.py').write_text(text)
    return read_config(tmp_path / 'config.py')


@pytest.mark.parametrize('text', ['import no_such_package\n', None], ids=['in the module', 'the module'])
def test_a_module_that_cannot_be_imported_is_named(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = 'no_such_package'
    if text:
        name = 'module_that_imports_it'
        (tmp_path / f'{name}.py').write_text(text)
    with pytest.raises(UserError, match=r"custom_imports: No module named 'no_such_package'.*PYTHONPATH"):
        written(tmp_path, f'custom_imports = dict(imports=[{name!r}])\nmodel = dict(type="x")\n')


def test_a_config_in_the_new_style_has_the_scope_of_its_model(tmp_path):
    text = """
from mmengine.config import read_base
from mmpretrain.models import ImageClassifier, LinearClsHead, ResNet_CIFAR
default_scope = None
model = dict(type=ImageClassifier, backbone=dict(type=ResNet_CIFAR, depth=18), head=dict(type=LinearClsHead))
"""
    assert written(tmp_path, text).default_scope == 'mmpretrain'


def test_a_config_in_the_new_style_is_no_base_of_what_allocate_writes(tmp_path):
    (tmp_path / 'new.py').write_text(
        'from mmpretrain.models import ImageClassifier\nmodel = dict(type=ImageClassifier)\n'
    )
    with pytest.raises(UserError, match=r'a config in the new style \(read_base\).*dump\(NEW\)'):
        check_target(tmp_path / 'out.py', str(tmp_path / 'new.py'))
    Config.fromfile(tmp_path / 'new.py').dump(tmp_path / 'old.py')
    assert check_target(tmp_path / 'out.py', str(tmp_path / 'old.py')) == 'old.py'


def test_none_switches_an_inherited_quantization_off(tmp_path):
    (tmp_path / 'base.py').write_text('model = dict(type="x")\nquantization = dict(weight=dict(bits=4))\n')
    assert 'quantization' not in written(tmp_path, '_base_ = ["base.py"]\nquantization = None\n')


def test_a_folder_is_no_checkpoint(tmp_path):
    (tmp_path / 'epoch_3.pth').write_bytes(b'')
    with pytest.raises(UserError, match=r'is a folder; the checkpoints in it: epoch_3\.pth'):
        read_checkpoint(str(tmp_path))
