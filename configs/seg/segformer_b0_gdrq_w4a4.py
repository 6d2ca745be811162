_base_ = ['mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://mmassets.onedl.ai/mmsegmentation/v0.5/segformer/segformer_mit-b0_8x1_1024x1024_160k_cityscapes/segformer_mit-b0_8x1_1024x1024_160k_cityscapes_20211208_101857-e7f88502.pth'
optim_wrapper = dict(optimizer=dict(lr=1.2e-5))
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=1.0, begin=0, end=20000, by_epoch=False)]
train_cfg = dict(max_iters=20000, val_interval=2000)
