"""Your model, your data, your measure. The example tells noisy stripes by their direction: put your own in its place."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Iterable[tuple[Tensor, Tensor]]
METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}  # goal: "max" or "min"
NORMALISATION = "x = your raw data as float32, [N, 1, 16, 16]"  # one line, shown in the report


def model() -> nn.Module:
    """The network. Yours: import it, and put the path of its trained weights into recipe.yaml."""
    layers: list[nn.Module] = []
    for c, d in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(c, d, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(d), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4))


def base() -> nn.Module:
    """Trains the network where there are no weights yet. Yours: delete it once there are."""
    network = model().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for batch in [batch for _ in range(3) for batch in train_batches()]:
        optimizer.zero_grad()
        step(network, batch).backward()
        optimizer.step()
    return network.eval()


def inputs() -> Tensor:
    """Two example inputs: the shape and dtype that the network takes."""
    return _data(2, seed=1)[0]


def train_batches() -> Batches:
    """Training data in random order, augmented as you do."""
    images, labels = _data(1024, seed=1)
    order = torch.randperm(1024)
    return list(zip(images[order].split(64), labels[order].split(64), strict=True))


def calibration_batches() -> list[Tensor]:
    """A few hundred inputs, held out of training: the ranges of INT8 are read from them. Never test data."""
    return list(_data(256, seed=2)[0].split(64))


def test_batches() -> Batches:
    """Data that nothing is ever chosen on."""
    images, labels = _data(512, seed=3)
    return list(zip(images.split(64), labels.split(64), strict=True))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of one batch."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def evaluate(predict: Callable[[Tensor], Tensor], batches: Batches) -> dict[str, np.ndarray]:
    """METRIC, one value per sample; `predict` is the model in PyTorch or the exported file."""
    hits = [(predict(images).argmax(1) == labels).numpy() for images, labels in batches]
    return {"accuracy": 100.0 * np.concatenate(hits)}


def _data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Made-up images; yours: read files, and keep training, calibration and test data apart."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=random)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    phase = 7 * torch.rand(count, 1, 1, generator=random)
    stripes = torch.sin(torch.stack([x, y, x + y, x - y])[labels] + phase)
    return (stripes + 2 * torch.randn(count, 16, 16, generator=random)).unsqueeze(1), labels
