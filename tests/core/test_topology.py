"""gdrq_mm/core/topology.py: what feeds what in small hand-written models."""

import json
import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from gdrq_mm.core.topology import Plan, record
from tests.helpers import Block, Function, conv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def plan_of(model, shape=(1, 4, 8, 8)):
    x = torch.randn(shape)
    return record(model, lambda: model(x))


def net(*blocks):
    return nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *blocks)


# ---- calls and inputs -----------------------------------------------------------------------------------------------


def test_calls_are_counted_in_the_order_of_the_first_call():
    model = Function(lambda m, x: m.first(m.second(m.first(x))), second=conv(), first=conv(), never=conv())
    assert plan_of(model).calls == {'': 1, 'first': 2, 'second': 1}


def test_a_shared_module_goes_by_its_first_name():
    shared = conv()
    model = Function(lambda m, x: m.b(m.a(x)), a=shared, b=shared)
    assert plan_of(model).calls == {'': 1, 'a': 2}


def test_readers_of_one_tensor_have_the_same_input():
    model = Function(lambda m, x: m.a(x) + m.b(x) + m.c(x * 2), a=conv(), b=conv(), c=conv())
    inputs = plan_of(model).inputs
    assert inputs['a'] == inputs['b'] != inputs['c']


def test_the_input_of_a_module_is_that_of_its_first_call():
    model = Function(lambda m, x: m.b(x) + m.a(m.a(x)), a=conv(), b=conv())
    inputs = plan_of(model).inputs
    assert inputs['a'] == inputs['b']


def test_an_in_place_change_makes_another_tensor():
    def forward(model, x):
        x = model.stem(x)
        a = model.a(x)
        return a + model.b(model.relu(x))

    model = Function(forward, stem=conv(), a=conv(), relu=nn.ReLU(inplace=True), b=conv())
    inputs = plan_of(model).inputs
    assert inputs['a'] != inputs['b'] and inputs['a'] == inputs['relu']


@pytest.mark.parametrize('layer', [conv(), nn.Linear(8, 8), nn.BatchNorm2d(4)], ids=lambda m: type(m).__name__)
def test_a_layer_called_by_keyword_is_recorded(layer):
    plan = plan_of(Function(lambda m, x: m.layer(input=x), layer=layer))
    assert plan.calls['layer'] == 1 and 'layer' in plan.inputs


# ---- batch normalization --------------------------------------------------------------------------------------------


def test_each_convolution_is_paired_with_its_batch_normalization():
    norms = plan_of(net(Block(), Block(downsample=True))).norms
    assert norms == {
        '0': '1',
        '3.conv1': '3.bn1',
        '3.conv2': '3.bn2',
        '4.conv1': '4.bn1',
        '4.conv2': '4.bn2',
        '4.downsample.0': '4.downsample.1',
    }


def test_a_convolution_whose_output_is_changed_before_has_no_batch_normalization():
    model = Function(lambda m, x: m.bn(m.conv(x) * 2), conv=conv(), bn=nn.BatchNorm2d(4))
    assert plan_of(model).norms == {}


def test_a_convolution_in_a_container_is_paired():
    model = Function(lambda m, x: m.bn(m.part(x)), part=nn.Sequential(conv(), conv()), bn=nn.BatchNorm2d(4))
    assert plan_of(model).norms == {'part.1': 'bn'}


def test_only_convolutions_are_paired():
    model = Function(lambda m, x: m.conv(m.bn(m.relu(x))), relu=nn.ReLU(), bn=nn.BatchNorm2d(4), conv=conv())
    assert plan_of(model).norms == {}


# ---- additions ------------------------------------------------------------------------------------------------------


def test_a_block_adds_its_last_batch_normalization_and_its_input():
    additions = plan_of(net(Block(), Block())).additions
    assert [a.module for a in additions] == ['3', '4']
    assert additions[0].operands == (('3.bn2',), ('2',))
    assert additions[1].operands == (('4.bn2',), ('3.relu', '3'))


def test_a_downsample_shortcut_is_an_operand():
    (addition,) = plan_of(net(Block(downsample=True))).additions
    assert addition.operands == (('3.bn2',), ('3.downsample.1', '3.downsample'))


def test_an_operand_made_by_a_function_has_no_module():
    model = Function(lambda m, x: m.a(x) + nn.functional.relu(m.b(x)), a=conv(), b=conv())
    (addition,) = plan_of(model).additions
    assert addition.operands == (('a',), ())


