_base_ = './faster_rcnn_r18_gdrq_w4a4_bccd.py'
quantization = dict(weight=dict(bits=2))
