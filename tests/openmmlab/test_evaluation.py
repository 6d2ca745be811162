"""What is compared with what: the digest of an evaluation, and a retriever that keeps what it has computed."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict

from gdrq_mm.openmmlab.describe import compared_by
from gdrq_mm.openmmlab.runner import QuantRunner
from gdrq_mm.openmmlab.tasks import dump_before_build
from tests.runs import TEST_ONLY, task_config


def folds(cfg, fold, number=5):
    """mmpretrain's data set of one fold around the test data."""
    cfg = copy.deepcopy(cfg)
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='KFoldDataset', dataset=inner, fold=fold, num_splits=number)
    return compared_by(cfg)


def test_another_fold_is_another_evaluation(config):
    cfg = config()
    found = [compared_by(cfg), folds(cfg, 0), folds(cfg, 1), folds(cfg, 0, 2)]
    assert len(set(found)) == 4 and folds(cfg, 1) == found[2]


def test_predictions_that_are_written_are_no_other_evaluation(scenes_root, tmp_path):
    cfg = task_config('seg', scenes_root, tmp_path / 'run')
    before = compared_by(cfg)
    dump_before_build(cfg, str(tmp_path / 'out'))
    assert cfg.test_evaluator.output_dir and compared_by(cfg) == before


@pytest.fixture
def retriever(config):
    """The small ResNet finds pictures of the same digit."""
    cfg = config(quantization=None)
    prototype = copy.deepcopy(cfg.val_dataloader.to_dict())
    prototype.pop('persistent_workers', None)
    prototype.update(collate_fn=dict(type='pseudo_collate'), sampler=dict(type='DefaultSampler', shuffle=False))
    cfg.model = ConfigDict(
        type='ImageToImageRetriever',
        image_encoder=[cfg.model.backbone, dict(type='GlobalAveragePooling')],
        head=dict(type='ArcFaceClsHead', num_classes=10, in_channels=32, init_cfg=None),
        prototype=prototype,
        data_preprocessor=cfg.get('data_preprocessor'),
    )
    cfg.val_evaluator = cfg.test_evaluator = [dict(type='RetrievalRecall', topk=[1])]
    return cfg


def test_a_retriever_looks_with_the_weights_that_were_loaded(retriever, tmp_path):
    """Its prototypes are computed once, in the first prediction: that for the plan comes before the weights."""
    model = QuantRunner.from_cfg(copy.deepcopy(retriever)).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    retriever.merge_from_dict({**TEST_ONLY, 'load_from': str(tmp_path / 'weights.pth')})
    runner = QuantRunner.from_cfg(retriever)
    runner.test()
    expected = runner.model.prototype_vecs.clone()
    runner.model.prototype_inited = False
    runner.test()
    torch.testing.assert_close(expected, runner.model.prototype_vecs)
