"""tools/analyze.py as a user calls it: its files, its table, and one line for each wrong argument."""

import json
import sys

import pytest
import torch
from PIL import Image

from gdrq_mm.openmmlab.cli import ending
from tests.runs import tool_function

SHARED = 'backbone.layer2.0.conv1 (input of 2)'


@pytest.fixture
def tool(config, tmp_path, monkeypatch):
    """Runs the tool in tmp_path with the config of a small model; returns its exit code or its last line."""
    monkeypatch.chdir(tmp_path)
    config('tool').dump('tiny.py')
    run = tool_function('analyze.py')

    def tool(*arguments):
        monkeypatch.setattr(sys, 'argv', ['analyze.py', 'tiny.py', *map(str, arguments)])
        return ending(run)

    return tool


def test_the_tool(tool, float_checkpoint, capsys, tmp_path):
    arguments = ('--samples', 20, '--layers', 'backbone.layer2.0.*', '--float-checkpoint', float_checkpoint)
    assert tool(float_checkpoint, *arguments) == 0
    out = tmp_path / 'tool/analysis'
    assert sorted(p.name for p in out.iterdir()) == ['analysis.json', 'analysis.png', 'weights.png']
    written = json.loads((out / 'analysis.json').read_text())
    assert written['task'] == 'cls' and written['pictures'] == 20 and written['checkpoint']['calibrated_here']
    assert written['metric']['key'] == 'accuracy/top1' and written['model']['bits'] == [4, 4]
    names = [row['name'] for row in written['rows']]
    assert SHARED in names and 'head.fc' not in names
    costs = [row['cost'] for row in written['rows']]
    assert costs == sorted(costs, reverse=True)
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and 'top-1 on 20 of 40 test pictures' in shown
    for name in ('analysis.png', 'weights.png'):
        with Image.open(out / name) as picture:
            picture.load()


NO_BITS = ('quantization.weight.bits=32', 'quantization.activation.bits=32')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.pth'], 'checkpoint none.pth does not exist'),
        (['text.pth'], 'checkpoint text.pth is truncated or damaged'),
        (['other.pth'], 'other.pth is of another model'),
        (['FLOAT', '--float-checkpoint', 'other.pth'], 'other.pth is of another model'),
        (['FLOAT', '--float-checkpoint', 'none.pth'], 'checkpoint none.pth does not exist'),
        (['FLOAT', '--layers', 'head.fx'], "the pattern 'head.fx' matches no quantized layer"),
        (['FLOAT', '--metric', 'mIoU', '--layers', 'head.fc'], 'the test computes no mIoU, but accuracy/top1'),
        (['FLOAT', '--samples', '0'], '--samples 0 is less than 1'),
        (['FLOAT', '--no-metric', '--reference', 'float'], '--metric and --reference tell how costs are measured'),
        (['FLOAT', '--out', 'text.pth'], 'text.pth cannot be written'),
        (['FLOAT', '--launcher', 'slurm'], '--launcher: the analysis runs in one process'),
        (['FLOAT', '--cfg-options', 'quantization.weight.bits=9'], 'quantization.weight.bits=9'),
        (['FLOAT', '--cfg-options', *NO_BITS], 'leaves every layer float'),
        (['FLOAT', '--cfg-options', 'runner_type=Runner'], "runner_type='Runner' does not quantize"),
    ],
)
def test_bad_input_ends_in_one_line(tool, float_checkpoint, tmp_path, arguments, message):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / 'other.pth')
    line = tool(*(float_checkpoint if argument == 'FLOAT' else argument for argument in arguments))
    assert line.startswith('error: ') and message in line and '\n' not in line
    assert not list(tmp_path.rglob('analysis.*')) and not list(tmp_path.rglob('weights.png'))


def test_a_config_without_quantization(tool, config, float_checkpoint):
    config('tool', quantization=None).dump('tiny.py')
    assert tool(float_checkpoint) == 'error: the config has no quantization: there is nothing to analyze'
