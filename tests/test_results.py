"""Run records and the comparison table, and files that are written whole or not at all."""

import copy
import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from mmengine.config import Config

from gdrq_mm.checkpoint import write_whole
from gdrq_mm.errors import UserError
from gdrq_mm.results.record import make_record, model_name, read_record, write_record
from gdrq_mm.results.table import comparison_markdown, comparison_rows

MODEL = dict(
    methods=['gdrq', 'gdrq'],
    bits=[4, 4],
    first_last_bits=8,
    deployable=True,
    stage='quantize',
    parameters=100,
    quantized=90,
    float_bytes=4_000_000,
    bytes=500_000,
    bit_operations=10,
)


def config(**changes):
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier', backbone=dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained'))
            ),
            test_dataloader=dict(dataset=dict(type='CustomDataset', data_root='data/digits/cls')),
            test_evaluator=dict(type='Accuracy', topk=(1,)),
            work_dir='/somewhere/work_dirs/run',
        ),
        filename='/somewhere/configs/run.py',
        cfg_text='model = ...',
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'epoch_1.pth')
    return str(tmp_path / 'epoch_1.pth')


def record(checkpoint, top1, quantized, **changes):
    cfg = config(**changes)
    if quantized:
        cfg.quantization = dict(weight=dict(bits=4))
    return make_record(cfg, checkpoint, {'accuracy/top1': top1}, seed=3, model=MODEL)


def test_a_record_says_what_was_tested_and_with_what(checkpoint, tmp_path):
    import hashlib

    found = record(checkpoint, 91.5, quantized=True)
    assert found['checkpoint']['sha256'] == hashlib.sha256(open(checkpoint, 'rb').read()).hexdigest()
    assert (found['task'], found['seed'], found['metrics']) == ('cls', 3, {'accuracy/top1': 91.5})
    assert found['versions']['torch'] == version('torch') and found['versions']['onedl-mmcv']
    assert found['hardware']['cores'] >= 1 and len(found['git']['commit']) == 40
    assert found['quantization'] == {'weight': {'bits': 4}} and found['model']['name'] == 'ResNet-18'
    assert found['data']['name'] == 'digits/cls'
    assert '/somewhere' not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


def test_a_record_survives_writing_and_reading(checkpoint, tmp_path):
    found = record(checkpoint, 91.5, quantized=True)
    write_record(found, tmp_path / 'record.json')
    assert read_record(tmp_path / 'record.json') == json.loads(json.dumps(found))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['epoch_1.pth', 'record.json']


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"record_version": 99}', '\0\1'])
def test_what_is_not_a_record_is_refused(tmp_path, text):
    (tmp_path / 'record.json').write_text(text)
    with pytest.raises(UserError, match='record'):
        read_record(tmp_path / 'record.json')


def test_names_of_models():
    assert model_name(config(**{'model.backbone.type': 'mmpretrain.VGG', 'model.backbone.depth': 16})) == 'VGG-16'
    assert model_name(config(**{'model.type': 'FasterRCNN'})) == 'FasterRCNN ResNet-18'


def test_a_row_stands_beside_the_float_record_of_the_same_model_and_data(checkpoint):
    records = [record(checkpoint, 92.0, quantized=False), record(checkpoint, 91.5, quantized=True)]
    (row,) = comparison_rows(records)
    assert (row['float'], row['quantized'], row['drop'], row['bits']) == ('92.00', '91.50', '0.50', 'W4A4')
    assert row['size in MB'] == '4.00 → 0.50' and row['method'] == 'GDRQ'
    assert '| 92.00 | GDRQ | 91.50 | 0.50 |' in comparison_markdown(records)


@pytest.mark.parametrize(
    'change',
    [
        {'model.backbone.depth': 34},
        {'test_dataloader.dataset.type': 'ImageNet'},
        {'test_evaluator.topk': (1, 5)},
        {'test_dataloader.dataset.pipeline': [dict(type='CenterCrop')]},
    ],
)
def test_a_float_record_of_something_else_is_not_its_baseline(checkpoint, change):
    records = [record(checkpoint, 92.0, quantized=False, **change), record(checkpoint, 91.5, quantized=True)]
    (row,) = comparison_rows(records)
    assert (row['float'], row['drop']) == ('not run', '')


def test_where_the_first_weights_came_from_does_not_matter(checkpoint):
    other = record(checkpoint, 92.0, quantized=False, **{'model.backbone.init_cfg': None})
    (row,) = comparison_rows([other, record(checkpoint, 91.5, quantized=True)])
    assert row['float'] == '92.00'


def test_the_config_is_not_changed(checkpoint):
    cfg = config()
    before = copy.deepcopy(cfg)
    make_record(cfg, checkpoint, {'accuracy/top1': 1.0}, 0, MODEL)
    assert cfg.to_dict() == before.to_dict()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    code = (
        'import resource, signal, sys; from gdrq_mm.checkpoint import write_whole\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n'
        'write_whole(sys.argv[1], bytes(5000))'
    )
    done = subprocess.run([sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and 'File too large' in done.stderr
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_write_whole_replaces(tmp_path):
    write_whole(tmp_path / 'file', b'one')
    write_whole(tmp_path / 'file', b'two')
    assert (tmp_path / 'file').read_bytes() == b'two' and len(list(tmp_path.iterdir())) == 1
