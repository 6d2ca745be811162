# INQ with 5-bit weights and 8-bit activations; see gdrq_mm/core/quantizers/inq.py.
_base_ = './gdrq_w4a4.py'
quantization = dict(method='inq', weight=dict(bits=5), activation=dict(bits=8))
