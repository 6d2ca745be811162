# Loss-aware quantization with 3-bit weights and 3-bit activations; see gdrq_mm/core/quantizers/loss_aware.py.
_base_ = './gdrq_w3a3.py'
quantization = dict(method='loss_aware')
