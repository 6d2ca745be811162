# Quantization at the end of a training, for tools/sweep.py: the float model is trained on first (the control of
# benchmarks/recipe.py, twelve epochs), then six epochs in few bits at two fifths of that learning rate, beside six
# more in float. `python tools/sweep.py benchmarks/recipe.py --only 12e-gdrq-control` comes first.
work_dir = 'work_dirs/continued'
records = 'docs/records/continued'

cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py',
    seeds=[0, 1],
    amp=True,
    options={
        'load_from': 'work_dirs/recipe/cifar10_12e-gdrq-control-w4a4-seed0/epoch_12.pth',
        'train_cfg.max_epochs': 6,
        'train_cfg.val_interval': 6,
        'param_scheduler.T_max': 6,
        'optim_wrapper.optimizer.lr': 0.02,
    },
)
control = {'control': {'quantization.control': True}}
distilled = {'distilled': {'quantization.distill.temperature': 2.0}}
both, bits = ['gdrq', 'lsq_plus'], ['w4a4', 'w2a4']
runs = [
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(cifar10, methods=both, bits=bits),
    dict(cifar10, methods=both, bits=bits, seeds=[0], variants=distilled),
]
del cifar10, control, distilled, both, bits
