"""Run records that several test files share."""

from mmengine.config import Config

from gdrq_mm.openmmlab.describe import make_record

MODEL = dict(
    methods=['gdrq', 'gdrq'],
    options={},
    bits=[4, 4],
    first_last_bits=8,
    deployable=True,
    stage='quantize',
    parameters=100,
    quantized=90,
    float_bytes=4_000_000,
    bytes=500_000,
    bit_operations=10,
)


def config(**changes):
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier', backbone=dict(type='ResNet', depth=18, init_cfg=dict(type='Pretrained'))
            ),
            test_dataloader=dict(dataset=dict(type='CustomDataset', data_root='data/digits/cls')),
            test_evaluator=dict(type='Accuracy', topk=(1,)),
            work_dir='/somewhere/work_dirs/run',
        ),
        filename='/somewhere/configs/run.py',
        cfg_text='model = ...',
    )
    cfg.merge_from_dict(changes)
    return cfg


def record(checkpoint, top1, quantized, seed=3, start=None, model=(), **changes):
    cfg = config(**changes)
    if quantized:
        cfg.quantization = dict(weight=dict(bits=4))
    training = dict(seed=seed, start=start)
    return make_record(cfg, checkpoint, {'accuracy/top1': top1}, {**MODEL, **dict(model)}, training)
