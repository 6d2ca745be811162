"""A picture goes through the pipeline of the test data, whichever tool it is given to."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from gdrq_mm.commands.export import first_picture
from gdrq_mm.core.errors import UserError
from gdrq_mm.openmmlab.apis import draw, infer, init_model
from gdrq_mm.openmmlab.decode.boxes import NotCovered
from gdrq_mm.openmmlab.end2end import picture_of
from gdrq_mm.openmmlab.pictures import read_image
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.tasks import metainfo_of, use_tta
from tests.helpers import ROOT
from tests.runs import TEST_ONLY, checkpoint_of, task_config, tiny_config

GRAYSCALE = dict(type='LoadImageFromFile', color_type='grayscale')


@pytest.fixture(scope='module')
def grayscale(digits_root, tmp_path_factory):
    """A trained config of one channel; its checkpoint."""
    cfg = tiny_config(digits_root, tmp_path_factory.mktemp('grayscale') / 'run', epochs=1)
    cfg.model.backbone.in_channels = 1
    cfg.data_preprocessor = dict(num_classes=10, mean=[110], std=[55], to_rgb=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline[0] = copy.deepcopy(GRAYSCALE)
    runner = QuantRunner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return cfg, checkpoint_of(runner)


def predictions(cfg, checkpoint, name):
    """What a test predicts: path of the picture -> prediction."""
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict({**TEST_ONLY, 'load_from': checkpoint})
    cfg.test_dataloader.batch_size = 1
    cfg.experiment_name += name
    runner = QuantRunner.from_cfg(cfg)
    runner.load_or_resume()
    runner.model.eval()
    with torch.no_grad():
        found = [runner.model.test_step(batch)[0] for batch in runner.test_dataloader]
    return {sample.img_path: sample for sample in found}


def test_a_grayscale_model_infers_what_it_tests(grayscale):
    cfg, checkpoint = grayscale
    model = init_model(cfg, checkpoint)
    for path, expected in list(predictions(cfg, checkpoint, '-test').items())[:3]:
        for image in (path, cv2.imread(path)):
            assert torch.equal(infer(model, image).pred_score, expected.pred_score)


def test_gray_pixels_are_those_of_a_gray_file(grayscale):
    cfg, checkpoint = grayscale
    model = init_model(cfg, checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 20), np.uint8)
    assert torch.equal(infer(model, pixels).pred_score, infer(model, np.stack([pixels] * 3, -1)).pred_score)
    assert draw(model, pixels, infer(model, pixels)).shape[2] == 3


def picture(change):
    return change(np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8))


@pytest.mark.parametrize(
    'change',
    [
        lambda pixels: pixels.astype(float) / 255,
        lambda pixels: np.where(pixels > 9, pixels, np.nan).astype(np.float32),
        lambda pixels: pixels.astype(np.int64),
        lambda pixels: pixels.astype(bool),
        lambda pixels: pixels.astype(object),
        lambda pixels: pixels[..., :2],
        lambda pixels: pixels[..., :1],
        lambda pixels: np.concatenate([pixels, pixels], -1),
        lambda pixels: pixels.transpose(2, 0, 1),
        lambda pixels: pixels[None],
        lambda pixels: pixels[0, 0],
        lambda pixels: pixels[:0],
        lambda pixels: torch.from_numpy(pixels),
        lambda pixels: [pixels],
        lambda pixels: None,
    ],
)
def test_what_is_no_picture_is_refused(digits_root, tmp_path, change):
    model = init_model(tiny_config(digits_root, tmp_path, quantization=None))
    with pytest.raises(UserError, match=r'is no picture: give .*uint8 BGR pixels of shape \(H, W, 3\)$'):
        infer(model, picture(change))


def test_pixels_of_any_kind_stand_for_a_file_that_is_read_unchanged(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path, quantization=None)
    cfg.test_dataloader.dataset.pipeline[0].color_type = 'unchanged'
    model = init_model(cfg)
    pixels = picture(np.float32)
    assert torch.isfinite(infer(model, pixels).pred_score).all()
    with pytest.raises(UserError, match='is no picture'):
        infer(model, np.where(pixels > 9, pixels, np.nan))


def test_a_grayscale_model_without_a_plan_is_recorded(grayscale):
    model = init_model(grayscale[0])
    assert model.plan.calls and 'backbone.conv1' in model.plan.calls


def test_a_grayscale_model_is_exported(grayscale, tmp_path, run):
    pytest.importorskip('onnxruntime')
    cfg, checkpoint = grayscale
    cfg.dump(tmp_path / 'gray.py')
    done = run(ROOT / 'tools/export.py', 'gray.py', checkpoint, '--out', 'exported')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'exported/model.onnx').is_file()


def segmentor(scenes_root, folder, change):
    cfg = task_config('seg', scenes_root, folder)
    change(cfg)
    return cfg


def without_the_variable(cfg):
    cfg.pop('test_pipeline')


def with_another_variable(cfg):
    cfg.test_pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=1.0), dict(type='PackSegInputs')]


def repeated(cfg):
    """Wrapped, and joined."""
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        inner = loader.dataset
        loader.dataset = dict(type='RepeatDataset', times=1, dataset=dict(type='ConcatDataset', datasets=[inner]))
    without_the_variable(cfg)


@pytest.mark.parametrize('change', [without_the_variable, with_another_variable, repeated])
def test_the_pipeline_of_the_test_data_is_the_one(scenes_root, tmp_path, change):
    cfg = segmentor(scenes_root, tmp_path / 'run', change)
    QuantRunner.from_cfg(copy.deepcopy(cfg)).train()
    checkpoint = str(tmp_path / 'run/epoch_1.pth')
    model = init_model(cfg, checkpoint)
    path, expected = next(iter(predictions(cfg, checkpoint, '-test').items()))
    assert torch.equal(infer(model, path).seg_logits.data, expected.seg_logits.data)
    from mmseg.apis import inference_model

    with DefaultScope.overwrite_default_scope('mmseg'):
        assert torch.equal(inference_model(model, path).seg_logits.data, expected.seg_logits.data)


def test_test_data_without_a_pipeline_are_told(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path)
    for name in ('val_dataloader', 'test_dataloader'):
        cfg[name].dataset.pop('pipeline')
    with pytest.raises(UserError, match=r'test_dataloader\.dataset\.pipeline is missing'):
        init_model(cfg)


def test_augmentation_reaches_wrapped_test_data(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path)
    one = cfg.test_dataloader.dataset
    joined = dict(type='ConcatDataset', datasets=[one, copy.deepcopy(one)])
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=joined)
    use_tta(cfg)
    pipelines = [each.pipeline for each in cfg.test_dataloader.dataset.dataset.datasets]
    assert pipelines[0] == pipelines[1] == cfg.tta_pipeline and pipelines[0][-1].type == 'TestTimeAug'


def test_a_pipeline_that_normalizes_gives_no_picture_to_a_graph(digits_root, tmp_path):
    """Rounded to 8 bits, its values would be others."""
    cfg = tiny_config(digits_root, tmp_path, quantization=None)
    image = str(next(Path(digits_root).rglob('*.png')))
    cfg.test_dataloader.dataset.pipeline[0]['to_float32'] = True
    model = init_model(copy.deepcopy(cfg))
    assert picture_of(model, lambda: infer(model, image)).dtype == torch.uint8
    cfg.test_dataloader.dataset.pipeline[1:1] = [dict(type='Normalize', mean=[110.0] * 3, std=[55.0] * 3)]
    normalizing = init_model(cfg)
    with pytest.raises(NotCovered, match='no pictures of 8 bits'):
        picture_of(normalizing, lambda: infer(normalizing, image))


def test_the_first_picture_of_a_fold(digits_root, tmp_path):
    cfg = tiny_config(digits_root, tmp_path)
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='KFoldDataset', dataset=inner, fold=0, num_splits=3, test_mode=True)
    assert Path(first_picture(cfg)).is_file()


def test_classes_in_a_file(digits_root, tmp_path):
    (tmp_path / 'names.txt').write_text('zero\none\n')
    cfg = tiny_config(digits_root, tmp_path)
    for given in (dict(metainfo=dict(classes=f'{tmp_path}/names.txt')), dict(classes=f'{tmp_path}/names.txt')):
        changed = copy.deepcopy(cfg)
        changed.test_dataloader.dataset.update(given)
        assert metainfo_of(changed)['classes'] == ['zero', 'one']
    cfg.test_dataloader.dataset.classes = ['a', 'b']
    assert metainfo_of(cfg)['classes'] == ['a', 'b']


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(UserError, match=f'picture {tmp_path} is a folder'):
        read_image(tmp_path)
