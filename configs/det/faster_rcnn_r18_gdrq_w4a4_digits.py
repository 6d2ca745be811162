_base_ = ['./faster_rcnn_r18_digits.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/faster_rcnn_r18_digits/epoch_10.pth'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=4)
