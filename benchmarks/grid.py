# The small-scale grid, for tools/sweep.py: methods x bits x seeds under one recipe, then GDRQ's ablation on CIFAR-10.
# `make benchmark` trains the float models that are missing, runs what is not finished, and writes the tables anew.
work_dir = 'work_dirs/grid'
records = 'docs/records/grid'

methods = ['gdrq', 'dorefa', 'pact', 'lsq', 'lsq_plus', 'minmax']
cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_w16_gdrq_w4a4_cifar10.py',
    options={'train_cfg.max_epochs': 3, 'param_scheduler.T_max': 3, 'train_cfg.val_interval': 3},
    amp=True,
)
ablation = {
    'project': {'quantization.weight.gdrq.clip': 'project'},
    'straight_through': {'quantization.weight.gdrq.gradient': 'straight_through'},
    'groups1': {'quantization.weight.groups': 1},
    'groups16': {'quantization.weight.groups': 16},
    'channel': {'quantization.weight.groups': 'channel'},
    'search': {'quantization.weight.gdrq.threshold': 'search'},
    'learned': {'quantization.weight.gdrq.threshold': 'learned'},
    'reshape': {'quantization.weight.gdrq.clip': 'project', 'quantization.schedule.reshape': 0.3},
    'undeployable': {'quantization.deployable': False},
}
runs = [
    dict(
        cifar10,
        float_config='configs/cls/resnet18_w16_cifar10.py',
        methods=methods,
        bits=['w4a4', 'w2a4'],
        seeds=[0, 1, 2],
    ),
    dict(cifar10, methods=methods, bits=['w3a3', 'w2a2'], seeds=[0]),
    dict(cifar10, methods=['ptq'], bits=['w4a4', 'w4a32', 'w32a4'], seeds=[0]),
    dict(
        name='digits_det',
        config='configs/det/yolox_nano_gdrq_w4a4_digits.py',
        float_config='configs/det/yolox_nano_digits.py',
        methods=methods,
        bits=['w4a4', 'w2a4'],
        seeds=[0],
    ),
    dict(
        name='digits_seg',
        config='configs/seg/pspnet_r18_gdrq_w4a4_digits.py',
        float_config='configs/seg/pspnet_r18_digits.py',
        methods=methods,
        bits=['w4a4', 'w2a4'],
        seeds=[0],
    ),
    dict(cifar10, methods=['gdrq'], bits=['w4a4', 'w2a4'], seeds=[0], variants=ablation),
]
del methods, cifar10, ablation
