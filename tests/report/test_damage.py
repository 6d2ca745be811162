"""report/damage.py: what quantization does to a tensor, by NumPy's formulas."""

import math

import numpy as np
import pytest
import torch

from gdrq_mm.core import functional as F
from gdrq_mm.report.damage import Meter, measure


def test_a_meter_is_numpys_formulas_over_all_calls():
    calls = [torch.randn(2, 3, 4, 5) * scale for scale in (0.5, 1, 4)]
    low, high = torch.tensor(-1.5), torch.tensor(2.0)
    meter = Meter(keep=1000)
    for x in (*calls, torch.zeros(0, 3)):
        meter.add(x, F.fake_quantize(x, torch.tensor(0.5), -3, 4), low, high)
    x = torch.cat([each.flatten() for each in calls]).double().numpy()
    error = x - np.clip(np.round(x / 0.5), -3, 4) * 0.5
    damage = meter.result(bits=3)
    assert damage.bits == 3
    assert damage.sqnr == pytest.approx(10 * np.log10((x**2).sum() / (error**2).sum()), abs=1e-4)
    assert damage.clip_ratio == ((x > 2) | (x < -1.5)).mean() > 0
    assert damage.quantized_loss == pytest.approx(np.abs(error).sum() / np.abs(x).sum(), rel=1e-5)
    uniform = float(F.distance_to_uniform(torch.tensor(x)))
    assert damage.distance_to_uniform == pytest.approx(uniform, abs=1e-6)


def test_a_meter_keeps_a_sample_and_the_largest_value():
    """Every 1024th value would be the corner of each channel, which is 0 here."""
    x = torch.rand(4, 64, 32, 32)
    x[:, :, 0, 0] = 0
    x[3, 3, 3, 3] = 2.0
    meter = Meter(keep=256)
    meter.add(x, x, torch.tensor(0.0), torch.tensor(2.0))
    assert len(meter._kept[0]) < 300
    assert meter.result(8).distance_to_uniform == pytest.approx(float(F.distance_to_uniform(x)), abs=0.06)


def test_ends_of_a_meter():
    one, zero = torch.ones(4), torch.zeros(4)
    assert Meter(4).result(4) is None
    for x, quantized, sqnr, loss in ((one, one, math.inf, 0), (one, zero, 0, 1), (zero, zero, math.inf, 0)):
        meter = Meter(4)
        meter.add(x, quantized, -one[0], one[0])
        damage = meter.result(4)
        assert (damage.sqnr, damage.quantized_loss, damage.clip_ratio) == (sqnr, loss, 0)
    meter = Meter(4)
    meter.add(zero, one, -one[0], one[0])  # binary weights have no 0
    assert meter.result(1).sqnr == -math.inf


def test_a_value_at_the_end_of_the_range_is_not_clipped():
    """Rounding puts T / 7 * 7 below T for some T."""
    weight = torch.linspace(0.1, 1, 500)[:, None]
    step = weight / 7
    assert bool((step * 7 < weight).any())
    meter = Meter(500)
    meter.add(weight, weight, -7 * step, 7 * step)
    assert meter.result(4).clip_ratio == 0


def test_a_tensor_is_measured_whole():
    x = torch.randn(3, 5, 7)
    values = x, F.fake_quantize(x, torch.tensor(0.5), -3, 4), torch.tensor(-1.5), torch.tensor(2.0)
    meter = Meter(keep=10**6)
    meter.add(*values)
    assert measure(*values, bits=3) == meter.result(3)
    assert measure(*(value[:0] for value in values[:2]), *values[2:], bits=3) is None
