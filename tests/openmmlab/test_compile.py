"""`compile=True` in a config: mmengine lets torch.compile trace the training step."""

import pytest
import torch
import torch._dynamo.utils

from gdrq_mm.core.compat import COMPILES
from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from tests.helpers import ROOT
from tests.runs import QUANTIZATION, TEST_ONLY, checkpoint_of, train

pytestmark = pytest.mark.skipif(not COMPILES, reason='torch.compile of a quantized model needs torch 2.6')
COMPILE = dict(backend='aot_eager')
"""What is traced, without the C++ compiler."""


@pytest.mark.full
def test_a_compiled_training_is_the_same_and_its_checkpoint_is_an_ordinary_one(make, run, tmp_path):
    quantization = dict(QUANTIZATION, deployable=True, schedule=dict(freeze=0.6))
    hooks = [dict(type='StatisticsHook', interval=3)]  # looks into quantizers, which is not traced
    losses, traced, states = {}, [], {}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for name, changes in (('plain', {}), ('compiled', dict(compile=COMPILE))):
        runner = make(name, quantization=quantization, custom_hooks=hooks, **changes)
        found = losses[name] = []

        def look(runner, found=found):
            found.append(runner.message_hub.get_scalar('train/loss').current())
            traced.append(torch._dynamo.utils.counters['stats']['unique_graphs'])

        states[name] = {key: value.clone() for key, value in train(runner, look).items()}
    torch.testing.assert_close(losses['compiled'], losses['plain'])
    torch.testing.assert_close(states['compiled'], states['plain'])
    steps = len(losses['plain'])
    assert not any(traced[:steps]) and steps == 12
    before, rounded, frozen = sorted(set(traced[steps:]))
    assert before == 0 and frozen == rounded + 1, 'a stage is traced once, and its loss is one graph'
    checkpoint = checkpoint_of(runner, 'epoch_3.pth')
    assert read_checkpoint(checkpoint)['state_dict'].keys() == states['plain'].keys()
    tester = make('test', quantization=quantization, load_from=checkpoint, compile=COMPILE, **TEST_ONLY)
    assert tester.test()['accuracy/top1'] == runner.message_hub.get_scalar('val/accuracy/top1').current()
    tester.cfg.dump(tmp_path / 'config.py')
    done = run(ROOT / 'tools/export.py', tmp_path / 'config.py', checkpoint, '--out', tmp_path / 'exported')
    assert done.returncode == 0, done.stderr
