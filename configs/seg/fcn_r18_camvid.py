_base_ = [
    '../_base_/models/fcn_r18_width32.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/sgd_80e_camvid.py',
]
size = {{_base_.size}}
model = dict(
    # Padding is void, 11, like the pixels without a label.
    data_preprocessor=dict(mean=[112, 115, 117], std=[78, 78, 78], size=size, seg_pad_val=11, test_cfg=dict(size=size)),
    decode_head=dict(num_classes=11, ignore_index=11),
    auxiliary_head=dict(num_classes=11, ignore_index=11),
)
