_base_ = [
    '../_base_/models/fcn_r18_w32.py',
    '../_base_/datasets/digits_seg.py',
    'mmseg::_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(mean=[110, 110, 110], std=[55, 55, 55], size=(96, 96), test_cfg=dict(size=(96, 96))),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
randomness = dict(seed=0)
env_cfg = dict(cudnn_benchmark=False)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
log_processor = dict(by_epoch=True)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = dict(
    type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=10, by_epoch=True, convert_to_iter_based=True
)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
