_base_ = ['./resnet18_width16_12e_cifar10.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/resnet18_width16_12e_cifar10/epoch_12.pth'
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=1, convert_to_iter_based=True)
train_cfg = dict(max_epochs=1, val_interval=1)
