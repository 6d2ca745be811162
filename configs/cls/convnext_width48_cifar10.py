_base_ = [
    '../_base_/models/convnext_width48.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/adamw_100e_cifar10.py',
    '../_base_/default_runtime_cls.py',
]
