"""The plan of a model depends on the model alone, and a checkpoint holds it."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.registry import DefaultScope

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.errors import UserError
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.openmmlab import apis, checkpoint_runner, models
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import export_graphs, use_runtime, write_bundle
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.models import record_plan
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.weights import load_weights, other_quantization, plan_of
from tests.helpers import same
from tests.runs import QUANTIZATION, TEST_ONLY, checkpoint_of, task_config, tiny_config, train
from tests.stock import MASK_RCNN, build

SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))


@pytest.fixture
def no_prediction(monkeypatch):
    """Nothing may be recorded."""

    def refuse(*args, **kwargs):
        raise AssertionError('a prediction was recorded')

    monkeypatch.setattr(models, 'record_plan', refuse)


# ---- it depends on the model alone ----------------------------------------------------------------------------------


def test_an_untrained_mask_head_is_in_the_plan(tmp_path, monkeypatch):
    """With the score threshold of the stock config, which no box of an untrained model reaches."""
    monkeypatch.setattr('tests.stock.set_all', lambda *args: None)
    plans = []
    for seed in (0, 1):
        (tmp_path / f'{seed}').mkdir()
        runner = build(tmp_path / f'{seed}', **MASK_RCNN, seed=seed)
        assert runner.model.test_cfg.rcnn.score_thr == runner.model.roi_head.test_cfg.score_thr == 0.05
        plans.append(runner.report.plan)
    assert plans[0] == plans[1]
    assert 'roi_head.mask_head.conv_logits' in plans[0].calls


@pytest.fixture
def segmentor(scenes_root, tmp_path):
    """Config of a segmentor, with a mode of prediction."""

    def segmentor(name, **test_cfg):
        cfg = task_config('seg', scenes_root, tmp_path / name)
        cfg.model.test_cfg = test_cfg or dict(mode='whole')
        return cfg

    return segmentor


@pytest.mark.full
def test_a_segmentor_with_sliding_windows(segmentor, tmp_path):
    """It has the plan of one without, trains, is tested, infers what the test predicts, and is exported."""
    whole = QuantRunner.from_cfg(segmentor('whole'))
    runner = QuantRunner.from_cfg(segmentor('slide', **SLIDE))
    assert runner.report.plan == whole.report.plan
    assert same(*[list(r.model.state_dict()) for r in (whole, runner)])
    runner.train()
    cfg = segmentor('slide', **SLIDE)
    cfg.merge_from_dict({**TEST_ONLY, 'load_from': str(tmp_path / 'slide/epoch_1.pth')})
    cfg.experiment_name += '-test'
    cfg.test_dataloader.batch_size = 1
    tester = QuantRunner.from_cfg(copy.deepcopy(cfg))
    assert np.isfinite(tester.test()['mIoU'])
    model = init_model(cfg, tmp_path / 'slide/epoch_1.pth')
    assert model.plan == runner.report.plan
    with torch.no_grad():
        (expected,) = tester.model.eval().test_step(next(iter(tester.test_dataloader)))
    assert torch.equal(infer(model, expected.img_path).seg_logits.data, expected.seg_logits.data)
    report = export_graphs(model, merge_model(model, model.plan), lambda: infer(model, expected.img_path), str)
    from gdrq_mm.openmmlab.decode.boxes import NotCovered
    from gdrq_mm.openmmlab.end2end import export_end2end

    with pytest.raises(NotCovered, match='its test_cfg has mode=slide') as refused:
        export_end2end(model, report, lambda: infer(model, expected.img_path))
    write_bundle(tmp_path / 'exported', model, str(tmp_path / 'slide/epoch_1.pth'), report, str(refused.value))
    use_runtime(model, tmp_path / 'exported', 'onnxruntime', str(tmp_path / 'slide/epoch_1.pth'))
    labels = infer(model, expected.img_path).pred_sem_seg.data
    assert (labels == expected.pred_sem_seg.data).float().mean() > 0.95


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_pictures_of_two_sizes_give_one_plan(scenes_root, tmp_path, task):
    cfg = task_config(task, scenes_root, tmp_path)
    cfg.pop('quantization')
    model = init_model(cfg)
    pictures = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((64, 96), (240, 200))]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        one, other = (record_plan(model, partial(infer, model, picture)) for picture in pictures)
    assert one == other and one.calls


def test_settings_of_the_model_are_as_before(scenes_root, tmp_path):
    cfg = task_config('det', scenes_root, tmp_path)
    cfg.model.test_cfg.rcnn.score_thr = 0.3
    runner = QuantRunner.from_cfg(cfg)
    assert runner.model.test_cfg.rcnn.score_thr == runner.model.roi_head.test_cfg.score_thr == 0.3


# ---- a checkpoint holds it ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(digits_root, tmp_path_factory):
    """A trained runner."""
    runner = QuantRunner.from_cfg(tiny_config(digits_root, tmp_path_factory.mktemp('trained') / 'run', epochs=1))
    train(runner)
    return runner


def test_a_checkpoint_holds_plan_and_quantization(trained):
    content = read_checkpoint(checkpoint_of(trained))
    assert content['meta']['quantization'] == QUANTIZATION
    assert plan_of(trained.model, content, 'x.pth') == trained.report.plan


def test_test_resume_and_inference_build_from_the_checkpoint(trained, config, no_prediction):
    checkpoint = checkpoint_of(trained)
    expected = dict(trained.model.state_dict())
    tester = QuantRunner.from_cfg(config('test', load_from=checkpoint, **TEST_ONLY))
    assert list(tester.model.state_dict()) == list(expected)
    assert tester.report.plan == trained.report.plan
    tester.test()
    assert same(dict(tester.model.state_dict()), expected)
    resumed = QuantRunner.from_cfg(config('resumed', load_from=checkpoint, resume=True, epochs=2))
    train(resumed)
    assert resumed.iter == 8
    model = init_model(config('infer'), checkpoint)
    assert same(dict(model.state_dict()), expected) and model.plan == trained.report.plan


def test_a_checkpoint_is_read_once(trained, config, monkeypatch):
    read = []
    for module in (checkpoint_runner, apis):
        monkeypatch.setattr(module, 'read_checkpoint', lambda *args: read.append(args[0]) or read_checkpoint(*args))
    checkpoint = checkpoint_of(trained)
    QuantRunner.from_cfg(config('test', load_from=checkpoint, **TEST_ONLY)).test()
    assert read == [checkpoint]
    init_model(config('infer'), checkpoint)
    assert read == [checkpoint] * 2


def test_an_old_checkpoint_is_recorded(trained, config, tmp_path):
    content = read_checkpoint(checkpoint_of(trained))
    del content['meta']['plan'], content['meta']['quantization']
    torch.save(content, tmp_path / 'old.pth')
    tester = QuantRunner.from_cfg(config('test', load_from=str(tmp_path / 'old.pth'), **TEST_ONLY))
    assert tester.report.plan == trained.report.plan
    tester.test()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda plan: 3, 'a plan has calls'),
        (lambda plan: {**plan, 'calls': {'backbone': 'once'}}, 'calls of the plan is not a dict of integers'),
        (lambda plan: {**plan, 'last': ['head.fx']}, 'is of another model: its plan has head.fx, this model has not'),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused(trained, config, tmp_path, change, message):
    content = read_checkpoint(checkpoint_of(trained))
    content['meta']['plan'] = change(content['meta']['plan'])
    path = str(tmp_path / 'given.pth')
    torch.save(content, path)
    with pytest.raises(UserError, match=f'^checkpoint {path}.*{message}'):
        QuantRunner.from_cfg(config('test', load_from=path, **TEST_ONLY))
    with pytest.raises(UserError, match=f'^checkpoint {path}.*{message}'):
        init_model(config('infer'), path)


# ---- trials that fail -----------------------------------------------------------------------------------------------


def test_a_model_that_can_train_and_not_predict_is_trained(make, monkeypatch):
    """As mmdet 3.5.1 cannot predict by its SSD head: the plan comes from a training loss."""
    before = make('before', epochs=1)

    def fail(self, *args, **kwargs):
        raise KeyError('border')

    monkeypatch.setattr('mmpretrain.models.ImageClassifier.predict', fail)
    changes = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    told = []
    monkeypatch.setattr(models, '_warn', told.append)
    runner = make(epochs=1, **changes)
    assert (runner.report.plan.norms, runner.report.outputs) == (before.report.plan.norms, before.report.outputs)
    assert list(runner.model.state_dict()) == list(before.model.state_dict())
    (message,) = told
    assert message.startswith("a trial prediction failed (KeyError: 'border'); what feeds what is recorded from")
    train(runner)
    assert make('float', quantization=None, **TEST_ONLY).report.layers  # only its table needs the plan


def test_a_trial_that_fails_names_its_exception_and_says_what_it_was(make, monkeypatch):
    def fail(self, *args, **kwargs):
        raise KeyError('border')

    monkeypatch.setattr('mmpretrain.models.ImageClassifier.predict', fail)
    told = []  # Python 3.10 has no notes
    monkeypatch.setattr(models, '_warn', told.append)
    with pytest.raises(KeyError, match='border') as raised:
        make(**TEST_ONLY)
    (note,) = getattr(raised.value, '__notes__', told)
    assert 'It was a trial' in note


# ---- checkpoints of another quantization ----------------------------------------------------------------------------


class Shared(nn.Module):
    """Two names of one convolution, as the heads of RTMDet have them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        conv = nn.Conv2d(8, 8, 1)
        self.levels = nn.ModuleList([conv, conv])
        self.fc = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return [self.fc(level(x)) for level in self.levels]


def test_a_layer_of_several_names_is_loaded():
    """A state dict has all its names, named_modules() the first."""
    config = dict(weight=dict(bits=4), calibration_batches=1)
    one, other = Shared(), Shared()
    for model in (one, other):
        quantize_model(model, Quantization.from_dict(config))
    state = one.state_dict()
    assert 'levels.1.weight_quant.threshold' in state
    for checkpoint in (state, dict(state_dict=state, meta=dict(quantization=config))):
        assert other_quantization(other, checkpoint, config) == ''
        load_weights(other, checkpoint, 'x.pth', config)
    assert same(dict(other.state_dict()), dict(state))


def test_a_student_with_a_teacher_is_refused(scenes_root, tmp_path):
    """The plan would be that of the teacher alone, and the student would be quantized in another way."""
    cfg = task_config('det', scenes_root, tmp_path / 'run')
    semi = dict(type='SoftTeacher', detector=cfg.model, semi_train_cfg={}, semi_test_cfg=dict(predict_on='teacher'))
    cfg.model = dict(semi, data_preprocessor=cfg.model.data_preprocessor)
    with pytest.raises(UserError, match='the model has a student and a teacher'):
        QuantRunner.from_cfg(cfg)
