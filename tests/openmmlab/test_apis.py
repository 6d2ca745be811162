"""gdrq_mm.openmmlab.apis, tools/infer.py: the same prediction outside the runner, and by the libraries' functions."""

import copy

import cv2
import mmdet.apis
import mmpretrain.apis
import mmseg.apis
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from gdrq_mm.core.errors import UserError
from gdrq_mm.data import digits
from gdrq_mm.openmmlab import compat
from gdrq_mm.openmmlab.apis import draw, infer, init_model
from gdrq_mm.openmmlab.cli import read_config
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ROOT
from tests.runs import FEW_SCENES, TASK_CONFIGS, TEST_ONLY, task_config


@pytest.fixture(scope='module', params=TASK_CONFIGS)
def trained(request, scenes_root, tmp_path_factory):
    """Task, config, path of the checkpoint, and what the runner predicts: path of the picture -> prediction."""
    task = request.param
    folder = tmp_path_factory.mktemp(task)
    cfg = task_config(task, scenes_root, folder)
    QuantRunner.from_cfg(cfg).train()
    cfg = task_config(task, scenes_root, folder)
    cfg.merge_from_dict({**TEST_ONLY, 'load_from': str(folder / 'epoch_1.pth')})
    cfg.test_dataloader.batch_size = 1  # a batch is padded, and sums of another order differ in the last bit
    cfg.experiment_name += '-test'
    runner = QuantRunner.from_cfg(cfg)
    runner.load_or_resume()
    runner.model.eval()
    with torch.no_grad():
        predictions = [runner.model.test_step(batch)[0] for batch in runner.test_dataloader]
    assert len(predictions) >= FEW_SCENES
    return task, cfg, folder / 'epoch_1.pth', {p.img_path: p for p in predictions}


def values(task, prediction):
    if task == 'cls':
        return [prediction.pred_score]
    if task == 'seg':
        return [prediction.pred_sem_seg.data, prediction.seg_logits.data]
    found = prediction.pred_instances
    return [found.bboxes, found.scores, found.labels]


def test_a_model_predicts_what_the_runner_predicts(trained):
    task, cfg, checkpoint, expected = trained
    model = init_model(cfg, checkpoint)
    assert not model.training
    for path, prediction in expected.items():
        for one, other in zip(values(task, infer(model, path)), values(task, prediction)):
            assert one.numel() and torch.equal(one, other)


def test_the_functions_of_the_libraries_accept_it(trained):
    task, cfg, checkpoint, expected = trained
    model = init_model(cfg, str(checkpoint), device='cpu')
    path, prediction = next(iter(expected.items()))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if task == 'cls':
            result = mmpretrain.apis.inference_model(model, path)
            assert result['pred_class'] == str(result['pred_label']) in digits.CLASSES
            np.testing.assert_array_equal(result['pred_scores'], prediction.pred_score.numpy())
            return
        infer_one = mmdet.apis.inference_detector if task == 'det' else mmseg.apis.inference_model
        results = [infer_one(model, path), *infer_one(model, [path, path]), infer_one(model, cv2.imread(path))]
    one, *two, pixels = results
    for result in (one, pixels):
        assert all(torch.equal(a, b) for a, b in zip(values(task, result), values(task, prediction)))
    for result in two:  # mmseg makes one batch of them, whose sums two threads add in another order
        torch.testing.assert_close(values(task, result)[1], values(task, prediction)[1], rtol=0, atol=1e-6)


def test_a_prediction_is_drawn(trained):
    """Something changes, and in detection nothing if no box is good enough."""
    task, cfg, checkpoint, expected = trained
    model = init_model(cfg, checkpoint)
    assert set(digits.CLASSES) <= set(model.dataset_meta['classes'])
    path, prediction = next(iter(expected.items()))
    before = [value.clone() for value in values(task, prediction)]
    picture = draw(model, path, prediction, score_thr=0.0)
    small = cv2.imread(path)[..., ::-1]
    factor = picture.shape[0] // small.shape[0]
    assert factor >= 3 and picture.shape == (factor * small.shape[0], factor * small.shape[1], 3)
    plain = cv2.resize(small, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    assert (picture != plain).mean() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(before, values(task, prediction)))
    if task == 'det':
        without = prediction.clone()
        without.pred_instances = prediction.pred_instances[:0]
        nothing = draw(model, path, without, score_thr=0.0)
        assert (draw(model, path, prediction, score_thr=1.0) == nothing).all() and (picture != nothing).any()
        assert compat.installed('mmengine') or (nothing == plain).all()  # mmengine's own drawing moves colours a little
        del without.pred_instances  # as a panoptic detector has none
        with pytest.raises(UserError, match=r'predicts .*no boxes to draw'):
            draw(model, path, without)


