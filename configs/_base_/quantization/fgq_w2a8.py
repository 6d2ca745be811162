# FGQ with 2-bit weights and 8-bit activations; see gdrq_mm/core/quantizers/fgq.py.
_base_ = './gdrq_w4a4.py'
quantization = dict(method='fgq', weight=dict(bits=2), activation=dict(bits=8))
