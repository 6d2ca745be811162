# What GDRQ's defaults, distillation and the training itself give, for tools/sweep.py: one epoch from one float
# model, three seeds, beside LSQ+ with the same settings; and twelve epochs at five times the learning rate, as long as
# the float model. `python tools/sweep.py benchmarks/recipe.py` goes on where it stopped.
work_dir = 'work_dirs/recipe'
records = 'docs/records/recipe'

cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py',
    seeds=[0, 1, 2],
    amp=True,
)
weight, activation = 'quantization.weight.gdrq', 'quantization.activation.gdrq'
# The defaults before: three levels of 2 bits, k = 3.5 for weights of 4, the mean over all values of an activation.
mean_of_all = {f'{activation}.mean': 'all', f'{activation}.k': 12}
w4 = {'mean_of_all': mean_of_all, 'before': {**mean_of_all, f'{weight}.k': 3.5}}
w2 = {'narrow': {f'{weight}.levels': 'narrow'}, 'before': {**mean_of_all, f'{weight}.levels': 'narrow'}}
distilled = {'distilled': {'quantization.distill.temperature': 2.0}}
float_config = 'configs/cls/resnet18_width16_12e_cifar10.py'
control = {'control': {'quantization.control': True}}
longer = dict(
    cifar10,
    name='cifar10_12e',
    seeds=[0],
    options={
        'train_cfg.max_epochs': 12,
        'train_cfg.val_interval': 4,
        'param_scheduler.T_max': 12,
        'optim_wrapper.optimizer.lr': 0.05,
    },
)
both = ['gdrq', 'lsq_plus']
runs = [
    dict(cifar10, float_config=float_config, methods=['gdrq'], bits=['w4a4', 'w2a4']),
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(cifar10, methods=['gdrq'], bits=['w4a4', 'w2a4'], variants=distilled),
    dict(cifar10, methods=['lsq_plus'], bits=['w4a4', 'w2a4']),
    dict(cifar10, methods=['lsq_plus'], bits=['w4a4', 'w2a4'], variants=distilled),
    dict(cifar10, methods=['gdrq'], bits=['w4a4'], variants=w4),
    dict(cifar10, methods=['gdrq'], bits=['w2a4'], variants=w2),
    dict(cifar10, methods=['gdrq', 'lsq_plus'], bits=['w3a3', 'w2a2']),
    dict(cifar10, methods=['gdrq'], bits=['w3a3'], variants={'without_zero': {f'{weight}.levels': 'without_zero'}}),
    dict(cifar10, methods=['lsq', 'pact', 'dorefa', 'minmax'], bits=['w4a4', 'w2a4']),
    dict(longer, float_config=float_config, methods=['gdrq'], bits=['w4a4'], variants=control),
    dict(longer, methods=both, bits=['w4a4', 'w2a4']),
    dict(longer, methods=both, bits=['w4a4', 'w2a4'], variants=distilled),
]
del control, longer, both, cifar10, float_config, weight, activation, mean_of_all, w4, w2, distilled
