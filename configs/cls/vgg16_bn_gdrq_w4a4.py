_base_ = ['mmpretrain::vgg/vgg16bn_8xb32_in1k.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://mmassets.onedl.ai/mmclassification/v0/vgg/vgg16_bn_batch256_imagenet_20210208-7e55cd29.pth'
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=30, convert_to_iter_based=True)
train_cfg = dict(max_epochs=30)
