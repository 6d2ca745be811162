"""What a GPU changes. Skipped without one; detection needs mmcv's operators for CUDA (FORCE_CUDA=1 make setup)."""

import subprocess
import sys

import pytest
import torch

from gdrq_mm.core.quantizers import ACTIVATION_METHODS, WEIGHT_METHODS, Stage
from gdrq_mm.openmmlab.amp import use_amp
from gdrq_mm.openmmlab.apis import init_model
from gdrq_mm.openmmlab.runner import QuantRunner
from tests.helpers import ENV, ROOT, same
from tests.runs import TASK_CONFIGS, TEST_ONLY, checkpoint_of, task_config, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'float16'])
@pytest.mark.parametrize('task', TASK_CONFIGS)
def test_a_model_trains_and_is_tested(task, amp, scenes_root, tmp_path, monkeypatch):
    """Calibrated, quantized and finite; what is saved runs on a CPU and gives nearly the same there."""
    cfg = task_config(task, scenes_root, tmp_path)
    if amp:
        use_amp(cfg)
    runner = QuantRunner.from_cfg(cfg)
    losses = []
    train(runner, lambda runner: losses.append(float(runner.message_hub.get_scalar('train/loss').current())))
    assert len(losses) >= 2 and torch.tensor(losses).isfinite().all()
    state = runner.model.state_dict()
    assert all(value.is_cuda for value in state.values())
    thresholds = [value for key, value in state.items() if key.endswith('_quant.threshold')]
    assert len(thresholds) > 15 and all(bool(value.isfinite().all()) for value in thresholds)
    # Residual branches start at zero, and stay there while a loss scale that is too large skips steps
    assert sum(bool((value > 0).all()) for value in thresholds) > 0.85 * len(thresholds)

    cfg = task_config(task, scenes_root, tmp_path)
    cfg.merge_from_dict({**TEST_ONLY, 'load_from': checkpoint_of(runner)})
    cfg.experiment_name += '-test'
    metrics = QuantRunner.from_cfg(cfg).test()
    assert metrics and all(value == value for value in metrics.values())

    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # else products of codes and steps are rounded
    models = {device: init_model(cfg, checkpoint_of(runner), device=device) for device in ('cpu', 'cuda:0')}
    assert same(*({key: value.cpu() for key, value in model.state_dict().items()} for model in models.values()))
    picture = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        features = [model.extract_feat(picture.to(device))[-1].cpu() for device, model in models.items()]
    difference = float((features[0] - features[1]).norm() / features[0].norm())
    assert difference < 0.05


def weights_of(method, x):
    """Threshold, output and gradient of a weight quantizer on the device of x."""
    cls = WEIGHT_METHODS[method]
    bits = 4 if 4 in cls.allowed_bits else min(cls.allowed_bits)
    quantizer = cls(bits, x.shape).to(x.device)
    x = x.clone().requires_grad_()
    quantizer.start(x.detach())
    quantizer.set_state(stage=Stage.QUANTIZE)
    out = quantizer(x)
    out.square().sum().backward()
    return dict(threshold=quantizer.threshold, out=out.detach(), grad=x.grad)


def activations_of(method, x):
    """The same for a quantizer of activations that was calibrated on x."""
    quantizer = ACTIVATION_METHODS[method](min(4, ACTIVATION_METHODS[method].allowed_bits[-1])).to(x.device)
    quantizer.set_state(stage=Stage.OBSERVE)
    quantizer(x)
    quantizer.start(quantizer.observed())
    quantizer.set_state(stage=Stage.QUANTIZE)
    x = x.clone().requires_grad_()
    out = quantizer(x)
    out.square().sum().backward()
    return dict(threshold=quantizer.threshold, out=out.detach(), grad=x.grad)


@pytest.mark.parametrize(
    ('of', 'method'),
    [(weights_of, method) for method in WEIGHT_METHODS] + [(activations_of, method) for method in ACTIVATION_METHODS],
)
def test_a_gpu_quantizes_as_a_cpu_does(of, method):
    """Sums of another order may move a threshold in its last digits, and values at a rounding tie by one level."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, 3, 3)
    x = x.relu() if of is activations_of else x / 10
    on_cpu, on_gpu = of(method, x), of(method, x.cuda())
    for name, expected in on_cpu.items():
        found = on_gpu[name]
        assert found.is_cuda
        close = torch.isclose(found.cpu(), expected, rtol=1e-4, atol=1e-6).float().mean()
        assert close > (0.99 if name != 'threshold' else 0.9999), f'{name}: {float(close)} of the values'


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'float16'])
def test_a_run_goes_on_from_its_checkpoint(amp, config):
    """Deterministic kernels, so the same to the last bit."""
    changes = dict(epochs=4, randomness=dict(seed=0, deterministic=True))
    if amp:
        changes['optim_wrapper.type'], changes['optim_wrapper.loss_scale'] = 'AmpOptimWrapper', 'dynamic'
    whole = QuantRunner.from_cfg(config('whole', **changes))
    try:
        expected = train(whole)
        resumed = QuantRunner.from_cfg(
            config('resumed', **changes, resume=True, load_from=checkpoint_of(whole, 'epoch_2.pth'))
        )
        assert same(expected, train(resumed))
    finally:
        torch.use_deterministic_algorithms(False)


def tool(name, *args, cwd, **variables):
    """A tool in a process of its own, which CUDA needs; its output."""
    command = [sys.executable, ROOT / 'tools' / name, *map(str, args)]
    done = subprocess.run(command, env={**ENV, **variables}, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_model_of_a_gpu_is_exported(scenes_root, tmp_path):
    """From its checkpoint, by the tool, which compares the runtimes with torch itself."""
    cfg = task_config('cls', scenes_root, tmp_path)
    cfg.quantization.deployable = True
    runner = QuantRunner.from_cfg(cfg)
    runner.train()
    cfg.dump(tmp_path / 'config.py')
    tool('export.py', 'config.py', checkpoint_of(runner), '--out', 'exported', cwd=tmp_path)
    assert list((tmp_path / 'exported').glob('*.onnx'))


def test_one_process_of_nccl(config, tmp_path):
    """tools/train.py under torch's launcher, SyncBN included."""
    cfg = config('alone', epochs=1)
    cfg.launcher, cfg.sync_bn = 'pytorch', 'torch'
    cfg.dump(tmp_path / 'config.py')
    alone = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29517')
    log = tool('train.py', 'config.py', '--launcher', 'pytorch', cwd=tmp_path, **alone, NCCL_DEBUG='INFO')
    assert 'NCCL INFO' in log
