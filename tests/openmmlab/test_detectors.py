"""Whole quantized detectors, end to end: end2end.onnx gives the boxes that mmdet gives in torch.

In torch the merged model predicts, whose sums are exact. Where a float32 sum of the trained one falls on the other side
of a rounding tie, all outputs of a picture change, since the weights are random; in a runtime that is rare.
"""

import cv2
import pytest
import torch

from gdrq_mm.data import digits
from gdrq_mm.deploy.merge import merge_model
from gdrq_mm.deploy.runtime import RUNTIMES
from gdrq_mm.openmmlab.apis import infer, init_model
from gdrq_mm.openmmlab.bundle import export_graphs, use_runtime, write_bundle
from gdrq_mm.openmmlab.end2end import export_end2end, without_partner
from tests.detectors import DETECTORS, calibrated_detector, detector_config

PICTURES = 20
TIES = 3
"""Pictures in which a tie may fall on the other side. Wrong decoding would show in all of them."""
pytestmark = pytest.mark.full


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'COUNTS', {kind: {'train': 10, 'test': PICTURES} for kind in digits.COUNTS})
        root = digits.build(tmp_path_factory.mktemp('data') / 'digits', show_progress=False)
    return [cv2.imread(str(path)) for path in sorted((root / 'scenes/test').iterdir())]


def boxes_of(model, picture):
    found = infer(model, picture).pred_instances
    return torch.cat([found.bboxes, found.scores[:, None]], 1), found.labels


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_predicts_in_a_runtime_what_it_predicts_in_torch(name, pictures, tmp_path):
    cfg = detector_config(name)
    model = calibrated_detector(cfg, pictures[:4])
    checkpoint = str(tmp_path / 'model.pth')
    torch.save(dict(state_dict=model.state_dict(), meta={}), checkpoint)
    merged = merge_model(model, model.plan)
    report = export_graphs(model, merged, lambda: infer(model, pictures[0]), lambda part: None)
    end2end = export_end2end(model, report, lambda: infer(model, pictures[0]))
    write_bundle(tmp_path / 'exported', model, checkpoint, report, end2end)
    expected = [boxes_of(merged, picture) for picture in pictures]
    scores = torch.cat([boxes[:, 4] for boxes, _ in expected])
    assert len(scores) > 10 * PICTURES and len(scores.unique()) > 0.9 * len(scores)  # which are best is no chance
    for backend in RUNTIMES:
        deployed = init_model(cfg, checkpoint, 'cpu')
        use_runtime(deployed, tmp_path / 'exported', backend, checkpoint)
        deployed.backbone.forward = deployed.extract_feat = None
        apart = []
        for picture, boxes in zip(pictures, expected, strict=True):
            found = boxes_of(deployed, picture)
            apart.append(max(without_partner(*boxes, *found), without_partner(*found, *boxes)))
        print(f'{name}, {backend}: {sum(apart)} of {len(scores)} boxes have no partner, {apart}')
        assert sum(number > 0 for number in apart) <= TIES
