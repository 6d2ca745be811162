_base_ = ['./deit_w192_cifar10.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/deit_w192_cifar10/epoch_100.pth'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=20, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=20, val_interval=2)
