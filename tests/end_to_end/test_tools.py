"""tools/ as a user runs them: what succeeds writes what it promises, and what diverges leaves good checkpoints."""

import json
import pickle
import shutil
import subprocess
import sys

import cv2
import pytest
import torch

from gdrq_mm.openmmlab.checkpoints import read_checkpoint
from gdrq_mm.report.record import MAIN_METRICS
from tests.helpers import ENV, ROOT, same
from tests.tools import FLOAT, TEST, TINY, TRAIN, W4A4, finite, holds, weights

# ---- what succeeds --------------------------------------------------------------------------------------------------


def test_training_writes_checkpoints_config_and_layer_table(trained):
    assert (trained / 'last_checkpoint').read_text() == str(trained / 'epoch_1.pth')
    assert (trained / W4A4.name).is_file()
    state = weights(trained / 'epoch_1.pth')
    assert int(state['backbone.layer1.0.conv1.weight_quant.state'][-1]) == 4
    (log,) = trained.glob('*/*.log')
    holds(log.read_text(), 'backbone.layer1.0.conv1', '699,056 of 701,466 parameters quantized', 'Epoch(val) [1]')


def test_testing_writes_a_record_and_predictions(home, trained):
    """As a user runs it, in a process of its own; nothing is on stderr."""
    checkpoint = trained / 'epoch_1.pth'
    command = [sys.executable, TEST, W4A4, checkpoint, '--out', 'predictions.pkl', '--cfg-options', *TINY]
    done = subprocess.run(command, cwd=home, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    record = json.loads((home / 'work_dirs' / W4A4.stem / 'record.json').read_text())
    assert 0 <= record['metrics']['accuracy/top1'] <= 100
    assert (record['task'], record['model']['bits'], record['data']['name']) == ('cls', [4, 4], 'digits/cls')
    predictions = pickle.loads((home / 'predictions.pkl').read_bytes())
    assert [int(p['pred_score'].numel()) for p in predictions] == [10] * 8
    right = sum(int(p['pred_label']) == int(p['gt_label']) for p in predictions)
    assert record['metrics']['accuracy/top1'] == pytest.approx(100 * right / 8)


def test_a_record_goes_where_the_user_says(home, run, trained):
    options = ('--work-dir', 'work', '--record', 'records/first.json', '--cfg-options', *TINY)
    assert run(TEST, W4A4, trained / 'epoch_1.pth', *options).returncode == 0
    assert json.loads((home / 'records/first.json').read_text())['quantization']['weight']['bits'] == 4
    assert not (home / 'work/record.json').exists()


def test_predictions_are_drawn(home, run, trained):
    options = ('--work-dir', 'work', '--show-dir', 'shown', '--cfg-options', *TINY)
    assert run(TEST, W4A4, trained / 'epoch_1.pth', *options).returncode == 0
    pictures = [cv2.imread(str(path)) for path in (home / 'shown').rglob('*.png')]
    assert len(pictures) == 8 and all(picture is not None for picture in pictures)


def test_test_time_augmentation_changes_the_scores(home, run, trained):
    for name, options in (('plain', ()), ('tta', ('--tta',))):
        command = (TEST, W4A4, trained / 'epoch_1.pth', '--work-dir', name, '--out', f'{name}.pkl', *options)
        done = run(*command, '--cfg-options', *TINY)
        assert done.returncode == 0, done.stderr
    plain, tta = (pickle.loads((home / f'{name}.pkl').read_bytes()) for name in ('plain', 'tta'))
    assert len(plain) == len(tta) == 8
    assert not torch.equal(plain[0]['pred_score'], tta[0]['pred_score'])


def test_resuming_continues_as_if_nothing_had_happened(home, run):
    command = (TRAIN, W4A4, '--cfg-options', *TINY, 'train_cfg.max_epochs=2')
    assert run(*command, '--work-dir', 'whole').returncode == 0
    (home / 'work').mkdir()
    shutil.copy(home / 'whole/epoch_1.pth', home / 'work')
    (home / 'work/last_checkpoint').write_text(str(home / 'work/epoch_1.pth'))
    resumed = run(*command, '--work-dir', 'work', '--resume')
    holds(resumed.stdout, 'resumed epoch: 1, iter: 3', 'Epoch(train) [2][3/3]')
    assert 'Epoch(train) [1]' not in resumed.stdout
    one, other = weights(home / 'work/epoch_2.pth'), weights(home / 'whole/epoch_2.pth')
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_resuming_an_empty_work_directory_starts_anew(home, run, trained):
    assert run(TRAIN, W4A4, '--work-dir', 'work', '--resume', '--cfg-options', *TINY).returncode == 0
    one, other = weights(home / 'work/epoch_1.pth'), weights(trained / 'epoch_1.pth')
    assert [name for name in other if not torch.equal(one[name], other[name])] == []


def test_mixed_precision_on_a_cpu(home, run, trained):
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--amp', '--cfg-options', *TINY)
    assert (done.returncode, done.stderr) == (0, '')
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert ('this CPU has no instructions for bfloat16' in done.stdout) == (not supported)
    state, float32 = weights(home / 'work/epoch_1.pth'), weights(trained / 'epoch_1.pth')
    assert finite(home / 'work/epoch_1.pth')
    name = 'backbone.layer1.0.conv1.weight'
    assert state[name].dtype == torch.float32
    assert not torch.equal(state[name], float32[name])
    torch.testing.assert_close(state[name], float32[name], rtol=0, atol=0.05)


def test_the_learning_rate_is_scaled_with_the_batch_size(home, run):
    options = (*TINY, 'auto_scale_lr.base_batch_size=256', 'test_dataloader.dataset.data_root=not_read')
    done = run(TRAIN, W4A4, '--work-dir', 'work', '--auto-scale-lr', '--cfg-options', *options)
    assert done.returncode == 0, done.stderr
    groups = torch.load(home / 'work/epoch_1.pth', weights_only=False)['optimizer']['param_groups']
    assert {group['initial_lr'] for group in groups} == {0.01 * 8 / 256}


def test_options_reach_the_model_and_validation_can_be_left_out(home, run):
    options = ('quantization.weight.bits=3', 'model.head.num_classes=12', 'quantization.skip=[backbone.layer4.*]')
    without = ('--no-validate', '--cfg-options', 'val_dataloader.dataset.data_root=not_read')
    done = run(TRAIN, W4A4, '--work-dir', 'work', *without, *TINY, *options)
    assert done.returncode == 0, done.stderr
    state = weights(home / 'work/epoch_1.pth')
    assert int(state['backbone.layer1.0.conv1.weight_quant.state'][-1]) == 3
    assert state['head.fc.weight'].shape == (12, 128)
    assert 'backbone.layer4.0.conv1.weight_quant.state' not in state
    assert 'Epoch(val)' not in done.stdout


SCENES = dict(det='det/faster_rcnn_r18_gdrq_w4a4_digits.py', seg='seg/pspnet_r18_gdrq_w4a4_digits.py')
FEW = (*TINY, 'train_dataloader.dataset.indices=8', 'test_dataloader.dataset.indices=4')


@pytest.mark.parametrize(('task', 'out'), [('det', 'predictions.pkl'), ('seg', 'predictions')])
def test_detection_and_segmentation(home, run, task, out):
    config = ROOT / 'configs' / SCENES[task]
    done = run(TRAIN, config, '--work-dir', 'work', '--no-validate', '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    outputs = ('--work-dir', 'tested', '--out', out, '--show-dir', 'shown')
    done = run(TEST, config, 'work/epoch_1.pth', *outputs, '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    record = json.loads((home / 'tested/record.json').read_text())
    assert (record['task'], record['model']['bits']) == (task, [4, 4])
    assert any(key in record['metrics'] for key in MAIN_METRICS[task])
    if task == 'det':
        predictions = pickle.loads((home / out).read_bytes())
        assert [p['pred_instances']['bboxes'].shape[1] for p in predictions] == [4] * 4
    else:
        masks = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (home / out).glob('*.png')]
        assert [mask.shape for mask in masks] == [(96, 96)] * 4 and max(mask.max() for mask in masks) <= 10
    assert len(list((home / 'shown').rglob('*.png'))) == 4


@pytest.mark.parametrize(
    'config',
    [W4A4.relative_to(ROOT / 'configs'), SCENES['seg'], pytest.param(SCENES['det'], marks=pytest.mark.full)],
)
def test_the_same_seed_gives_the_same_model(home, run, config):
    """To the last bit, on a CPU: weights, thresholds, optimizer, and the losses on the way."""
    ends = []
    for work_dir in ('one', 'two'):
        options = (*FEW, 'train_dataloader.batch_size=4', 'default_hooks.logger.interval=1')
        done = run(TRAIN, ROOT / 'configs' / config, '--work-dir', work_dir, '--no-validate', '--cfg-options', *options)
        assert done.returncode == 0, done.stderr
        checkpoint = read_checkpoint(str(home / work_dir / 'epoch_1.pth'))
        losses = checkpoint['message_hub']['log_scalars']['train/loss'].data[0].tolist()
        ends.append({**{part: checkpoint[part] for part in ('state_dict', 'optimizer')}, 'losses': losses})
    assert len(losses) == 2 and same(*ends)


def test_mixed_precision_on_a_cpu_for_segmentation(home, run):
    command = (TRAIN, ROOT / 'configs' / SCENES['seg'], '--work-dir', 'work', '--amp', '--no-validate')
    done = run(*command, '--cfg-options', *FEW)
    assert done.returncode == 0, done.stderr
    assert finite(home / 'work/epoch_1.pth')


def test_mixed_precision_on_a_cpu_is_refused_for_detection(home, error_of):
    """mmcv's NMS has no bfloat16 kernel on a CPU."""
    command = (TRAIN, ROOT / 'configs' / SCENES['det'], '--amp', '--cfg-options', *FEW)
    holds(error_of(*command), '--amp', 'GPU', 'NMS')


# ---- a loss that is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize('lr', ['1e12', '1e30'])
@pytest.mark.parametrize('config', [FLOAT, W4A4])
def test_a_loss_that_diverges_leaves_only_finite_checkpoints(home, run, config, lr):
    epochs = ('train_cfg.max_epochs=3', f'optim_wrapper.optimizer.lr={lr}')
    done = run(TRAIN, config, '--work-dir', 'work', '--cfg-options', *TINY, *epochs)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    holds(done.stderr, 'error: ', 'training stops')
    written = sorted((home / 'work').glob('*.pth'))
    assert [path.name for path in written if not finite(path)] == []
    holds(done.stderr, 'the last good checkpoint is' if written else 'no checkpoint had been written')


def test_a_diverging_run_keeps_the_last_good_checkpoint(home, run, trained):
    shutil.copytree(trained, home / 'runs')
    (home / 'runs' / 'last_checkpoint').write_text(str(home / 'runs' / 'epoch_1.pth'))
    state = torch.load(home / 'runs' / 'epoch_1.pth', weights_only=False)
    for group in state['optimizer']['param_groups']:
        group['lr'] = group['initial_lr'] = 1e30
    torch.save(state, home / 'runs' / 'epoch_1.pth')
    before = (home / 'runs' / 'epoch_1.pth').read_bytes()
    done = run(TRAIN, W4A4, '--work-dir', 'runs', '--resume', '--cfg-options', *TINY, 'train_cfg.max_epochs=2')
    assert done.returncode == 1
    holds(
        done.stderr,
        'has values that are not finite',
        f'the last good checkpoint is {home}/runs/epoch_1.pth',
    )
    assert [p.name for p in (home / 'runs').glob('*.pth')] == ['epoch_1.pth']
    assert (home / 'runs' / 'epoch_1.pth').read_bytes() == before


@pytest.mark.parametrize('example', ['classify.py', 'segment.py'])
def test_an_example_says_how_it_is_called(run, example):
    pytest.importorskip('onnxruntime')
    done = run(ROOT / 'examples' / example, 'nowhere', 'picture.png', *['mask.png'] * (example == 'segment.py'))
    assert done.returncode == 1 and 'EXPORTED_FOLDER PICTURE' in done.stderr and 'Traceback' not in done.stderr
