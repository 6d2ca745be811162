# A ConvNeXt of width 48 for 32x32 images, with a stem of 2 x 2.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ConvNeXt',
        arch=dict(depths=[2, 2, 6, 2], channels=[48, 96, 192, 384]),
        stem_patch_size=2,
        drop_path_rate=0.0,
    ),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=384, loss=dict(type='CrossEntropyLoss')),
)
