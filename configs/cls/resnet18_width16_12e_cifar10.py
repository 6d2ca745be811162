_base_ = [
    '../_base_/models/resnet18_width16.py',
    '../_base_/datasets/cifar10.py',
    '../_base_/schedules/sgd_cls.py',
    '../_base_/default_runtime_cls.py',
]
# The float model of benchmarks/grid.py: crops and flips alone, 12 epochs instead of 180.
memory_format = 'channels_last'
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=2, end=12, T_max=10, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=12, val_interval=4)
