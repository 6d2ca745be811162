"""The methods in real trainings: optimizer, resume, EMA, freezing; one step of each in stock models of each task."""

import copy
import functools

import numpy as np
import pytest
import torch

from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import METHODS, Stage, WeightQuantizer, learned_parameters
from gdrq_mm.core.topology import record
from gdrq_mm.openmmlab.hooks import CalibrationHook
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import few_bits_of_both, same
from tests.runs import TEST_ONLY, checkpoint_of, contents, scores_of, tiny_config, train
from tests.stock import YOLOX, batch_of, build, check_result, predict, settle

NO_ZERO_POINT = ('log2', 'bnn', 'tsq')
ALWAYS = ('gdrq', 'lsq_plus', 'pact', 'hwgq')
"""Methods that are tried in every task by each test run; the others by make test-full."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- runs on digits -------------------------------------------------------------------------------------------------

RUNS = {
    'lsq': {},
    'lsq_plus': dict(activation=dict(bits=4, range='zero_point', lsq_plus=dict(lr_mult=2.0))),
    'pact': dict(activation=dict(bits=4, pact=dict(lr_mult=0.5, decay_mult=3.0))),
    'ttq': dict(weight=dict(bits=2, ttq=dict(lr_mult=0.5))),
    'syq': dict(weight=dict(bits=2)),
    'minmax': {},
    'hwgq': {},
    'inq': {},
    'loss_aware': {},
    'tsq': dict(weight=dict(bits=2)),
}
MULTIPLES = dict(lsq=(1.0, 0.0), lsq_plus=(2.0, 0.0), pact=(0.5, 3.0), ttq=(0.5, 0.0), syq=(1.0, 0.0))
"""Learning rate and weight decay of what is learned, as multiples of those of weights."""
RESUMED = [
    'lsq_plus',
    'pact',
    'ttq',
    'minmax',
    'hwgq',
    'inq',
    *(pytest.param(m, marks=pytest.mark.full) for m in ('loss_aware', 'tsq')),
]
EMA = dict(type='EMAHook', momentum=0.3)


def run_config(method, **schedule):
    return dict(method=method, calibration_batches=1, schedule=schedule, **copy.deepcopy(RUNS[method]))


@pytest.fixture(scope='module')
def whole(digits_root, tmp_path_factory):
    """Trains a method for 2 epochs with EMA, once: its runner, learned Parameters and scores by iteration."""

    @functools.cache
    def run(method):
        cfg = tiny_config(
            digits_root, tmp_path_factory.mktemp(method), run_config(method), 2, custom_hooks=[copy.deepcopy(EMA)]
        )
        runner = QuantRunner.from_cfg(cfg)
        names, history = learned_parameters(runner.model), []
        scores = scores_of(runner)
        parameters = dict(runner.model.named_parameters())
        train(runner, lambda r: history.append({name: parameters[name].detach().clone() for name in names}))
        return runner, history, scores

    return run


@pytest.mark.parametrize('method', MULTIPLES)
def test_learned_parameters_are_in_the_optimizer(method, make):
    runner = make(quantization=run_config(method))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    groups = {id(p): g for g in runner.optim_wrapper.param_groups for p in g['params']}
    parameters, base = dict(runner.model.named_parameters()), runner.cfg.optim_wrapper.optimizer
    learned = learned_parameters(runner.model)
    assert learned and base.weight_decay > 0
    for name, quantizer in learned.items():
        of_activations = method == 'lsq_plus' and isinstance(quantizer, WeightQuantizer)  # were given to them only
        lr_mult, decay_mult = (1.0, 0.0) if of_activations else MULTIPLES[method]
        group = groups[id(parameters[name])]
        assert (group['lr'], group['weight_decay']) == (lr_mult * base.lr, decay_mult * base.weight_decay)
    others = {id(p) for name, p in parameters.items() if name not in learned}
    assert {(groups[i]['lr'], groups[i]['weight_decay']) for i in others} == {(base.lr, base.weight_decay)}


def test_the_optimizer_settings_of_a_config_are_kept(make):
    given = dict(norm_decay_mult=0.0, custom_keys={'head.fc': dict(lr_mult=3.0)})
    runner = make(quantization=run_config('lsq'), **{'optim_wrapper.paramwise_cfg': given})
    wrapper, base = runner.build_optim_wrapper(runner.cfg.optim_wrapper), runner.cfg.optim_wrapper.optimizer
    groups = {id(p): (g['lr'], g['weight_decay']) for g in wrapper.param_groups for p in g['params']}
    found = {name: groups[id(p)] for name, p in runner.model.named_parameters()}
    assert found['backbone.bn1.weight'] == (base.lr, 0) and found['backbone.conv1.weight'] == (base.lr, 5e-4)
    assert found['head.fc.weight'] == (3 * base.lr, base.weight_decay)
    rates = {name: (3 if name.startswith('head.fc') else 1) * base.lr for name in learned_parameters(runner.model)}
    assert {name: found[name] for name in rates} == {name: (rate, 0) for name, rate in rates.items()}
    assert runner.cfg.optim_wrapper.paramwise_cfg == given, 'the config is left as it was'


@pytest.mark.parametrize('method', RESUMED)
def test_a_resumed_run_equals_an_undisturbed_one(method, whole, make):
    runner, history, _ = whole(method)
    learned = learned_parameters(runner.model)
    assert len(history) == 8 and bool(learned) == (method in MULTIPLES)
    last = [torch.cat([value.flatten() for value in history[i].values()]) for i in (3, 7)] if learned else [0, 1]
    assert not same(*last), 'they move after the interruption'
    checkpoint = checkpoint_of(runner)
    changes = dict(quantization=run_config(method), epochs=2, custom_hooks=[copy.deepcopy(EMA)])
    resumed = make(**changes, resume=True, load_from=checkpoint)
    train(resumed)
    assert same(contents(runner, 'epoch_2.pth'), contents(resumed, 'epoch_2.pth'))


def test_a_training_tells_its_progress(whole):
    """At its end all weights of INQ are powers of two and stay."""
    runner, _, _ = whole('inq')
    quantized = [layer for layer in quant_layers(runner.model).values() if hasattr(layer.weight_quant, 'held')]
    assert len(quantized) > 2 and {layer.weight_quant.progress for layer in quantized} == {1.0}
    for layer in quantized:
        assert int(layer.weight_quant.held.abs().max()) == layer.weight_quant.hi, 'codes, and neither FREE nor UNTOLD'
        exponents = np.log2(layer.weight.detach().abs()[layer.weight != 0].double())
        assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize('method', ['inq', *(pytest.param(m, marks=pytest.mark.full) for m in ('loss_aware', 'tsq'))])
def test_the_average_of_weights_that_change_in_stages_is_quantized(method, whole, make):
    runner, _, validated = whole(method)
    load = checkpoint_of(runner, 'epoch_2.pth')
    tester = make('test', quantization=run_config(method), load_from=load, **TEST_ONLY)
    scores = scores_of(tester)
    tester.test()
    assert torch.equal(scores[0], validated[-1])
    for layer in quant_layers(tester.model.eval()).values():
        values = layer.weight_quant(layer.filters()).detach().flatten(1)
        assert all(len(row.unique()) <= 2**layer.weight_quant.bits for row in values)


@pytest.mark.parametrize('method', ['lsq_plus', 'pact', 'ttq'])
def test_the_average_of_ema_takes_learned_parameters_and_evaluates(method, whole, make):
    runner, history, validated = whole(method)
    saved = contents(runner, 'epoch_2.pth')
    expected = {name: value.double() for name, value in history[0].items()}
    for later in history[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * later[name].double() for name in expected}
    for name, value in expected.items():
        np.testing.assert_allclose(saved['state_dict'][name].double(), value, rtol=1e-4, atol=1e-7)
        assert torch.equal(saved['ema_state_dict'][f'module.{name}'], history[-1][name]), 'our own is kept there'
    moved = [name for name in expected if not torch.equal(saved['state_dict'][name], history[-1][name])]
    assert len(moved) > len(expected) / 3
    load = checkpoint_of(runner, 'epoch_2.pth')
    tester = make('test', quantization=run_config(method), load_from=load, **TEST_ONLY)
    tested = scores_of(tester)
    tester.test()
    assert torch.equal(tested[0], validated[-1])


@pytest.mark.parametrize('method', MULTIPLES)
def test_frozen_thresholds_stand_still_and_their_gradients_are_zeros(method, make):
    runner = make(quantization=run_config(method, freeze=0.5), epochs=1)
    learned = learned_parameters(runner.model)
    filters = {layer.weight_quant: layer.filters for layer in quant_layers(runner.model).values()}
    parameters = dict(runner.model.named_parameters())
    stages, thresholds, found = [], [], {}
    for name in learned:
        parameters[name].register_hook(lambda grad, name=name: found.setdefault(name, []).append(grad.clone()))

    def scales_of(quantizer):
        if quantizer not in filters:
            return quantizer.step().clone(), quantizer.lo, quantizer.hi
        weight = filters[quantizer]()
        return torch.unique(quantizer(weight)) if method == 'ttq' else quantizer.step(weight).clone()

    @torch.no_grad()
    def look(runner):
        stages.append({quantizer.stage for quantizer in learned.values()})
        thresholds.append({name: scales_of(quantizer) for name, quantizer in learned.items()})

    train(runner, look)
    assert stages == [{Stage.QUANTIZE}] * 2 + [{Stage.FREEZE}] * 2
    assert learned and not same(thresholds[0], thresholds[1]), 'they learn before'
    assert same(thresholds[1], thresholds[2]), 'those of this moment are kept'
    assert same(thresholds[2], thresholds[3])
    assert set(found) == set(learned)
    for grads in found.values():
        assert len(grads) == 4, 'none is missing'
        assert not grads[2].any() and not grads[3].any()
    assert any(grads[1].any() for grads in found.values())


# ---- stock models ---------------------------------------------------------------------------------------------------

FCN = dict(
    stock='mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    model={
        'backbone.stem_channels': 8,
        'backbone.base_channels': 8,
        'decode_head.in_channels': 64,
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 32,
        'auxiliary_head.channels': 16,
    },
)
STOCK = dict(
    classifier=dict(
        stock='mmpretrain::resnet/resnet18_8xb16_cifar10.py',
        size=32,
        model={'backbone.stem_channels': 8, 'backbone.base_channels': 8, 'head.in_channels': 64},
    ),
    detector=YOLOX,
    segmentor=FCN,
)


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """Builds a float model of a library once: a runner for it, the model and what feeds what."""

    @functools.cache
    def built(task):
        cfg = build(tmp_path_factory.mktemp(task), **STOCK[task]).cfg
        cfg.pop('quantization')
        cfg.experiment_name = f'{task}_float'
        runner = QuantRunner.from_cfg(cfg)
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        settle(runner)
        return runner, runner.model, record(runner.model, lambda: predict(runner))

    return built


@pytest.mark.parametrize(
    'method', [*ALWAYS, *(pytest.param(m, marks=pytest.mark.full) for m in METHODS if m not in ALWAYS)]
)
@pytest.mark.parametrize('task', STOCK)
def test_every_method_trains_and_predicts_in_every_task(task, method, stock):
    runner, float_model, plan = stock(task)
    model = runner.model = copy.deepcopy(float_model)
    settings = few_bits_of_both(method)
    cfg = Quantization.from_dict(settings)
    quantize_model(model, cfg, plan)
    CalibrationHook(1).before_train(runner)
    kinds = {quantizer.kind for quantizer in activation_quantizers(model).values() if quantizer.bits < 8}
    assert kinds and ('zero_point' in kinds) == (task == 'detector' and method not in NO_ZERO_POINT)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    losses = model.train().train_step(batch_of(runner), optimizer)
    assert all(torch.isfinite(value).all() for value in losses.values())
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    weights = {f'{name}.weight' for name, layer in quant_layers(model).items() if layer.weight_quant is not None}
    assert len(weights & moved) > 0.8 * len(weights) and all(value.isfinite().all() for value in model.parameters())
    assert bool(moved & set(learned_parameters(model))) == bool(learned_parameters(model))
    check_result_of(task, predict(runner))


def check_result_of(task, result):
    if task == 'classifier':
        assert all(sample.pred_score.isfinite().all() and len(sample.pred_score) == 10 for sample in result)
    else:
        check_result(result, **STOCK[task])
