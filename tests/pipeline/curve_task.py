"""A task for curves: two moons in eight dimensions, three linear layers, held-out data, and a base that can be repeated.

With KILL_STEPS=n each process of it ends by SIGKILL at its n-th training step, once per file in KILL_DIR. With BROKEN_CALL=n
the n-th evaluation of a process fails, those before its base is trained not counted; with UNTRAINED=1 no step may be made.
"""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}
EPOCHS = 6
_steps = _calls = 0


def _moons(num, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    angle = rng.uniform(0, np.pi, num)
    plane = np.stack([np.cos(angle) + labels, np.sin(angle) * (1 - 2 * labels) + 0.5 * labels], 1)
    mix = np.random.default_rng(0).normal(size=(2, 8))
    x = (plane + rng.normal(0, 0.15, (num, 2))) @ mix
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def model(width=32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def inputs():
    return _moons(2, 9)[0]


def train_batches():
    x, y = _moons(256, 1)
    return [(x[i], y[i]) for i in torch.randperm(256).split(32)]


def choose_batches():
    return [_moons(120, 2)]


def calibration_batches():
    return [_moons(64, 4)[0]]


def test_batches():
    return [_moons(200, 3)]


def step(model, batch):
    global _steps  # noqa: PLW0603 - a counter of steps is what a kill is timed by
    _steps += 1
    assert not os.environ.get("UNTRAINED"), "a step of training"
    if _steps == int(os.environ.get("KILL_STEPS", "0")):
        mark = Path(os.environ["KILL_DIR"]) / str(len(list(Path(os.environ["KILL_DIR"]).iterdir())))
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(predict, batches):
    global _calls  # noqa: PLW0603 - as above
    _calls += 1
    assert _calls != int(os.environ.get("BROKEN_CALL", "0")), "this call was to break"
    return {"accuracy": 100.0 * np.concatenate([(predict(x).argmax(1) == y).numpy() for x, y in batches])}


def scratch(model, *, epochs=EPOCHS, extra_epochs=0, seed=0, progress=None, checkpoint=None):
    from paredown.train import fit

    return fit(
        model, train_batches, step, epochs=epochs + extra_epochs, optimizer="adamw", lr=0.01, seed=seed,
        progress=progress, checkpoint=checkpoint,
    ).module  # fmt: skip


def base(*, epochs=EPOCHS, seed=0, progress=None, checkpoint=None):
    global _calls  # noqa: PLW0603 - as above
    from paredown.prune import fresh

    _calls = 0
    return scratch(fresh(model(), seed=seed), epochs=epochs, seed=seed, progress=progress, checkpoint=checkpoint)
