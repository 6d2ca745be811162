_base_ = ['./resnet18_width16_digits.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/resnet18_width16_digits/epoch_6.pth'
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(T_max=3)
train_cfg = dict(max_epochs=3)
