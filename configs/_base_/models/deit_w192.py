# A DeiT of width 192 and depth 6 for 32x32 images, patches of 4 x 4.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=192, num_layers=6, num_heads=3, feedforward_channels=768),
        img_size=32,
        patch_size=4,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=192, loss=dict(type='CrossEntropyLoss')),
)
