_base_ = ['../_base_/models/resnet18_w16.py', '../_base_/datasets/cifar10.py', '../_base_/default_runtime_cls.py']
memory_format = 'channels_last'
# CutMix on half of the batches: without it 30 epochs end at 92.7 on the training images and 86.5 on the test images.
model = dict(train_cfg=dict(augments=dict(type='CutMix', alpha=1.0), probs=[0.5]))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=58, by_epoch=True, begin=2, end=60, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=5)
val_cfg = dict()
test_cfg = dict()