def test_a_checkpoint_that_does_not_fit_is_refused(trained, tmp_path):
    _, cfg, checkpoint, _ = trained
    others = {
        'another quantization config': {'quantization.weight.bits': 3},
        'another model': {'model.backbone.stem_channels': 8},
    }
    for message, options in others.items():
        with pytest.raises(UserError, match=message):
            init_model(cfg, checkpoint, cfg_options=options)
    with pytest.raises(UserError, match='does not exist'):
        init_model(cfg, tmp_path / 'none.pth')


def test_a_float_checkpoint_has_no_thresholds(trained, tmp_path):
    _, cfg, checkpoint, expected = trained
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    torch.save({k: v for k, v in state.items() if '_quant.' not in k}, tmp_path / 'float.pth')
    with pytest.raises(UserError, match='no threshold'):
        infer(init_model(cfg, tmp_path / 'float.pth'), next(iter(expected)))
    cfg = cfg.copy()
    cfg.pop('quantization')
    assert infer(init_model(cfg, tmp_path / 'float.pth'), next(iter(expected))) is not None


def test_a_model_without_a_checkpoint(trained):
    _, cfg, *_ = trained
    cfg = cfg.copy()
    cfg.pop('quantization')
    assert not init_model(cfg).training


# ---- tools/infer.py -------------------------------------------------------------------------------------------------


INFER = ROOT / 'tools/infer.py'


@pytest.mark.parametrize('task', TASK_CONFIGS)
def test_the_config_stays_what_it_is(task):
    cfg = read_config(ROOT / 'configs' / TASK_CONFIGS[task])
    before = copy.deepcopy(cfg.to_dict())
    init_model(cfg)
    assert cfg.to_dict() == before


def test_the_tool_writes_a_picture(trained, tmp_path, run):
    task, _, checkpoint, expected = trained
    path = next(iter(expected))
    done = run(INFER, ROOT / 'configs' / TASK_CONFIGS[task], checkpoint, path, '--out', 'new/drawn.png')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'new/drawn.png'
    assert cv2.imread(str(tmp_path / 'new/drawn.png')).shape[0] >= 280


def test_the_float_model_beside_the_quantized_one(trained, tmp_path, run):
    task, _, checkpoint, expected = trained
    cfg = read_config(ROOT / 'configs' / TASK_CONFIGS[task])
    cfg.pop('quantization')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(init_model(cfg).state_dict(), tmp_path / 'float.pth')
    command = (INFER, ROOT / 'configs' / TASK_CONFIGS[task], checkpoint, next(iter(expected)), '--out', 'drawn.png')
    done = run(*command, '--beside', 'float.pth')
    assert done.returncode == 0, done.stderr
    picture = cv2.imread(str(tmp_path / 'drawn.png'))
    height, width = picture.shape[:2]
    left, right = picture[:, : width // 2], picture[:, width // 2 :]
    assert width > 1.5 * height and min(left.std(), right.std()) > 20


@pytest.mark.parametrize(
    ('image', 'out', 'message'),
    [
        ('none.png', ['a.png'], 'picture none.png does not exist'),
        ('text.png', ['a.png'], 'picture text.png cannot be read'),
        ('text.png', ['a.gif'], '--out a.gif does not end in .png'),
        ('text.png', ['text.png/a.png'], 'text.png'),
        ('text.png', ['a.png', '--device', 'gpu'], "error: device 'gpu' cannot be used: Expected one of cpu, cuda"),
        ('text.png', ['a.png', '--device', 'cuda:99'], "error: device 'cuda:99' cannot be used: "),
    ],
)
def test_bad_input_ends_in_one_line(scenes_root, tmp_path, run, image, out, message):
    (tmp_path / 'text.png').write_text('not a picture')
    config = ROOT / 'configs/cls/resnet18_width16_digits.py'
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save(init_model(config).state_dict(), tmp_path / 'float.pth')
    done = run(INFER, config, 'float.pth', image, '--out', *out)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['float.pth', 'text.png']
