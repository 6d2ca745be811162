_base_ = './fcn_r18_gdrq_w4a4_camvid.py'
quantization = dict(weight=dict(bits=2))
