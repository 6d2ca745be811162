_base_ = ['./yolox_nano_bccd.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/yolox_nano_bccd/epoch_60.pth'
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=60, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=60)
