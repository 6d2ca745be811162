_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r50_fpn_1x_coco/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth'
optim_wrapper = dict(optimizer=dict(lr=0.0025))
