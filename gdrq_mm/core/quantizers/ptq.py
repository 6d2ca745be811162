"""Post-training quantization: thresholds of least squared error, found once from the weights and from calibration.

The least-squares clipping that is common to post-training methods, such as Banner et al., "Post-training 4-bit
quantization of convolution networks for rapid-deployment", NeurIPS 2019, arXiv:1810.05723, Eq. 1, solved here on a
grid of thresholds and not by a model of the distribution. `python tools/calibrate.py CONFIG CHECKPOINT` makes a
checkpoint without training. If the model is trained all the same, the thresholds stay.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional as F
from .base import ActivationQuantizer, WeightQuantizer


class PTQWeight(WeightQuantizer):
    """Weights with the T of least squared error in each group, by default in each filter."""

    default_groups = 'channel'

    def calibrate(self, weight: Tensor) -> None:
        self.threshold.copy_(F.search_threshold(weight, self.lo, self.hi, self.sizes))
        self.set_state(calibrated=True)

    def threshold_of(self, weight: Tensor) -> Tensor:
        return self.threshold


class PTQActivation(ActivationQuantizer):
    """Activations with the T of least squared error on samples of the calibration batches."""

    keeps_samples = True

    def start_threshold(self, mean: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return self.search_start(low, high)
