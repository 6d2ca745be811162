"""tools/export.py --for: graphs for one runtime."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch

from gdrq_mm.commands import export
from gdrq_mm.core.calibrate import calibrate
from gdrq_mm.core.errors import UserError
from gdrq_mm.deploy import runtime
from gdrq_mm.openmmlab.apis import infer, init_model
from tests.helpers import ROOT

TOOL = ROOT / 'tools/export.py'


@pytest.fixture
def refused(monkeypatch):
    """Runs the tool here; what it says instead of exporting."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['export.py', 'config.py', 'model.pth', '--out', 'nowhere', *args])
        with pytest.raises(UserError) as caught:
            export.main()
        return str(caught.value)

    return run


def test_what_it_cannot_be_for_is_one_line(refused, monkeypatch):
    assert refused('--for', 'openvino', '--format', 'packed') == '--for openvino: a packed file is for no runtime'
    monkeypatch.setattr(runtime.importlib.util, 'find_spec', lambda name: name == 'onnxruntime' or None)
    expected = "--for openvino: it is not installed: uv pip install 'gdrq-mm[deploy]'"
    assert refused('--for', 'openvino') == expected


@pytest.mark.full
def test_a_detector_for_openvino_has_no_quantizers_in_front_of_silu(tmp_path, digits_root, run):
    torch.manual_seed(0)
    config = ROOT / 'configs/det/yolox_nano_gdrq_w4a4_digits.py'
    model = init_model(config, None, 'cpu')
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    calibrate(model, [picture], lambda picture: infer(model, picture), trains_next=False)
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'model.pth')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/digits').symlink_to(digits_root)
    done = run(TOOL, config, 'model.pth', '--out', 'exported', '--for', 'openvino')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'exported/export.json').read_text())['parts']['model']['for'] == 'openvino'
    graph = onnx.load(tmp_path / 'exported/model.onnx').graph
    quantizers = [node.name for node in graph.node if node.op_type == 'QuantizeLinear']
    assert len(quantizers) == 81 and not any('bn.output_quant' in name for name in quantizers)
    said = ' '.join(done.stdout.split())
    assert 'For OpenVINO 74 outputs in front of activation functions are not quantized.' in said
    assert 'openvino: ' in said and 'onnxruntime: ' not in said and 'is not installed' not in said