ADDITIONS = {
    'a + b': lambda a, b: a + b,
    'a.add(b)': lambda a, b: a.add(b),
    'a.add_(b)': lambda a, b: a.add_(b),
    'a.add(other=b)': lambda a, b: a.add(other=b),
    'torch.add(a, b)': lambda a, b: torch.add(a, b),
    'torch.add(a, other=b)': lambda a, b: torch.add(a, other=b),
    'torch.add(input=a, other=b)': lambda a, b: torch.add(input=a, other=b),
}


@pytest.mark.parametrize('spelling', ADDITIONS)
def test_an_addition_is_recorded_however_it_is_written(spelling):
    model = Function(lambda m, x: ADDITIONS[spelling](m.a(x), m.b(x)), a=conv(), b=conv())
    assert [a.operands for a in plan_of(model).additions] == [(('a',), ('b',))]


def test_an_in_place_addition_is_recorded():
    def forward(model, x):
        out = model.a(x)
        out += model.b(x)
        return out

    (addition,) = plan_of(Function(forward, a=conv(), b=conv())).additions
    assert addition.operands == (('a',), ('b',))


@pytest.mark.parametrize('other', [2.0, torch.ones(4, 1, 1)], ids=['number', 'bias'])
def test_adding_a_constant_is_no_addition_of_two_activations(other):
    assert plan_of(Function(lambda m, x: m.a(x) + other, a=conv())).additions == []


# ---- activation functions --------------------------------------------------------------------------------------------

ACTIVATIONS = {
    'nn.SiLU': nn.SiLU(),
    'nn.SiLU in place': nn.SiLU(inplace=True),
    'nn.LeakyReLU': nn.LeakyReLU(0.1),
    'nn.LeakyReLU in place': nn.LeakyReLU(0.1, inplace=True),
    'nn.Hardswish': nn.Hardswish(),
    'nn.GELU': nn.GELU(),
    'nn.Mish': nn.Mish(),
    'nn.PReLU': nn.PReLU(),
    'F.silu': nn.functional.silu,
    'x * torch.sigmoid(x)': lambda x: x * torch.sigmoid(x),
    'x.tanh()': lambda x: x.tanh(),
    'x.sigmoid_()': lambda x: x.sigmoid_(),
}


@pytest.mark.parametrize('spelling', ACTIVATIONS)
def test_what_an_activation_function_reads_is_recorded_however_it_is_written(spelling):
    function = ACTIVATIONS[spelling]
    children = dict(act=function) if isinstance(function, nn.Module) else {}
    model = Function(lambda m, x: function(m.bn(m.a(x))), a=conv(), bn=nn.BatchNorm2d(4), **children)
    activated = plan_of(model).activated
    assert activated == ['bn']


@pytest.mark.parametrize(
    'function',
    [torch.relu, nn.ReLU(inplace=True), nn.MaxPool2d(2), lambda x: x * 2],
    ids=['torch.relu', 'nn.ReLU', 'nn.MaxPool2d', 'x * 2'],
)
def test_other_functions_are_no_activation_functions(function):
    assert plan_of(Function(lambda m, x: function(m.a(x)), a=conv())).activated == []


def test_a_result_behind_relu_is_not_that_of_the_convolution():
    assert plan_of(Function(lambda m, x: torch.sigmoid(torch.relu(m.a(x))), a=conv())).activated == []


def test_a_result_that_two_functions_read_is_one_and_not_all_results_need_be_read():
    def forward(m, x):
        y = m.a(x)
        return torch.sigmoid(y) * torch.tanh(y) + torch.sigmoid(m.b(m.b(x)))

    assert plan_of(Function(forward, a=conv(), b=conv())).activated == ['a']


# ---- multiply-accumulates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'layer, shape, macs',
    [
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 6), 10 * 6 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 10, 6), 5 * 3 * 8 * 3 * 9),
        (nn.Conv2d(8, 12, (3, 1), groups=4), (1, 8, 10, 6), 8 * 6 * 12 * 2 * 3),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (3, 8, 5, 5), 25 * 8 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 3), 5 * 3 * 4 * 6 * 4),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 3), 5 * 3 * 4 * 3 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 8 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
        (nn.Linear(7, 5), (1, 7), 35),
        (nn.Linear(7, 5), (4, 7), 35),
        (nn.Linear(7, 5), (2, 9, 7), 9 * 35),
    ],
    ids=str,
)
def test_macs_of_one_image_equal_the_hand_count(layer, shape, macs):
    model = nn.Sequential(layer)
    assert plan_of(model, shape).macs == {'0': macs}


def test_macs_of_a_module_that_is_called_twice_add_up():
    model = Function(lambda m, x: m.a(m.a(x)), a=conv())
    assert plan_of(model).macs == {'a': 2 * 64 * 4 * 4 * 9}


