_base_ = ['./fcn_r18_camvid.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/fcn_r18_camvid/epoch_80.pth'
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=15, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=15, val_interval=5)
