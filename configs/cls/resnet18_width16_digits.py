_base_ = [
    '../_base_/models/resnet18_width16.py',
    '../_base_/datasets/digits_cls.py',
    '../_base_/schedules/sgd_cls.py',
    '../_base_/default_runtime_cls.py',
]
param_scheduler = dict(type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=6, val_interval=1)
