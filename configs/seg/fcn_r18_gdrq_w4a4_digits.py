_base_ = ['./fcn_r18_digits.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/fcn_r18_digits/epoch_20.pth'
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=6, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=6)
