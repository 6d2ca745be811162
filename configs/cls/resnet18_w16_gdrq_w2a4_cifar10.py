_base_ = './resnet18_w16_gdrq_w4a4_cifar10.py'
quantization = dict(weight=dict(bits=2))
