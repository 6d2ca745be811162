# Progressive bits, for tools/sweep.py: 2-bit weights from the W4A4 checkpoint of benchmarks/mixed.py,
# beside as many epochs, two, from the float model. That sweep comes first.
work_dir = 'work_dirs/progressive'
records = 'docs/records/progressive'

cifar10 = dict(
    name='cifar10', config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py', methods=['gdrq'], bits=['w2a4']
)
two_epochs = {'two_epochs': {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2, 'param_scheduler.T_max': 2}}
runs = [
    dict(cifar10, seeds=[0, 1], variants=two_epochs),
    *[
        dict(
            cifar10,
            seeds=[seed],
            variants={'from_w4a4': {'load_from': f'work_dirs/mixed/cifar10-gdrq-w4a4-seed{seed}/epoch_1.pth'}},
        )
        for seed in (0, 1)
    ],
]
del cifar10, two_epochs
