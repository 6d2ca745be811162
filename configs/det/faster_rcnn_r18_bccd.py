_base_ = [
    '../_base_/models/faster_rcnn_r18_fpn64.py',
    '../_base_/datasets/bccd.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    data_preprocessor=dict(mean=[189, 179, 182], std=[16, 26, 23]),
    backbone=dict(stem_channels=32, base_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256]),
    roi_head=dict(bbox_head=dict(num_classes=3)),
    test_cfg=dict(rcnn=dict(max_per_img=100)),
)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=10)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', T_max=60, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=60, val_interval=5)
