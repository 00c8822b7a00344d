"""A task for sensitivities: a perceptron that labels its own data, held-out data, and a count of its evaluations.

Each call of `evaluate` or `calibration_batches` puts a letter into the file COUNT, where there is one; evaluation number
STOP in it raises KeyboardInterrupt, number FAIL a ValueError. NET and TESTED are the seeds of the network and of the test data, PLAIN=1 has evaluate return one number, BLANK is the accuracy below which it is NaN.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}


def _count(letter):
    if "COUNT" not in os.environ:
        return
    with Path(os.environ["COUNT"]).open("a") as file:
        file.write(letter)
    number = str(Path(os.environ["COUNT"]).read_text().count("e"))
    if letter == "e" and number == os.environ.get("STOP"):
        raise KeyboardInterrupt
    if letter == "e" and number == os.environ.get("FAIL"):
        raise ValueError("no boxes left")


def made(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def model():
    return made(int(os.environ.get("NET", "0")))


def data(num, seed):
    x = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, made()(x).argmax(1)


def inputs():
    return data(2, 9)[0]


def train_batches():
    return [data(64, 1)]


def choose_batches():
    return [data(70, 2), data(30, 3)]


def calibration_batches():
    _count("c")
    return [data(64, 4)[0]]


def test_batches():
    return [data(40, int(os.environ.get("TESTED", "5")))]


def step(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(predict, batches):
    _count("e")
    hits = 100.0 * np.concatenate([(predict(x).argmax(1) == y).numpy() for x, y in batches])
    if hits.mean() < float(os.environ.get("BLANK", "0")):
        return {"accuracy": float("nan")}
    return {"accuracy": float(hits.mean()) if os.environ.get("PLAIN") else hits}
