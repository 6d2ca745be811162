_base_ = [
    '../_base_/models/pspnet_r18_width32.py',
    '../_base_/datasets/digits_seg.py',
    '../_base_/schedules/adamw_20e.py',
    '../_base_/default_runtime_seg.py',
]
model = dict(
    data_preprocessor=dict(mean=[110, 110, 110], std=[55, 55, 55], size=(96, 96), test_cfg=dict(size=(96, 96))),
    decode_head=dict(num_classes=11, loss_decode=dict(class_weight={{_base_.class_weight}})),
    auxiliary_head=dict(num_classes=11, loss_decode=dict(class_weight={{_base_.class_weight}})),
)
