_base_ = ['./vgg11_bn_digits.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/vgg11_bn_digits/epoch_4.pth'
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=1, convert_to_iter_based=True)
train_cfg = dict(max_epochs=1)
