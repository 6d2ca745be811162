# GDRQ's settings one at a time, for tools/sweep.py: 2-bit weights and 4-bit activations, one epoch from the float model
# of benchmarks/grid.py, one seed; three of the defaults. `python tools/sweep.py benchmarks/ablation.py` goes on where
# it stopped.
work_dir = 'work_dirs/ablation'
records = 'docs/records/ablation'

cifar10 = dict(
    name='cifar10',
    config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py',
    methods=['gdrq'],
    bits=['w2a4'],
    amp=True,
)
weight, activation = 'quantization.weight', 'quantization.activation'
variants = {
    'project': {f'{weight}.gdrq.clip': 'project'},
    'reshape': {f'{weight}.gdrq.clip': 'project', 'quantization.schedule.reshape': 0.3},
    'straight_through': {f'{weight}.gdrq.gradient': 'straight_through'},
    'narrow': {f'{weight}.gdrq.levels': 'narrow'},  # -T, 0 and T
    'full': {f'{weight}.gdrq.levels': 'full', f'{weight}.gdrq.k': 4},  # -T, -T/2, 0 and T/2
    'weight_k15': {f'{weight}.gdrq.k': 1.5},  # the default is 1.875
    'weight_k25': {f'{weight}.gdrq.k': 2.5},
    'groups1': {f'{weight}.groups': 1},  # the default is 4
    'groups16': {f'{weight}.groups': 16},
    'channel': {f'{weight}.groups': 'channel'},
    'search': {f'{weight}.gdrq.threshold': 'search'},
    'channel_search': {f'{weight}.groups': 'channel', f'{weight}.gdrq.threshold': 'search'},
    # A step that learns, from the T of Scale-Clip: LSQ in 4 groups, with the three levels of narrow.
    'learned': {
        f'{weight}.method': 'lsq',
        f'{weight}.groups': 4,
        f'{weight}.lsq.start': 'scale_clip',
        f'{weight}.lsq.narrow_range': True,
    },
    'activation_k36': {f'{activation}.gdrq.k': 3.6},  # the default is 4.6
    'activation_k6': {f'{activation}.gdrq.k': 6},
    'undeployable': {'quantization.deployable': False},
}
runs = [
    dict(cifar10, seeds=[0, 1, 2], float_config='configs/cls/resnet18_width16_12e_cifar10.py'),
    dict(cifar10, seeds=[0], variants=variants),
]
del cifar10, weight, activation, variants
