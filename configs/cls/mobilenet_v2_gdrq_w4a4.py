_base_ = ['mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = (
    'https://mmassets.onedl.ai/mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth'
)
optim_wrapper = dict(optimizer=dict(lr=0.005))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=30, convert_to_iter_based=True)
train_cfg = dict(max_epochs=30)
