"""GDRQ in a plain torch loop: a small CNN on scikit-learn's digits in float, W4A4 and W2A4; exported and run.

python examples/plain_torch.py [FOLDER]   # half a minute; writes FOLDER (default: exported), which must not exist
"""

import copy
import sys

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import gdrq_mm as gq

torch.manual_seed(0)
data = load_digits()
pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(data.target)
x_train, x_test, y_train, y_test = train_test_split(pictures, labels, test_size=0.25, random_state=0, stratify=labels)


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def train(model: nn.Module, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(gq.parameter_groups(model, weight_decay=1e-4), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x_train)).split(64):
            loss = nn.functional.cross_entropy(model.train()(x_train[batch]), y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gq.after_step(model)  # thresholds follow; does nothing to a float model
        schedule.step()


def accuracy(scores: torch.Tensor) -> str:
    return f'{100 * (scores.argmax(1) == y_test).float().mean():.2f} %'


model = nn.Sequential(block(1, 16), block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.Flatten(), nn.Linear(512, 10))
train(model, epochs=10, lr=0.05)
found = {'float': accuracy(model.eval()(x_test))}
for bits in ('w4a4', 'w2a4'):
    quantized = copy.deepcopy(model)
    gq.quantize(quantized, bits, example=x_train[:1], show=bits == 'w4a4')
    gq.calibrate(quantized, x_train.split(64))
    train(quantized, epochs=5, lr=0.02)
    gq.freeze(quantized)
    found[bits] = accuracy(quantized.eval()(x_test))
folder = sys.argv[1] if len(sys.argv) > 1 else 'exported'
print(gq.export(quantized, x_test[:64], folder))
session = onnxruntime.InferenceSession(f'{folder}/model.onnx')
(scores,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x_test)})
print(found, '| W2A4 in ONNX Runtime:', accuracy(torch.tensor(scores)))
