"""What quantizers do goes by the mode of the model, not by that of a part: `norm_eval`, `frozen_stages`."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.config import Quantization
from gdrq_mm.core.convert import quantize_model
from gdrq_mm.core.modules import activation_quantizers, quant_layers
from gdrq_mm.core.quantizers import Stage, learned_parameters
from gdrq_mm.core.step import after_step, set_stage
from gdrq_mm.core.topology import record
from tests.helpers import Block, Net


class Frozen(Net):
    """A model that keeps its BN and its first block in evaluation mode, as `norm_eval` and `frozen_stages` do."""

    def train(self, mode=True):
        super().train(mode)
        self.blocks[0].eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def frozen_model(**settings):
    torch.manual_seed(0)
    model, x = Frozen(Block(), Block(downsample=True)).train(), torch.randn(4, 4, 8, 8)
    config = Quantization.from_dict(dict(deployable=True, **settings))
    quantize_model(model, config, record(model, lambda: model(x)))
    calibrate(model, [x])
    return model, x


def moved(model, x):
    """Names of the activation quantizers whose threshold a training step moves."""
    before = {name: float(q.threshold) for name, q in activation_quantizers(model).items()}
    model(3 * x)
    after_step(model)
    return {name for name, q in activation_quantizers(model).items() if float(q.threshold) != before[name]}


def test_thresholds_follow_below_norms_and_stages_in_evaluation_mode():
    model, x = frozen_model()
    names = set(activation_quantizers(model))
    assert any('bn2.output_quant' in name for name in names) and any('blocks.0.conv' in name for name in names)
    assert moved(model.train(), x) == names
    assert not moved(model.eval(), x)


def test_the_bias_of_the_integer_graph_waits_for_the_evaluation_of_the_model():
    model, x = frozen_model()
    layer = model.blocks[0].conv1
    assert layer.deployable and not layer.training
    model.train()(x)
    _, _, in_training = layer.operands(x)
    model.eval()(x)
    _, _, in_evaluation = layer.operands(x)
    assert in_training is None and in_evaluation is not None


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickled(model)], ids=['deepcopy', 'torch.save'])
def test_a_copied_model_goes_by_its_own_mode(copied):
    model, x = frozen_model()
    other = copied(model.train()).eval()
    assert all(m.root == (other,) for m in (*activation_quantizers(other).values(), *quant_layers(other).values()))
    assert not moved(other, x) and moved(model, x)
    assert set(other.state_dict()) == set(model.state_dict())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_a_copied_part_goes_by_its_own_mode_and_does_not_hold_the_model():
    model, x = frozen_model()
    part = copy.deepcopy(model.stem)
    assert part.root == () and not moved(nn.Sequential(part.eval()), x) and moved(nn.Sequential(part.train()), x)


def test_what_frozen_layers_learn_wants_no_gradient():
    """Right after the model is quantized: then it is wrapped for several processes."""
    model, x = Net(Block()), torch.randn(2, 4, 8, 8)
    model.stem.requires_grad_(False)
    quantize_model(model, Quantization.from_dict(dict(method='lsq')), record(model, lambda: model(x)))
    parameters = dict(model.named_parameters())
    frozen = {name for name in learned_parameters(model) if not parameters[name].requires_grad}
    assert frozen == {'stem.weight_quant.learned_step', 'stem.own_input_quant.learned_step'}


@pytest.mark.parametrize('reshape', [True, False])
def test_what_is_learned_has_a_gradient_in_every_stage(reshape):
    """DistributedDataParallel waits for it."""
    torch.manual_seed(0)
    model, x = Net(Block()).train(), torch.randn(4, 4, 8, 8)
    quantize_model(model, Quantization.from_dict(dict(method='lsq')), record(model, lambda: model(x)))
    calibrate(model, [x])
    set_stage(model, Stage.RESHAPE if reshape else Stage.FREEZE)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
