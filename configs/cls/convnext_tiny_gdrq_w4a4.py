_base_ = ['mmpretrain::convnext/convnext-tiny_32xb128_in1k.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://mmassets.onedl.ai/mmclassification/v0/convnext/convnext-tiny_32xb128_in1k_20221207-998cf3e9.pth'
optim_wrapper = dict(optimizer=dict(lr=4e-4))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=30, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
