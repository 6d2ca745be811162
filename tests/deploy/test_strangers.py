"""Models that have never been near OpenMMLab, by gdrq_mm alone: quantized, trained two steps, exported, verified."""

import pytest
import torch
import torch.nn as nn
import torchvision

import gdrq_mm as gq

STRANGERS = {
    'resnet18': lambda: torchvision.models.resnet18(num_classes=10),
    'mobilenet_v3_small': lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}


@pytest.mark.parametrize('name', ['resnet18', pytest.param('mobilenet_v3_small', marks=pytest.mark.full)])
def test_a_model_that_has_never_been_near_openmmlab(name, tmp_path):
    model, x = STRANGERS[name](), torch.randn(8, 3, 64, 64)
    gq.quantize(model, 'w4a4', example=x[:2], show=False)
    gq.calibrate(model, x.split(4))
    optimizer = torch.optim.SGD(gq.parameter_groups(model, weight_decay=1e-4), lr=0.01)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model.train()(x), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gq.after_step(model)
    gq.freeze(model)
    report = gq.export(model.eval(), x[:4], tmp_path / 'exported')
    assert report.wrong == 0
    integers = gq.load(STRANGERS[name](), tmp_path / 'exported/model.safetensors')
    torch.testing.assert_close(integers(x), model(x), atol=0.05 * float(model(x).detach().abs().max()), rtol=0)
