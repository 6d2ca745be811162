# FGQ with 2-bit weights and 4-bit activations; see gdrq_mm/core/quantizers/fgq.py.
_base_ = './gdrq_w2a4.py'
quantization = dict(method='fgq')
