# Detection and segmentation by the recipe of their configs, for tools/sweep.py: the control, GDRQ and LSQ+, without and
# with distillation. A result is the mean of the last three epochs: with few test pictures two of them can differ by a
# point. `python tools/sweep.py benchmarks/tasks.py` goes on where it stopped. The float models come first:
# `python tools/train.py configs/det/yolox_nano_bccd.py`, `... configs/det/faster_rcnn_r18_bccd.py` and
# `... configs/seg/pspnet_r18_camvid.py --amp`.
work_dir = 'work_dirs/tasks'
records = 'docs/records/tasks'

pspnet = dict(name='pspnet', config='configs/seg/pspnet_r18_gdrq_w4a4_camvid.py', seeds=[0, 1, 2], amp=True, last=3)
yolox = dict(name='yolox', config='configs/det/yolox_nano_gdrq_w4a4_bccd.py', seeds=[0, 1, 2], last=3)
short = {'train_cfg.max_epochs': 20, 'train_cfg.val_interval': 5, 'param_scheduler.T_max': 20}
yolox_20e = dict(yolox, name='yolox_20e', options=short)
rcnn = dict(name='faster_rcnn', config='configs/det/faster_rcnn_r18_gdrq_w4a4_bccd.py', seeds=[0, 1, 2], last=3)
variants = {'': {}, 'distilled': {'quantization.distill.temperature': 2.0}}
control = {'control': {'quantization.control': True}}
methods, bits = ['gdrq', 'lsq_plus'], ['w4a4', 'w2a4']
runs = [
    dict(yolox, float_config='configs/det/yolox_nano_bccd.py', methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(yolox, methods=methods, bits=bits, variants=variants),
    dict(yolox_20e, float_config='configs/det/yolox_nano_bccd.py', methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(yolox_20e, methods=['gdrq'], bits=['w8a8', 'w32a4', 'w4a32'], seeds=[0]),
    dict(yolox_20e, methods=methods, bits=bits, variants=variants),
    dict(rcnn, float_config='configs/det/faster_rcnn_r18_bccd.py', methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(rcnn, methods=methods, bits=bits, variants=variants),
    dict(pspnet, float_config='configs/seg/pspnet_r18_camvid.py', methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(pspnet, methods=methods, bits=bits, variants=variants),
]
del pspnet, yolox, short, yolox_20e, rcnn, variants, control, methods, bits
