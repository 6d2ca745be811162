"""Stock configs of the three libraries with the quantization base config; the images are tiny noise."""

import copy
from importlib import import_module

import numpy as np
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from gdrq_mm.core.quantizers import Quantizer, Stage
from gdrq_mm.openmmlab.compat import mend_bases
from gdrq_mm.openmmlab.models import drop_pretrained
from gdrq_mm.openmmlab.runner import QuantRunner

SAMPLES = dict(mmpretrain='DataSample', mmdet='DetDataSample', mmseg='SegDataSample')


BOXES = torch.tensor([[4.0, 4, 40, 36], [20, 10, 60, 62], [8, 30, 30, 60]])


FEW_REGIONS = {
    'train_cfg.rpn_proposal.max_per_img': 16,
    'train_cfg.rpn.sampler.num': 16,
    'test_cfg.rpn.max_per_img': 16,
    'test_cfg.rcnn.max_per_img': 8,
}


MASK_RCNN = dict(
    stock='mmdet::mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    model={**FEW_REGIONS, 'train_cfg.rcnn.sampler.num': 16, 'roi_head.bbox_head.fc_out_channels': 64},
    masks=True,
)


YOLOX = dict(stock='mmdet::yolox/yolox_nano_8xb8-300e_coco.py', size=128)


class Images(Dataset):
    """Two images of noise with what a library's losses ask for."""

    def __init__(self, scope, size, masks=False, boxes=3):
        self.scope, self.size, self.masks, self.boxes = scope, size, masks, boxes
        self.metainfo = {}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rng, shape = np.random.default_rng(index), (self.size, self.size)
        meta = dict(img_id=index, img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0), border=(0, *shape, 0))
        sample = getattr(import_module(f'{self.scope}.structures'), SAMPLES[self.scope])(metainfo=meta)
        if self.scope == 'mmpretrain':
            sample.set_gt_label(index)
        elif self.scope == 'mmseg':
            sample.gt_sem_seg = PixelData(data=torch.from_numpy(rng.integers(0, 2, (1, *shape))))
            sample.gt_edge_map = PixelData(data=torch.from_numpy(rng.integers(0, 2, (1, *shape))))
        else:
            sample.gt_instances, sample.ignored_instances = self.instances(self.boxes), self.instances(0)
        return dict(inputs=torch.from_numpy(rng.integers(0, 256, (3, *shape), np.uint8)), data_samples=sample)

    def instances(self, number):
        found = InstanceData(bboxes=BOXES[:number].clone(), labels=torch.arange(number))
        if self.masks:
            masks = np.zeros((number, self.size, self.size), np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, BOXES.int().tolist()):
                mask[top:bottom, left:right] = 1
            found.masks = BitmapMasks(masks, self.size, self.size)
        return found


def set_all(cfg, key, value):
    """Set a key wherever a config has it."""
    for name, item in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        if name == key:
            cfg[name] = value
        elif isinstance(item, (dict, list)):
            set_all(item, key, value)


def build(folder, stock, size=64, masks=False, model=None, seed=0):
    """A runner for a stock config with the quantization base and images in memory."""
    mend_bases()
    scope = stock.split('::')[0]
    path = folder / 'model.py'
    path.write_text(f"_base_ = ['{stock}', 'gdrq_mm::_base_/quantization/gdrq_w4a4.py']\n")
    cfg = Config.fromfile(path)
    drop_pretrained(cfg.model)
    set_all(cfg.model, 'score_thr', 0.0)  # an untrained detector is sure of nothing
    set_all(cfg.model, 'batch_augments', None)  # they pad or resize to the full size
    cfg.merge_from_dict({f'model.{key}': copy.deepcopy(value) for key, value in (model or {}).items()})
    if scope == 'mmseg':
        cfg.model.data_preprocessor.size = (size, size)
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='tests.stock.Images', scope=scope, size=size, masks=masks),
        collate_fn=dict(type='default_collate' if scope == 'mmpretrain' else 'pseudo_collate'),
    )
    cfg.train_dataloader, cfg.train_cfg = loader, dict(type='IterBasedTrainLoop', max_iters=1)
    cfg.val_dataloader, cfg.val_cfg = loader, dict()
    cfg.val_evaluator = dict(type='DumpResults', out_file_path=str(folder / 'predictions.pkl'))
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = cfg.param_scheduler = cfg.auto_scale_lr = None
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4))
    cfg.default_hooks, cfg.custom_hooks = dict(checkpoint=None, logger=None), []
    cfg.quantization.calibration_batches = 1
    cfg.merge_from_dict(dict(work_dir=str(folder), experiment_name=f'{folder.name}_{seed}', log_level='ERROR'))
    cfg.randomness = dict(seed=seed)
    return QuantRunner.from_cfg(cfg)


def batch_of(runner):
    return next(iter(runner.val_dataloader))


@torch.no_grad()
def settle(runner):
    """Give BN the statistics of the images, as a float checkpoint has them."""
    model = runner.model.train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.set_state(stage=Stage.FLOAT)
    for norm in norms:
        norm.train().momentum = None
    model(**model.data_preprocessor(batch_of(runner), training=True), mode='loss')
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@torch.no_grad()
def predict(runner):
    runner.model.eval()
    return runner.model.test_step(batch_of(runner))


def check_result(result, stock, size=64, masks=False, model=None):
    """Two samples of the library's own kind, with finite values."""
    scope = stock.split('::')[0]
    assert [type(sample).__name__ for sample in result] == [SAMPLES[scope]] * 2
    if scope == 'mmpretrain':
        assert all(sample.pred_score.isfinite().all() and len(sample.pred_score) == 1000 for sample in result)
    elif scope == 'mmseg':
        assert all(sample.seg_logits.data.isfinite().all() for sample in result)
        assert {sample.pred_sem_seg.data.shape for sample in result} == {(1, size, size)}
    else:
        found = InstanceData.cat([sample.pred_instances for sample in result])
        assert len(found) > 0 and found.bboxes.isfinite().all() and found.scores.isfinite().all()
        assert not masks or found.masks.shape == (len(found), size, size)
