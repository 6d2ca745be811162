"""What quantizers learn takes the learning rate and weight decay of its layer, times the multiples of its method."""

import pytest
import torch
import torch.nn as nn
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor as OfMMDet
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor as OfMMPretrain
from mmseg.engine.optimizers import ForceDefaultOptimWrapperConstructor
from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor as OfMMSeg

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.quantizers import learned_parameters
from gdrq_mm.core.topology import record
from gdrq_mm.openmmlab.rates import set_rates
from tests.helpers import Block, conv

CUSTOM = dict(custom_keys={'backbone.stages.0': dict(lr_mult=0.1, decay_mult=0.5), 'head': dict(lr_mult=0)})
DECAY = dict(num_layers=6, decay_rate=0.5, decay_type='stage_wise')
CONSTRUCTORS = {
    'default': (DefaultOptimWrapperConstructor, {}),
    'custom keys': (DefaultOptimWrapperConstructor, CUSTOM),
    'norms and biases': (DefaultOptimWrapperConstructor, dict(norm_decay_mult=0, bias_lr_mult=2, flat_decay_mult=0)),
    'forced': (ForceDefaultOptimWrapperConstructor, CUSTOM),
    'mmdet, by stage': (OfMMDet, DECAY),
    'mmseg, by stage': (OfMMSeg, DECAY),
    'mmpretrain, by layer': (OfMMPretrain, dict(layer_decay_rate=0.5, flat_decay_mult=0.0)),
}


class ConvNeXt(nn.Module):
    """Named as the backbone that some constructors are made for."""

    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(Block(), nn.Sequential(conv(), nn.BatchNorm2d(4), nn.SiLU()), Block())

    def forward(self, x):
        return self.stages(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = ConvNeXt(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))

    def get_layer_depth(self, name, prefix=''):
        parts = name.split('.')
        return (int(parts[2]) + 1 if parts[1] == 'stages' else 4), 6


def built(constructor, paramwise, **optimizer):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 4, 8, 8)
    cfg = dict(weight=dict(lsq=dict(lr_mult=0.5)), method='lsq', activation=dict(method='pact', pact=dict(lr_mult=3.0)))
    quantize_model(model, Quantization.from_dict(cfg), record(model, lambda: model(x)))
    settings = dict(type='AdamW', lr=0.1, weight_decay=0.05) | optimizer
    settings = {key: value for key, value in settings.items() if value is not None}
    wrapper = constructor(dict(type='OptimWrapper', optimizer=settings), paramwise)(model)
    set_rates(wrapper, model, (paramwise or {}).get('custom_keys', {}))
    groups = wrapper.optimizer.param_groups
    return model, {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}, groups


@pytest.mark.parametrize('name', CONSTRUCTORS)
def test_what_is_learned_takes_the_settings_of_its_layer_times_those_of_its_method(name):
    constructor, paramwise = CONSTRUCTORS[name]
    model, found, groups = built(constructor, dict(paramwise))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    names = [parameter for group in groups for parameter in group['params']]
    assert len(names) == len(set(map(id, names))) == len(parameters), 'each parameter once'
    checked = 0
    for key, quantizer in learned_parameters(model).items():
        holder = modules[key.rsplit('.', 2)[0]]
        if not hasattr(holder, 'weight'):
            continue
        lr, decay = found[id(holder.weight)]
        expected = lr * quantizer.lr_mult, decay * quantizer.decay_mult
        assert found[id(parameters[key])] == pytest.approx(expected), key
        checked += 1
    assert checked > 10
    if paramwise is CUSTOM and constructor is DefaultOptimWrapperConstructor:
        step = parameters['backbone.stages.0.conv1.weight_quant.learned_step']
        assert found[id(step)] == pytest.approx((0.1 * 0.1 * 0.5, 0))
        assert found[id(parameters['head.weight_quant.learned_step'])][0] == 0


def test_an_optimizer_with_a_decay_of_its_own_does_not_decay_steps():
    """AdamW decays by 0.01 where the config says nothing."""
    model, found, _ = built(DefaultOptimWrapperConstructor, None, weight_decay=None)
    parameters = dict(model.named_parameters())
    assert found[id(model.head.weight)][1] == 0.01
    for key, quantizer in learned_parameters(model).items():
        assert found[id(parameters[key])][1] == 0.01 * quantizer.decay_mult


def test_a_custom_key_of_what_is_learned_has_the_last_word():
    keys = {'learned_step': dict(lr_mult=0.3, decay_mult=2.0), 'backbone': dict(lr_mult=0.1), 'head.w': dict(lr_mult=7)}
    model, found, _ = built(DefaultOptimWrapperConstructor, dict(custom_keys=keys))
    parameters = dict(model.named_parameters())
    assert found[id(parameters['backbone.stages.0.conv1.weight_quant.learned_step'])] == pytest.approx((0.03, 0.1))
    assert found[id(parameters['head.weight_quant.learned_step'])] == pytest.approx((0.03, 0.1))
    alpha = parameters['backbone.stages.2.bn2.output_quant.alpha']  # no key of its own
    assert found[id(alpha)] == pytest.approx((0.1 * 0.1 * 3.0, 0.05))
