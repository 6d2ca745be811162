# Mixed bits of the ResNet-18 on CIFAR-10 beside uniform ones, for tools/sweep.py: an epoch each, from the same float
# model. The mixed configs are what `tools/allocate.py --by loss` and `--by search` chose at the size of uniform W3A4;
# docs/mixed.md has the commands. They say W4A4, and their overrides the rest. The float model comes first:
# `python tools/train.py configs/cls/resnet18_width16_12e_cifar10.py`.
work_dir = 'work_dirs/mixed'
records = 'docs/records/mixed'

cifar10 = dict(name='cifar10', methods=['gdrq'], seeds=[0, 1])
runs = [
    dict(cifar10, config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py', bits=['w3a4', 'w4a4']),
    dict(cifar10, config='work_dirs/mixed_bits/cifar10_loss.py', bits=['w4a4'], variants={'by_loss': {}}),
    dict(cifar10, config='work_dirs/mixed_bits/cifar10_search.py', bits=['w4a4'], variants={'by_search': {}}),
]
del cifar10
