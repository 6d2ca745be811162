_base_ = ['mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/deformable_detr/deformable-detr_r50_16xb2-50e_coco/deformable-detr_r50_16xb2-50e_coco_20221029_210934-6bc7d21b.pth'
optim_wrapper = dict(optimizer=dict(lr=2e-5))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=12, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=12)
