_base_ = ['./fcn_r18_digits.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/fcn_r18_digits/epoch_10.pth'
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(end=4)
train_cfg = dict(max_epochs=4)
