_base_ = [
    '../_base_/models/vgg11_bn.py',
    '../_base_/datasets/digits_cls.py',
    '../_base_/schedules/sgd_cls.py',
    '../_base_/default_runtime_cls.py',
]
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, end=4, T_max=3, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
