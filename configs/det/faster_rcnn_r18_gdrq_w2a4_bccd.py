_base_ = ['./faster_rcnn_r18_bccd.py', '../_base_/quantization/gdrq_w2a4.py']
load_from = 'work_dirs/faster_rcnn_r18_bccd/epoch_60.pth'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=10, by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=10)