def test_macs_of_an_image_count_all_its_crops():
    # as the box head of a detector, or window attention: one image, eight crops
    model = Function(lambda m, x: m.fc(m.stem(x).view(8, 32)), stem=conv(), fc=nn.Linear(32, 5))
    assert plan_of(model).macs == {'stem': 64 * 4 * 4 * 9, 'fc': 8 * 32 * 5}


def test_images_are_those_of_the_input():
    """Not those of the first layer: tokens may be in one dimension with the images, and a table may come first."""
    flat = Function(lambda m, x: m.fc(x.flatten(0, 1)), fc=nn.Linear(8, 5))
    assert plan_of(flat, (2, 16, 8)).macs == {'fc': 16 * 8 * 5}
    grid = Function(lambda m, x: m.stem(x) + (torch.ones(16, 16, 2) @ m.table).sum(), stem=conv())
    grid.register_buffer('table', torch.ones(2, 3))
    assert plan_of(grid).macs['stem'] == 64 * 4 * 4 * 9


@pytest.mark.parametrize('layer', [conv(), nn.ConvTranspose2d(4, 4, 2)], ids=lambda m: type(m).__name__)
def test_an_empty_batch_is_recorded(layer):
    plan = plan_of(nn.Sequential(layer), (0, 4, 8, 8))  # a mask head without a detection
    assert plan.calls['0'] == 1 and plan.macs == {'0': 0}


def test_a_linear_layer_without_rows_is_recorded():
    assert plan_of(nn.Sequential(nn.Linear(4, 2)), (0, 4)).macs == {'0': 0}


# ---- the model is left as it was ------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers, normalizes, and fails on demand."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)
        self.fail = False
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, self.bn.training, torch.is_grad_enabled()))
        if self.fail:
            raise RuntimeError('on demand')
        return self.bn(self.conv(x + torch.rand_like(x)))


@pytest.fixture
def noisy():
    model = Noisy().train()
    model.bn.eval()
    return model


@pytest.fixture(params=[False, True], ids=['returns', 'raises'])
def recorded(request, noisy):
    """The model after a prediction that returned or raised, with its state before."""
    noisy.fail = request.param
    x = torch.randn(1, 4, 8, 8)
    before = {k: v.clone() for k, v in noisy.state_dict().items()}, torch.get_rng_state()
    if noisy.fail:
        with pytest.raises(RuntimeError, match='on demand'):
            record(noisy, lambda: noisy(x))
    else:
        record(noisy, lambda: noisy(x))
    return noisy, before


def test_the_prediction_is_in_evaluation_mode_without_gradients(noisy):
    record(noisy, lambda: noisy(torch.randn(1, 4, 8, 8)))
    assert noisy.modes == [(False, False, False)]


def test_training_flags_are_left(recorded):
    model, _ = recorded
    assert (model.training, model.conv.training, model.bn.training) == (True, True, False)


def test_hooks_are_removed(recorded):
    model, _ = recorded
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_random_state_weights_and_statistics_are_left(recorded):
    model, (state, random_state) = recorded
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_hooks_of_the_model_stay():
    model, calls = net(Block()), []
    model[3].conv1.register_forward_hook(lambda *args: calls.append(1))
    plan_of(model)
    model(torch.randn(1, 4, 8, 8))
    assert len(calls) == 2


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_a_checkpointed_segment_is_recorded(use_reentrant):
    model = Function(lambda m, x: checkpoint(m.block, x, use_reentrant=use_reentrant), block=Block())
    plan = plan_of(model)
    assert len(plan.additions) == 1 and plan.norms == {'block.conv1': 'block.bn1', 'block.conv2': 'block.bn2'}


# ---- the plan depends on the model alone ----------------------------------------------------------------------------


