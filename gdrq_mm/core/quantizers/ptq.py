"""Post-training quantization: thresholds of least squared error, found once from the weights and from calibration.

The least-squares clipping that is common to post-training methods, such as Banner et al., "Post-training 4-bit
quantization of convolution networks for rapid-deployment", NeurIPS 2019, arXiv:1810.05723, Eq. 1, solved here on a
grid of thresholds and not by a model of the distribution. `gdrq calibrate CONFIG CHECKPOINT` makes a
checkpoint without training. If the model is trained all the same, the thresholds stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import functional as F
from .activation import ActivationQuantizer, Statistics
from .fixed_point import FixedPoint
from .registry import register
from .weight import WeightQuantizer


@register('ptq', title='PTQ')
class PTQWeight(WeightQuantizer):
    """Weights with the T of least squared error in each group, by default in each filter."""

    default_groups = 'channel'

    @dataclass(frozen=True)
    class Options(FixedPoint):
        """Those of a step that may be a power of two."""

    def start_threshold(self, weight: Tensor) -> Tensor:
        return F.search_threshold(weight, self.lo, self.hi, self.sizes)


@register('ptq')
class PTQActivation(ActivationQuantizer):
    """Activations with the T of least squared error on samples of the calibration batches."""

    keeps_samples = True

    @dataclass(frozen=True)
    class Options(FixedPoint):
        """Those of a step that may be a power of two."""

    def start_threshold(self, seen: Statistics) -> Tensor:
        assert self.samples is not None
        return F.search_activation_threshold(self.samples, seen.low, seen.high, self.kind, self.bits)
