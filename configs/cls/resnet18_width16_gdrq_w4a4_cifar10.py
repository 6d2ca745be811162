_base_ = ['./resnet18_width16_cifar10.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/resnet18_width16_cifar10/epoch_180.pth'
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=20, convert_to_iter_based=True)
custom_hooks = []
train_cfg = dict(max_epochs=20, val_interval=2)