class Windows(nn.Module):
    """Runs its parts on each window of a picture, as sliding inference does; `scale` reads and adds outside of them."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.SiLU(), Block()), Levels()

    def forward(self, x):
        return torch.cat([self.head(self.backbone(window)) for window in x.split(8, -1)], -1)


class Levels(nn.Module):
    """One convolution for three pyramid levels."""

    def __init__(self):
        super().__init__()
        self.shared, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return sum(self.bn(self.shared(scale * x)) for scale in (1, 2, 3))


def plan_for(model, width):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, width)
    return record(model, lambda: model(x), whole=False)


def test_neither_windows_nor_the_size_of_the_picture_change_the_plan():
    model = Windows()
    one, many = plan_for(model, 8), plan_for(model, 40)
    assert one == many
    assert one.calls['backbone.0'] == 1 and one.calls['head.shared'] == 3
    assert one.norms == {'backbone.0': 'backbone.1', 'backbone.3.conv1': 'backbone.3.bn1'} | {
        'backbone.3.conv2': 'backbone.3.bn2',
        'head.shared': 'head.bn',
    }
    assert one.activated == ['backbone.1'] and len(one.additions) == 3
    assert many.macs['backbone.0'] == 5 * one.macs['backbone.0'], 'the operations of a picture are those of all windows'


def test_a_forward_that_is_called_as_a_whole_counts_all_calls():
    assert plan_of(Windows(), (1, 4, 8, 40)).calls['backbone.0'] == 5


def test_recording_keeps_no_tensor_alive():
    model, alive = nn.Sequential(*(conv() for _ in range(30))), []
    outputs = []
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
        layer.register_forward_hook(lambda *args: alive.append(sum(each() is not None for each in outputs)))
    plan_of(model)
    assert len(alive) == 30 and max(alive) <= 3


SPELLINGS = {
    '@': lambda a, b: a @ b,
    'reversed': lambda a, b: b.__rmatmul__(a),
    'baddbmm': lambda a, b: torch.baddbmm(torch.zeros(4), a, batch2=b),
    'matmul': torch.matmul,
    'bmm': torch.bmm,
    'einsum': lambda a, b: torch.einsum('nij,njk->nik', a, b),
    'attention': lambda a, b: nn.functional.scaled_dot_product_attention(a, b, b),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_a_product_of_two_activations_is_recorded_however_it_is_written(spelling):
    inner = Function(lambda m, x: SPELLINGS[spelling](x, x.transpose(1, 2).contiguous()))
    model = Function(lambda m, x: m.inner(m.inner(x)), inner=inner)
    plan = record(model, lambda: model(torch.rand(2, 4, 4)))
    count = 2 if spelling == 'attention' else 1
    assert [(each.module, each.number, each.note) for each in plan.products] == [('inner', i, '') for i in range(count)]
    assert [plan.macs[each.name] for each in plan.products] == [2 * 4 * 4 * 4] * count  # in two calls
    assert [each.softmax for each in plan.products] == [(False, False), (True, False)][:count]


def test_a_product_with_a_weight_is_none_of_two_activations():
    inner = Function(lambda m, x: x @ m.weight)
    inner.weight = nn.Parameter(torch.rand(4, 4))
    model = Function(lambda m, x: m.inner(x), inner=inner)
    (product,) = record(model, lambda: model(torch.rand(2, 4, 4))).products
    assert product.note == 'one factor is a parameter'


def test_softmax_is_followed_through_what_keeps_its_values():
    def forward(m, x):
        weights = m.drop(x.softmax(-1)).transpose(1, 2).reshape(2, 4, 4)
        return x @ weights + (weights * 2) @ x

    model = Function(lambda m, x: m.inner(x), inner=Function(forward, drop=nn.Dropout(0.5)))
    assert [p.softmax for p in record(model, lambda: model(torch.rand(2, 4, 4))).products] == [
        (False, True),
        (False, False),
    ]


def test_the_first_plans_know_of_no_products():
    content = plan_of(net(Block())).to_dict()
    del content['products']
    assert Plan.from_dict(content).products == []
    (old,) = Plan.from_dict({**content, 'products': ['head']}).products  # later ones named modules
    assert (old.module, old.note) == ('head', 'recorded before products were quantized')


def test_a_plan_survives_as_plain_data():
    plan = plan_for(Windows(), 8)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.macs == plan.macs and again.to_dict() == plan.to_dict()


@pytest.mark.parametrize(
    'change',
    [
        dict(calls={'a': '1'}),
        dict(inputs={'a': True}),
        dict(norms={'a': 1}),
        dict(norms=['a']),
        dict(last='abc'),
        dict(activated=[1]),
        dict(training_only=None),
        dict(additions=[{'module': 'a'}]),
        dict(additions=[{'module': 'a', 'operands': [['b']]}]),
        dict(additions=[{'module': 1, 'operands': [[], []]}]),
        dict(additions=1),
        dict(products=1),
        dict(products=[{'module': 'a', 'number': 0, 'kind': 'matmul', 'softmax': [0, 1], 'note': ''}]),
        dict(products=[{'module': 'a', 'softmax': [True, True]}]),
        dict(more=1),
    ],
)
def test_what_is_no_plan_is_refused(change):
    with pytest.raises(ValueError, match='plan'):
        Plan.from_dict({**plan_for(Windows(), 8).to_dict(), **change})


def test_names_with_a_prefix_in_common_are_told_apart():
    plan = Plan(training_only=['auxiliary_head'])
    assert plan.deployed('auxiliary_head2.conv') and plan.deployed('backbone')
    assert not plan.deployed('auxiliary_head') and not plan.deployed('auxiliary_head.conv')
