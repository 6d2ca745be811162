# LBW-Net with 2-bit weights and 4-bit activations; see gdrq_mm/core/quantizers/lbw.py.
_base_ = './gdrq_w2a4.py'
quantization = dict(method='lbw')
