# SGD for 80 epochs of CamVid: 100 iterations of warm-up, then a cosine. An epoch has 46 iterations.
_base_ = '../default_runtime_seg.py'
default_hooks = dict(logger=dict(interval=20))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=80, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=80, val_interval=10)
