"""Distillation and the control in real trainings: what is compared, exact resume, what a control is."""

import copy
import os
import re

import pytest
import torch
from mmengine.registry import MODELS

from gdrq_mm.core.distill import of_classes, of_features, of_probabilities
from gdrq_mm.core.errors import UserError
from gdrq_mm.core.modules import quant_layers
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.openmmlab.distill import distances_of
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ROOT, same
from tests.runs import QUANTIZATION, checkpoint_of, contents, task_config, train

DISTILL = {**QUANTIZATION, 'distill': dict(weight=1.0, temperature=2.0)}
CONTROL = {**QUANTIZATION, 'control': True}

COMPARED = {
    'cls/resnet18_width16_digits.py': {'head.fc': of_classes},
    'seg/pspnet_r18_digits.py': {'decode_head.conv_seg': of_classes},
    'det/faster_rcnn_r18_digits.py': {'neck': of_features, 'rpn_head.rpn_cls': of_probabilities},
    'det/yolox_nano_digits.py': {
        'neck': of_features,
        **{f'bbox_head.multi_level_conv_{kind}.{i}': of_probabilities for kind in ('cls', 'obj') for i in range(3)},
    },
}


@pytest.mark.parametrize('config', COMPARED)
def test_what_is_compared(config):
    assert distances_of(init_model(ROOT / 'configs' / config, device='cpu')) == COMPARED[config]


def losses_of(runner):
    """The distances of a run, one an iteration."""
    found = []
    train(runner, lambda runner: found.append(runner.message_hub.get_scalar('train/loss_distill').current()))
    return found


def test_a_classifier_learns_from_its_float_model(make, float_checkpoint):
    runner = make(quantization=DISTILL, load_from=float_checkpoint)
    names = set(runner.model.state_dict())
    losses = losses_of(runner)
    assert len(losses) == 12 and all(loss > 0 for loss in losses)
    assert set(runner.model.state_dict()) == names, 'the teacher is no part of the model'
    assert 'teacher' not in str(list(read_checkpoint(checkpoint_of(runner))['state_dict']))


def test_the_distance_of_a_model_that_was_not_quantized_yet_is_0(make, float_checkpoint):
    quantization = {**CONTROL, 'distill': dict(temperature=1.0)}
    changes = {'optim_wrapper.optimizer.lr': 1e-12, 'model.backbone.norm_eval': True}
    assert max(losses_of(make(quantization=quantization, load_from=float_checkpoint, epochs=1, **changes))) < 1e-5


def test_a_resumed_training_has_the_same_teacher(make, float_checkpoint):
    """Its path may be another one, as from another folder."""
    whole = make(quantization=DISTILL, load_from=float_checkpoint)
    train(whole)
    quantization = copy.deepcopy(whole.cfg.quantization.to_dict())
    quantization['distill']['teacher'] = os.path.relpath(float_checkpoint)
    resumed = make(quantization=quantization, load_from=checkpoint_of(whole), resume=True)
    train(resumed)
    assert same(contents(whole, 'epoch_3.pth'), contents(resumed, 'epoch_3.pth'))


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_every_task_distils_and_settles(task, digits_root, scenes_root, tmp_path):
    data = digits_root if task == 'cls' else scenes_root
    cfg = task_config(task, data, tmp_path)
    teacher = tmp_path / 'teacher.pth'
    float_cfg = copy.deepcopy(cfg)
    float_cfg.pop('quantization')
    torch.save(dict(state_dict=QuantRunner.from_cfg(float_cfg).model.state_dict()), teacher)
    cfg.load_from, cfg.experiment_name = str(teacher), f'distilled-{task}'
    cfg.quantization.update(distill=dict(temperature=1.0), schedule=dict(settle=0.5))
    assert all(loss > 0 for loss in losses_of(QuantRunner.from_cfg(cfg)))


def test_a_control_is_the_float_model_trained_by_the_same_recipe(make, float_checkpoint):
    control = make(quantization=CONTROL, load_from=float_checkpoint)
    plain = make(quantization=None, load_from=float_checkpoint)
    assert not quant_layers(control.model)
    states = [train(runner) for runner in (control, plain)]
    assert same(*states)


def test_a_control_is_recorded_as_float(make, float_checkpoint):
    about = make(quantization=CONTROL, load_from=float_checkpoint).describe()
    assert about['methods'] == ['float', 'float'] and about['bits'] == [32, 32] and about['deployable'] is None


@pytest.mark.parametrize(
    'quantization, load_from, message',
    [
        (DISTILL, None, 'quantization.distill needs a teacher'),
        ({**QUANTIZATION, 'distill': dict(teacher='nowhere.pth')}, None, 'nowhere.pth'),
    ],
)
def test_a_teacher_that_is_missing_is_told(make, quantization, load_from, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(quantization=quantization, load_from=load_from).train()


@pytest.mark.parametrize('several', [False, True])
def test_scores_are_compared_as_the_loss_of_their_head_has_them(several):
    """In a list of heads, as cascaded ones are, and with a list of losses."""
    sigmoid = dict(type='CrossEntropyLoss', use_sigmoid=True)
    common = dict(type='FCNHead', in_channels=64, channels=8, num_classes=2, num_convs=1)
    losses = [[dict(type='DiceLoss'), sigmoid] if several else sigmoid, dict(type='CrossEntropyLoss')]
    model = MODELS.build(
        dict(
            type='CascadeEncoderDecoder',
            _scope_='mmseg',
            num_stages=2,
            backbone=dict(type='ResNetV1c', depth=18, num_stages=1, strides=(1,), dilations=(1,), out_indices=(0,)),
            decode_head=[{**common, 'in_index': 0, 'loss_decode': loss} for loss in losses],
        )
    )
    found = distances_of(model)
    assert found == {'decode_head.0.conv_seg': of_probabilities, 'decode_head.1.conv_seg': of_classes}


def test_a_smoothed_sigmoid_loss_is_one_of_sigmoids():
    """Its sigmoid is inside of it, as in mmpretrain's recipe of ResNet-50 rsb-a1."""
    smooth = dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=5, mode='original', use_sigmoid=True)
    for loss, kind in ((smooth, of_probabilities), ({**smooth, 'use_sigmoid': False}, of_classes)):
        head = dict(type='LinearClsHead', num_classes=5, in_channels=512, loss=loss)
        backbone = dict(type='ResNet', depth=18)
        parts = dict(backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
        model = MODELS.build(dict(type='ImageClassifier', _scope_='mmpretrain', **parts))
        assert distances_of(model) == {'head.fc': kind}


def test_a_quantized_teacher_is_told(make, float_checkpoint):
    """As where load_from is the W4A4 checkpoint of a W2A4 training."""
    first = make('first', load_from=float_checkpoint, epochs=1)
    train(first)
    path = checkpoint_of(first, 'epoch_1.pth')
    with pytest.raises(UserError, match=r'epoch_1.pth is a quantized model; distill.teacher names'):
        make('second', quantization=DISTILL, load_from=path).train()


def test_a_teacher_of_another_model_is_told(make, float_checkpoint, tmp_path):
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict={'backbone.conv1.weight': torch.zeros(4, 3, 3, 3)}), path)
    quantization = {**QUANTIZATION, 'distill': dict(teacher=str(path))}
    with pytest.raises(UserError, match=r'quantization\.distill: checkpoint .*other.pth is of another model'):
        make(quantization=quantization, load_from=float_checkpoint).train()
