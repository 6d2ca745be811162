"""A model in memory_format = 'channels_last'."""

import copy

import torch

from tests.runs import At, train


def test_channels_last_gives_the_same_model(make, tmp_path):
    """Sums in another order flip a few codes, so BN statistics drift apart with the steps; weights do not."""
    ends, starts = [], []
    # With fewer channels torch 2.13 crashes at 1x1 convolutions of stride 2 on CPUs that have AVX2 alone.
    wider = {'model.backbone.stem_channels': 8, 'model.backbone.base_channels': 8, 'model.head.in_channels': 64}
    wider['optim_wrapper.optimizer.lr'] = 0.005
    torch.save(dict(state_dict=make('start', quantization=None, **wider).model.state_dict()), tmp_path / 'start.pth')
    wider['load_from'] = str(tmp_path / 'start.pth')
    for memory_format in ('contiguous', 'channels_last'):
        runner = make(memory_format, epochs=1, memory_format=memory_format, **wider)
        start = At(lambda r: starts.append(copy.deepcopy(r.model.state_dict())), 'before_train_epoch')
        runner.register_hook(start)
        train(runner)
        ends.append(dict(runner.model.named_parameters()))
    assert ends[1]['backbone.conv1.weight'].is_contiguous(memory_format=torch.channels_last)
    for name, value in starts[0].items():
        torch.testing.assert_close(value, starts[1][name], rtol=1e-5, atol=1e-6)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0.02, atol=0.02)
