# HWGQ with 1-bit weights and 2-bit activations; see gdrq_mm/core/quantizers/hwgq.py.
_base_ = './gdrq_w4a4.py'
quantization = dict(method='hwgq', weight=dict(method='xnor', bits=1), activation=dict(bits=2))
