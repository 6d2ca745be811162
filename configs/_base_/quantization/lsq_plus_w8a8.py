# LSQ+ with 8-bit weights and 8-bit activations; see gdrq_mm/core/quantizers/lsq_plus.py.
_base_ = './gdrq_w8a8.py'
quantization = dict(method='lsq_plus')
