# XNOR-Net's binary weights with 1-bit weights and 4-bit activations; see gdrq_mm/core/quantizers/xnor.py.
_base_ = './gdrq_w4a4.py'
quantization = dict(method='xnor', weight=dict(bits=1), activation=dict(bits=4))
