_base_ = './resnet18_width16_gdrq_w4a4_cifar10.py'
quantization = dict(weight=dict(bits=2))
# Two bits regularize: crops and flips alone.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
