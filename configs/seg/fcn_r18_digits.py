_base_ = [
    '../_base_/models/fcn_r18_width32.py',
    '../_base_/datasets/digits_seg.py',
    '../_base_/default_runtime_seg.py',
]
# Nine of ten pixels are background, and without weights that is all that is learned for a long time.
class_weight = [0.1] + [1.0] * 10
model = dict(
    data_preprocessor=dict(mean=[110, 110, 110], std=[55, 55, 55], size=(96, 96), test_cfg=dict(size=(96, 96))),
    decode_head=dict(num_classes=11, loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(num_classes=11, loss_decode=dict(class_weight=class_weight)),
)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', T_max=20, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=20, val_interval=5)
