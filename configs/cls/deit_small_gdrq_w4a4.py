_base_ = ['mmpretrain::deit/deit-small_4xb256_in1k.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://mmassets.onedl.ai/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=30, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
