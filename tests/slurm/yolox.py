# A small run in two processes that learns its eight scenes by heart, and is tested on them.
_base_ = '../../configs/det/yolox_nano_gdrq_w4a4_digits.py'
load_from = None
quantization = dict(schedule=dict(reshape=0.2, freeze=0.9))
norm_cfg = dict(momentum=0.1)  # BN statistics that follow in 40 iterations
model = dict(backbone=dict(norm_cfg=norm_cfg), neck=dict(norm_cfg=norm_cfg), bbox_head=dict(norm_cfg=norm_cfg))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(128, 128), ratio_range=(0.95, 1.05), keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(ann_file='annotations/train.json', data_prefix=dict(img='train/')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/digits/scenes/annotations/train.json')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=3e-3))
param_scheduler = dict(T_max=20)
train_cfg = dict(max_epochs=20, val_interval=20)
default_hooks = dict(checkpoint=dict(interval=20))
env_cfg = dict(dist_cfg=dict(timeout=100))  # seconds, when one process waits for what the other does not do
