_base_ = './pspnet_r18_gdrq_w4a4_camvid.py'
quantization = dict(weight=dict(bits=2))
