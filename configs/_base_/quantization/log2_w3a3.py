# Logarithmic quantization with 3-bit weights and 3-bit activations; see gdrq_mm/core/quantizers/log2.py.
_base_ = './gdrq_w3a3.py'
quantization = dict(method='log2')
