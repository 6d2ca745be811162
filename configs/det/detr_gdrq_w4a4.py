_base_ = ['mmdet::detr/detr_r50_8xb2-150e_coco.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/detr/detr_r50_8xb2-150e_coco/detr_r50_8xb2-150e_coco_20221023_153551-436d03e8.pth'
optim_wrapper = dict(optimizer=dict(lr=2e-5))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=30, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
