_base_ = ['mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', '../_base_/quantization/gdrq_w4a4.py']
load_from = 'work_dirs/faster_rcnn_voc/epoch_4.pth'  # mmdet publishes no weights of it
optim_wrapper = dict(optimizer=dict(lr=0.0025))
