_base_ = [
    '../_base_/models/yolox_nano.py',
    '../_base_/datasets/digits_det.py',
    '../_base_/schedules/adamw_20e.py',
    '../_base_/default_runtime_det.py',
]
memory_format = 'channels_last'
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
