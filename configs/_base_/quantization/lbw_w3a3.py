# LBW-Net with 3-bit weights and 3-bit activations; see gdrq_mm/core/quantizers/lbw.py.
_base_ = './gdrq_w3a3.py'
quantization = dict(method='lbw')
