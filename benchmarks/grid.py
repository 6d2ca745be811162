# The small-scale grid, for tools/sweep.py: methods x bits x seeds under one recipe (float model, epochs, rate), and two
# trials of each method's own settings. `make benchmark` trains the float models that are missing, runs what is not
# finished, and writes the tables anew.
work_dir = 'work_dirs/grid'
records = 'docs/records/grid'

methods = ['gdrq', 'dorefa', 'pact', 'lsq', 'lsq_plus', 'minmax']
cifar10 = dict(name='cifar10', config='configs/cls/resnet18_width16_gdrq_w4a4_12e_cifar10.py', amp=True)
digits = dict(methods=methods, bits=['w4a4', 'w2a4'], seeds=[0])
digits_det = dict(name='digits_det', config='configs/det/yolox_nano_gdrq_w4a4_digits.py')
digits_seg = dict(name='digits_seg', config='configs/seg/pspnet_r18_gdrq_w4a4_digits.py')
digits_vgg = dict(name='digits_vgg', config='configs/cls/vgg11_bn_gdrq_w4a4_digits.py')
trials = {  # two for each method beside its defaults, which are its paper's where it has any
    'gdrq': {
        'search': {'quantization.weight.gdrq.threshold': 'search'},
        'channel': {'quantization.weight.groups': 'channel'},
    },
    'dorefa': {'channel': {'quantization.weight.groups': 'channel'}, 'groups4': {'quantization.weight.groups': 4}},
    'pact': {
        'lr10': {'quantization.activation.pact.lr_mult': 10},
        'decay01': {'quantization.activation.pact.decay_mult': 0.1},
    },
    'lsq': {
        'channel': {'quantization.weight.groups': 'channel'},
        'lr01': {'quantization.weight.lsq.lr_mult': 0.1, 'quantization.activation.lsq.lr_mult': 0.1},
    },
    'lsq_plus': {
        'channel': {'quantization.weight.groups': 'channel'},
        'lr01': {'quantization.weight.lsq_plus.lr_mult': 0.1, 'quantization.activation.lsq_plus.lr_mult': 0.1},
    },
    'minmax': {
        'momentum01': {'quantization.activation.minmax.momentum': 0.1},
        'groups4': {'quantization.weight.groups': 4},
    },
}
runs = [
    dict(
        cifar10,
        float_config='configs/cls/resnet18_width16_12e_cifar10.py',
        methods=methods,
        bits=['w4a4', 'w2a4'],
        seeds=[0, 1, 2],
    ),
    dict(cifar10, methods=methods, bits=['w3a3', 'w2a2'], seeds=[0]),
    dict(cifar10, methods=['ptq'], bits=['w8a8', 'w4a4', 'w4a32', 'w32a4'], seeds=[0]),
    dict(digits, **digits_det, float_config='configs/det/yolox_nano_digits.py'),
    dict(digits, **digits_seg, float_config='configs/seg/pspnet_r18_digits.py'),
    dict(digits, **digits_vgg, float_config='configs/cls/vgg11_bn_digits.py'),
    *(dict(cifar10, methods=[method], bits=['w4a4'], seeds=[0], variants=trials[method]) for method in trials),
    *(
        dict(part, methods=['gdrq'], bits=['w4a4'], seeds=[0], variants=variant)
        for variant, parts in (
            ({'control': {'quantization.control': True}}, (digits_det, digits_seg, digits_vgg)),  # float, trained on
            # what 8-bit additions cost each task
            ({'undeployable': {'quantization.deployable': False}}, (cifar10, digits_det, digits_seg)),
        )
        for part in parts
    ),
]
del methods, cifar10, digits, digits_det, digits_seg, digits_vgg, trials
