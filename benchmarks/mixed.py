# Mixed bits beside uniform ones, for tools/sweep.py: the same recipe, from the same float model. The mixed configs are
# what tools/allocate.py chose at the size of uniform W3A4 (`bitops`: at the size and bit operations of uniform W4A4);
# docs/mixed.md has the commands. They say W4A4, and their overrides the rest. W4A4 and W2A4 of the YOLOX and the PSPNet
# are cells of benchmarks/tasks.py (yolox_20e, pspnet). The float models come first:
# `python tools/train.py configs/cls/resnet18_width16_12e_cifar10.py`, `... configs/det/yolox_nano_bccd.py` and
# `... configs/seg/pspnet_r18_camvid.py --amp`.
work_dir = 'work_dirs/mixed'
records = 'docs/records/mixed'

short = {'train_cfg.max_epochs': 20, 'train_cfg.val_interval': 5, 'param_scheduler.T_max': 20}
both = dict(methods=['gdrq'], seeds=[0, 1])
cifar10 = dict(both, name='cifar10')
yolox = dict(both, name='yolox', last=3, options=short)
pspnet = dict(both, name='pspnet', last=3, amp=True)
mixed = 'work_dirs/mixed_bits/'
runs = [
    dict(cifar10, config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py', bits=['w2a4', 'w3a4', 'w4a4']),
    dict(cifar10, config=mixed + 'cifar10_loss.py', bits=['w4a4'], variants={'by_loss': {}}),
    dict(cifar10, config=mixed + 'cifar10_search.py', bits=['w4a4'], variants={'by_search': {}}),
    dict(yolox, config='configs/det/yolox_nano_gdrq_w4a4_bccd.py', bits=['w3a4']),
    dict(yolox, config=mixed + 'yolox.py', bits=['w4a4'], variants={'mixed': {}}),
    dict(yolox, config=mixed + 'yolox_bitops.py', bits=['w4a4'], variants={'mixed_bitops': {}}),
    dict(pspnet, config='configs/seg/pspnet_r18_gdrq_w4a4_camvid.py', bits=['w3a4']),
    dict(pspnet, config=mixed + 'pspnet.py', bits=['w4a4'], variants={'mixed': {}}),
]
del short, both, cifar10, yolox, pspnet, mixed
