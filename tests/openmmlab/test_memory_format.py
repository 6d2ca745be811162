"""A model in memory_format = 'channels_last'; tests/core/test_layers.py compares the gradients of single layers."""

import copy

import torch

from tests.runs import At, train


def test_channels_last_trains_the_same_model(make, tmp_path):
    """Thresholds and the first loss are the same, but for the order of sums; input channels in a wrong order move the
    loss by 2.8 %.

    Behind the first step nothing is to be compared: sums in another order flip a few codes, and in a network that has
    not been trained a flip changes the gradients by half. So does a change of the weights by 1e-7.
    """
    losses, starts = [], []
    # With fewer channels torch 2.13 crashes at 1x1 convolutions of stride 2 on CPUs that have AVX2 alone.
    wider = {'model.backbone.stem_channels': 8, 'model.backbone.base_channels': 8, 'model.head.in_channels': 64}
    torch.save(dict(state_dict=make('start', quantization=None, **wider).model.state_dict()), tmp_path / 'start.pth')
    wider['load_from'] = str(tmp_path / 'start.pth')
    for memory_format in ('contiguous', 'channels_last'):
        runner = make(memory_format, epochs=1, memory_format=memory_format, **wider)
        start = At(lambda r: starts.append(copy.deepcopy(r.model.state_dict())), 'before_train_epoch')
        runner.register_hook(start)
        train(runner)
        losses.append(float(runner.message_hub.get_scalar('train/loss').data[0][0]))
    assert runner.model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in starts[0].items():
        torch.testing.assert_close(value, starts[1][name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
