"""A task of one's own, small and quick: bars in noise, a residual network, and a way to be killed at any call.

With KILL_AT=n in the environment the n-th call of any function of this module ends the process by SIGKILL.
"""

import os
import signal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}
NORMALISATION = "pixels as they are"
_calls = 0


def _call():
    global _calls  # noqa: PLW0603 - a counter of calls is what this task is for
    _calls += 1
    if _calls == int(os.environ.get("KILL_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)


class Small(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.a = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.a_bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b_bn = nn.BatchNorm2d(width)
        self.c = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.c_bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.a_bn(self.a(x)))
        x = F.relu(x + self.c_bn(self.c(F.relu(self.b_bn(self.b(x))))))
        return self.head(x.mean((2, 3)))


def _bars(num, seed):
    """Images with a bright bar: horizontal or vertical, in the first or second half."""
    rng = np.random.default_rng(seed)
    images, labels = rng.normal(0, 0.3, (num, 1, 8, 8)).astype(np.float32), rng.integers(0, 4, num)
    for image, label in zip(images, labels, strict=True):
        at = rng.integers(0, 4) + 4 * (label % 2)
        image[0, at if label < 2 else slice(None), slice(None) if label < 2 else at] += 1.0
    return torch.from_numpy(images), torch.from_numpy(labels)


def model():
    _call()
    torch.manual_seed(5)
    return Small()


def base(seed=0, checkpoint=None, progress=None):
    from paredown.train import fit

    _call()
    return fit(
        model(), train_batches, step, epochs=2, lr=0.05, seed=seed, checkpoint=checkpoint, progress=progress
    ).module


def inputs():
    return _bars(2, 9)[0]


def train_batches():
    _call()
    images, labels = _bars(256, 1)
    return [(images[i], labels[i]) for i in torch.randperm(256).split(32)]


def calibration_batches():
    _call()
    return list(_bars(64, 2)[0].split(32))


def test_batches():
    images, labels = _bars(200, 3)
    return list(zip(images.split(50), labels.split(50), strict=True))


def step(model, batch):
    _call()
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(predict, batches):
    _call()
    return {"accuracy": 100.0 * np.concatenate([(predict(x).argmax(1) == y).numpy() for x, y in batches])}
