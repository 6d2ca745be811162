# BNN with 1-bit weights and 1-bit activations; see gdrq_mm/core/quantizers/bnn.py.
_base_ = './gdrq_w4a4.py'
quantization = dict(method='bnn', weight=dict(bits=1), activation=dict(bits=1))
