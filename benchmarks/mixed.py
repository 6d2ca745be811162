# Mixed bits of the YOLOX beside uniform ones, for tools/sweep.py: the same recipe, from the same float model. The mixed
# configs are what tools/allocate.py chose at the size of uniform W3A4, and at the size and bit operations of uniform
# W4A4; docs/mixed.md has the commands. They say W4A4, and their overrides the rest. The float model comes first:
# `python tools/train.py configs/det/yolox_nano_bccd.py`.
work_dir = 'work_dirs/mixed'
records = 'docs/records/mixed'

short = {'train_cfg.max_epochs': 20, 'train_cfg.val_interval': 5, 'param_scheduler.T_max': 20}
yolox = dict(name='yolox', methods=['gdrq'], seeds=[0, 1], last=3, options=short)
runs = [
    dict(yolox, config='configs/det/yolox_nano_gdrq_w4a4_bccd.py', bits=['w3a4', 'w4a4']),
    dict(yolox, config='work_dirs/mixed_bits/yolox.py', bits=['w4a4'], variants={'mixed': {}}),
    dict(yolox, config='work_dirs/mixed_bits/yolox_bitops.py', bits=['w4a4'], variants={'mixed_bitops': {}}),
]
del short, yolox
