# Quantization at the end of a training, for tools/sweep.py: the float model is trained on first (the control of
# benchmarks/recipe.py, twelve epochs), then three or six epochs in few bits at two fifths of that learning rate, beside
# as many more in float. `python tools/sweep.py benchmarks/recipe.py --only 12e-gdrq-control` comes first.
work_dir = 'work_dirs/continued'
records = 'docs/records/continued'

cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py',
    seeds=[0, 1, 2],
    amp=True,
    options={
        'load_from': 'work_dirs/recipe/cifar10_12e-gdrq-control-w4a4-seed0/epoch_12.pth',
        'train_cfg.max_epochs': 3,
        'train_cfg.val_interval': 3,
        'param_scheduler.T_max': 3,
        'optim_wrapper.optimizer.lr': 0.02,
    },
)
longer = {'train_cfg.max_epochs': 6, 'train_cfg.val_interval': 3, 'param_scheduler.T_max': 6}
cifar10_6e = dict(cifar10, name='cifar10_6e', options={**cifar10['options'], **longer})
control = {'control': {'quantization.control': True}}
larger = {'activation_k5': {'quantization.activation.gdrq.k': 5.0}}  # the default is 4.6
distilled = {'distilled': {'quantization.distill.temperature': 2.0}}
both = dict(methods=['gdrq', 'lsq_plus'], bits=['w4a4', 'w2a4'])
runs = [
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], seeds=[0], variants=control),
    dict(cifar10, methods=['gdrq'], bits=['w4a4']),
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], variants=larger),
    dict(cifar10_6e, methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(cifar10_6e, **both, variants=distilled),
    dict(cifar10_6e, **both),
]
del cifar10, longer, cifar10_6e, control, larger, distilled, both
