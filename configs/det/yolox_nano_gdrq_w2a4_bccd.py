_base_ = './yolox_nano_gdrq_w4a4_bccd.py'
quantization = dict(weight=dict(bits=2))
