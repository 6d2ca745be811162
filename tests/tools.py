"""Tools and options that their tests share."""

import os

import torch

from tests.helpers import ROOT

TRAIN, TEST, PREPARE = (ROOT / 'tools' / name for name in ('train.py', 'test.py', 'prepare_data.py'))
FLOAT = ROOT / 'configs/cls/resnet18_width16_digits.py'
W4A4 = ROOT / 'configs/cls/resnet18_width16_gdrq_w4a4_digits.py'
TINY = (
    'train_dataloader.dataset.indices=24',  # the first 24 pictures of the training set: three iterations
    'train_dataloader.batch_size=8',
    'val_dataloader.dataset.indices=8',
    'test_dataloader.dataset.indices=8',
    'train_cfg.max_epochs=1',
    'load_from=None',
)


class Payload:
    """Creates a folder called 'executed' when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('executed',)


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def holds(message, *fragments):
    assert [f for f in fragments if f not in message] == [], message


def finite(path):
    return all(torch.isfinite(value.float()).all() for value in weights(path).values())
