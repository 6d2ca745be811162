# What GDRQ's paper compares with or builds on, each at the bits that it is made for, for tools/sweep.py: one epoch from
# the float model of benchmarks/grid.py, one seed. `python tools/sweep.py benchmarks/references.py` goes on where it
# stopped.
work_dir = 'work_dirs/references'
records = 'docs/records/references'

cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py',
    seeds=[0],
    amp=True,
)
methods = {
    'w5a8': ['inq'],
    'w4a4': ['inq', 'lbw', 'loss_aware'],
    'w2a8': ['fgq'],
    'w2a4': ['gdrq', 'inq', 'lbw', 'loss_aware', 'fgq', 'twn', 'ttq', 'syq'],
    'w2a2': ['gdrq', 'tsq', 'hwgq'],
    'w1a1': ['bnn'],
}
runs = [
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], float_config='configs/cls/resnet18_width16_12e_cifar10.py'),
    *(dict(cifar10, methods=methods[bits], bits=[bits]) for bits in methods),
]
del cifar10, methods
