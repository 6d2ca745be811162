_base_ = [
    '../_base_/models/yolox_nano.py',
    '../_base_/datasets/bccd.py',
    '../_base_/default_runtime_det.py',
]
model = dict(data_preprocessor=dict(mean=[189, 179, 182], std=[16, 26, 23]), bbox_head=dict(num_classes=3))
memory_format = 'channels_last'
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=60, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=60, val_interval=10)
