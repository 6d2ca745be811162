"""docs/methods.md: a user's own file, imported by a config in a folder outside the project, trains."""

import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import ENV, ROOT

FILE, CONFIG = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/methods.md').read_text(), re.DOTALL)[1:]
SMALL = """
load_from = None
model = dict(backbone=dict(stem_channels=4, base_channels=4), head=dict(in_channels=32))
train_dataloader = dict(batch_size=16)
train_cfg = dict(max_epochs=1)
"""


@pytest.fixture
def folder(digits_root, tmp_path):
    """A folder with the file and the config of the guide, and a few of the digits."""
    (tmp_path / 'my_quantizer.py').write_text(FILE)
    (tmp_path / 'my_config.py').write_text(CONFIG.replace('/path/of/the/project', str(ROOT)) + SMALL)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits_root)
    return tmp_path


def train(folder, *options, **variables):
    command = [sys.executable, str(ROOT / 'tools/train.py'), 'my_config.py', *options]
    return subprocess.run(command, cwd=folder, env={**ENV, **variables}, capture_output=True, text=True)


def test_a_method_of_a_users_own_file_trains(folder):
    done = train(folder, PYTHONPATH=f'.:{ENV["PYTHONPATH"]}')
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / 'work_dirs/my_config/epoch_1.pth', weights_only=False)['state_dict']
    name = 'backbone.layer1.0.conv1.'
    weight = saved[f'{name}weight'].flatten(1).abs()
    assert torch.equal(saved[f'{name}weight_quant.threshold'], torch.quantile(weight, 0.98, dim=1))


def test_a_misspelt_option_of_it_is_refused(folder):
    options = ['--cfg-options', 'quantization.weight.quantile.q=1.5']
    done = train(folder, *options, PYTHONPATH=f'.:{ENV["PYTHONPATH"]}')
    assert done.returncode == 1
    assert 'quantization.weight.quantile.q=1.5 is not a number above 0 and at most 1' in done.stderr


def test_without_its_folder_on_the_path_the_file_is_missed(folder):
    done = train(folder)
    assert done.returncode == 1 and 'my_quantizer' in done.stderr
