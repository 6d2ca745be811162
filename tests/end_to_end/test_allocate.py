"""tools/allocate.py as a user calls it: three ways to judge bits, all tasks, and one line for each wrong argument."""

import json
import sys

import pytest
import torch
from PIL import Image

from gdrq_mm.core.modules import quant_layers
from gdrq_mm.deploy import measure
from gdrq_mm.openmmlab.cli import ending, read_config
from gdrq_mm.openmmlab.models import bare_model
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.runs import checkpoint_of, task_config, tool_function

FORKED = ('backbone.layer2.0.conv1', 'backbone.layer2.0.downsample.0')
"""Two layers that read one tensor."""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Runs the tool in tmp_path with the config tiny.py; returns its exit code or its last line."""
    monkeypatch.chdir(tmp_path)
    run = tool_function('allocate.py')

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['allocate.py', 'tiny.py', *map(str, arguments)])
        return ending(run)

    return tool


@pytest.fixture
def tiny(config):
    config('tool').dump('tiny.py')


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bits_of(config, checkpoint=None):
    """Layer -> bits of the model of a config, and the runner."""
    cfg = read_config(config)
    if checkpoint is not None:
        cfg.load_from = checkpoint
    cfg.experiment_name = f'{cfg.experiment_name}-{config}'
    runner = QuantRunner.from_cfg(cfg)
    layers = quant_layers(bare_model(runner.model))
    return {name: (x.weight_quant.bits, x.input_quant.bits) for name, x in layers.items()}, runner


def test_by_loss_then_another_budget_in_no_time(tool, tiny, float_checkpoint, capsys, tmp_path, monkeypatch):
    arguments = (float_checkpoint, '--budget', 'size=0.2', 'bitops=0.05', '--batches', 1)
    assert tool(*arguments, '--out', 'mixed.py') == 0
    shown = capsys.readouterr().out
    assert 'Budget size: ' in shown and 'The best uniform bits within the budget: W' in shown
    text = (tmp_path / 'mixed.py').read_text()
    assert text.startswith('# ResNet_CIFAR-18 in mixed precision') and "_base_ = ['tiny.py']" in text
    assert '% of operations' in text and 'Budget bitops' in text
    bits, runner = bits_of('mixed.py')
    assert len({each[0] for each in bits.values()}) > 1 and bits['backbone.conv1'] == bits['head.fc'] == (8, 8)
    assert bits[FORKED[0]][1] == bits[FORKED[1]][1]
    assert runner.describe()['bytes'] <= 0.2 * runner.describe()['float_bytes']
    page = (tmp_path / 'mixed.html').read_text()
    assert all(name in page for name in bits) and 'http' not in page.replace('http-equiv', '')
    with Image.open(tmp_path / 'mixed.png') as picture:
        picture.load()
    written = json.loads((tmp_path / 'tool/sensitivities_loss.json').read_text())
    assert written['values'][f'{FORKED[0]}.input'].keys() == {'2', '3', '4', '8'}
    assert f'{FORKED[1]}.input' not in written['values']
    monkeypatch.setattr('gdrq_mm.openmmlab.sensitivities.loss_sensitivity', None)  # is not called again
    assert tool(*arguments[:2], 'size=0.3', 'bitops=0.05', '--batches', 1, '--bits', 3, 4, '--out', 'other.py') == 0
    assert {w for name, (w, _) in bits_of('other.py')[0].items() if 'layer' in name} <= {3, 4}
    changed = (*arguments, '--out', 'third.py', '--cfg-options', 'data_preprocessor.mean=[0,0,0]')
    assert 'has the sensitivities of another config' in tool(*changed)


def test_by_metric_goes_on_where_it_stopped(tool, tiny, float_checkpoint, tmp_path, monkeypatch):
    from gdrq_mm.openmmlab import sensitivities

    evaluate, runs = sensitivities.evaluate, []

    def counted(runner):
        runs.append(1)
        if len(runs) == 6:
            raise KeyboardInterrupt
        return evaluate(runner)

    monkeypatch.setattr(sensitivities, 'evaluate', counted)
    arguments = (float_checkpoint, '--budget', 'size=0.13', '--by', 'metric', '--samples', 20, '--bits', 2, 4)
    arguments = (*arguments, '--out', 'mixed.py')
    assert tool(*arguments) == 'interrupted' and not (tmp_path / 'mixed.py').exists()
    written = json.loads((tmp_path / 'tool/sensitivities_metric.json').read_text())
    assert sum(len(options) for options in written['values'].values()) == 4
    assert written['notes']['metric'] == 'accuracy/top1'
    assert tool(*arguments) == 0
    whole = json.loads((tmp_path / 'tool/sensitivities_metric.json').read_text())
    assert len(runs) == 6 + sum(len(options) for options in whole['values'].values()) - 4
    assert 'summed loss of top-1' in (tmp_path / 'mixed.py').read_text()
    assert {w for name, (w, _) in bits_of('mixed.py')[0].items() if 'layer' in name} == {2, 4}


def test_by_search(tool, tiny, float_checkpoint, tmp_path):
    """An epoch of four iterations; the bits fit the budget whatever was learned."""
    arguments = (float_checkpoint, '--budget', 'bitops=0.01', '--by', 'search', '--bits', 2, 4, '--batches', 1)
    assert tool(*arguments, '--out', 'mixed.py', '--cfg-options', 'train_cfg.max_epochs=1') == 0
    _, runner = bits_of('mixed.py')
    assert '-log of the learned share' in (tmp_path / 'mixed.py').read_text()
    assert 'train_cfg' not in (tmp_path / 'mixed.py').read_text()
    found = runner.describe()
    assert found['bit_operations'] <= 0.01 * 1024 * sum(row.macs for row in runner.report.layers)
    assert not list(tmp_path.glob('tool/*.pth'))


def test_by_times_of_a_runtime(tool, tiny, float_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    monkeypatch.setattr(measure, 'PAUSE', 0)
    arguments = (float_checkpoint, '--batches', 1, '--bits', 4, 8, '--threads', 1)
    line = tool(*arguments, '--budget', 'ms=1e-6', '--out', 'mixed.py')
    assert line.startswith('error: budget ms: 1e-06 ms') and 'bits alone cannot meet it' in line and '\n' not in line
    assert tool(*arguments, '--budget', 'ms=1000', '--out', 'mixed.py') == 0
    assert 'each alone, in onnxruntime' in (tmp_path / 'mixed.py').read_text()
    assert set(bits_of('mixed.py')[0].values()) == {(8, 8)}  # the time allows it


@pytest.mark.parametrize('task', ['cls', *(pytest.param(task, marks=pytest.mark.full) for task in ('seg', 'det'))])
def test_a_model_of_each_task_is_trained_and_exported(task, tool, scenes_root, tmp_path, monkeypatch):
    cfg = task_config(task, scenes_root, tmp_path / 'work')
    cfg.dump('tiny.py')
    cfg.pop('quantization')
    torch.save(QuantRunner.from_cfg(cfg).model.state_dict(), 'float.pth')
    assert tool('float.pth', '--budget', 'size=0.12', '--batches', 1, '--bits', 2, 4, '--out', 'mixed.py') == 0
    bits, runner = bits_of('mixed.py')
    assert {w for w, _ in bits.values()} == {2, 4, 8}
    runner.train()
    assert runner.iter == 2
    run = tool_function('export.py')
    arguments = ['mixed.py', checkpoint_of(runner), '--format', 'packed', '--out', 'packed']
    monkeypatch.setattr(sys, 'argv', ['export.py', *arguments])
    assert ending(run) == 0 and (tmp_path / 'packed/model.safetensors').is_file()


NO_TEST = ('test_dataloader=None', 'test_cfg=None', 'test_evaluator=None')
NO_BITS = ('quantization.weight.bits=32', 'quantization.activation.bits=32')
SIZE = ('--budget', 'size=0.2')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['FLOAT', '--budget', 'sise=1'], "budget 'sise' is not one of size, bitops, ms; did you mean 'size'"),
        (['FLOAT', '--budget', 'size=1e-3'], 'is impossible; the least is '),
        (['FLOAT', '--budget', 'size=0.12', '--cfg-options', "quantization.skip=['*.layer4.*']"], 'conv2 in float, '),
        (['FLOAT', *SIZE, '--bits', '1'], "bits 1: method 'gdrq' has 2 to 8 bits for the weight of a layer"),
        (
            ['FLOAT', *SIZE, '--sensitivities', 'others.json'],
            'has the sensitivities of another checkpoint: "1234", not',
        ),
        (['FLOAT', *SIZE, '--sensitivities', 'text.pth'], 'text.pth is no file of sensitivities'),
        (['FLOAT', *SIZE, '--cfg-options', *NO_BITS], 'nothing is to be chosen'),
        (['FLOAT', *SIZE, '--cfg-options', 'quantization.control=True'], 'the model stays float'),
        (['FLOAT', *SIZE, '--out', 'tiny.py'], '--out tiny.py: tiny.py exists'),
        (['FLOAT', *SIZE, '--out', 'own.py'], '--out own.py: own.png exists'),
        (['FLOAT', *SIZE, '--budget', 'size=0.1'], 'budget size is given twice'),
        (['FLOAT', *SIZE, '--bits', '2,4', '--bits', '9'], "bits 9: method 'gdrq' has 2 to 8 bits"),
        (['FLOAT', *SIZE, '--out', 'mixed.txt'], '--out mixed.txt is not the name of a config'),
        (['FLOAT', *SIZE, '--out', 'text.pth/mixed.py'], '--out text.pth/mixed.py cannot be written'),
        (['FLOAT', *SIZE, '--sensitivities', 'text.pth/s.json'], '--sensitivities text.pth/s.json cannot be written'),
        (
            ['FLOAT', *SIZE, '--by', 'search', '--sensitivities', 's.json'],
            '--sensitivities is for --by loss and metric',
        ),
        (['FLOAT', *SIZE, '--samples', '8'], '--samples is for --by metric'),
        (['FLOAT', *SIZE, '--threads', '2'], '--threads is for --budget ms=...'),
        (
            ['FLOAT', *SIZE, '--by', 'metric', '--cfg-options', *NO_TEST],
            'the config has no test_dataloader: --by metric',
        ),
        (['FLOAT', *SIZE, '--launcher', 'slurm'], '--launcher: bits are chosen in one process'),
        (['FLOAT', *SIZE, '--amp'], '--amp is for --by search'),
        (['FLOAT', *SIZE, '--batches', '0'], '--batches 0 is less than 1'),
        (['none.pth', *SIZE], 'checkpoint none.pth does not exist'),
        (['other.pth', *SIZE], 'other.pth is of another model'),
        (['quantized.pth', *SIZE], 'quantized.pth is of a quantized model; bits are chosen for the float one'),
    ],
)
def test_bad_input_ends_in_one_line(tool, tiny, float_checkpoint, tmp_path, arguments, message):
    (tmp_path / 'text.pth').write_text('not a file of sensitivities')
    (tmp_path / 'own.png').touch()
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), 'other.pth')
    torch.save({'conv.weight': torch.zeros(4), 'conv.weight_quant.threshold': torch.zeros(4)}, 'quantized.pth')
    about = dict(sensitivities_version=1, by='loss', checkpoint='1234', notes={}, values={})
    (tmp_path / 'others.json').write_text(json.dumps(about))
    out = [] if '--out' in arguments else ['--out', 'mixed.py']
    line = tool(*(float_checkpoint if argument == 'FLOAT' else argument for argument in arguments), *out)
    assert line.startswith('error: ') and message in line and '\n' not in line
    assert not list(tmp_path.glob('mixed.*'))


def test_a_config_without_quantization(tool, config, float_checkpoint):
    config('tool', quantization=None).dump('tiny.py')
    line = tool(float_checkpoint, *SIZE, '--out', 'mixed.py')
    assert line == 'error: the config has no quantization: there are no bits to choose'
