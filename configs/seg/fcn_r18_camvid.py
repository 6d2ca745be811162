_base_ = [
    '../_base_/models/fcn_r18_width32.py',
    '../_base_/datasets/camvid.py',
    '../_base_/default_runtime_seg.py',
]
size = (180, 240)
model = dict(
    # Padding is void, 11, like the pixels without a label.
    data_preprocessor=dict(mean=[112, 115, 117], std=[78, 78, 78], size=size, seg_pad_val=11, test_cfg=dict(size=size)),
    decode_head=dict(num_classes=11, ignore_index=11),
    auxiliary_head=dict(num_classes=11, ignore_index=11),
)
default_hooks = dict(logger=dict(interval=20))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=80, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=80, val_interval=10)
