"""The embedded default task: handwritten digits of 8×8 pixels, which ship inside scikit-learn (no download).

1,797 images of UCI's optical digits, split by class with a fixed seed: 540 to test, 240 held out to choose and
calibrate on, 1,017 to train. There are no trained weights: `base` trains the smallest network of a ladder that reaches
98 % on the held-out images; the test images choose nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import GateError, MissingError, UsageError
from paredown.train.loop import Progress, fit
from paredown.train.task import Predict, kept_randomness, predictor

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}
NORMALISATION = "x = (pixels / 16).astype(float32), pixels 0…16, shape [N, 1, 8, 8]"

TARGET = 98.0
LADDER = (32, 40, 48, 56)
"""Widths of the first stage, 77,290 to 234,706 parameters. A width of 16 (19,706) reaches 98 % as well, but channels go
in eights: two levels of pruning would have nothing to choose from, so the ladder starts at 32."""
NUM_TEST_PER_CLASS = 54
NUM_CHOOSE_PER_CLASS = 24
BATCH = 64
EPOCHS = 30
LR = 4e-3
WEIGHT_DECAY = 1e-2


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is a strided 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network of two stages, `width` channels at 8×8 and `width2` at 4×4: six convolutions, one linear."""

    def __init__(self, width: int, width2: int | None = None) -> None:
        super().__init__()
        width2 = 2 * width if width2 is None else width2
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = Block(width, width, 1)
        self.stage2 = Block(width, width2, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] float32 in 0…1 -> logits [N, 10]."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.pool(self.stage2(self.stage1(x)))
        return self.linear(torch.flatten(x, 1))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------ the task module


def model(width: int = LADDER[0], seed: int = 0) -> DigitsNet:
    """An untrained network; its random weights depend on `seed` alone."""
    return _made(width, None, seed)


def inputs() -> Tensor:
    """Two training images, [2, 1, 8, 8]."""
    return _data().train.images[:2].clone()


def train_batches() -> Iterable[tuple[Tensor, Tensor]]:
    """(augmented images, labels) in random order, from torch's global generator."""
    return _Augmented(_data().train)


def calibration_batches() -> Iterable[Tensor]:
    """Held-out training images, as they are."""
    return [x for x, _ in choose_batches()]


def choose_batches() -> list[tuple[Tensor, Tensor]]:
    """The held-out training images with labels."""
    return _data().choose.batches()


def test_batches() -> list[tuple[Tensor, Tensor]]:
    """The 540 test images with labels."""
    return _data().test.batches()


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy with label smoothing 0.05."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, label_smoothing=0.05)


def evaluate(predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    """100 for each image whose largest logit is its label, else 0."""
    hits = [(predict(x).argmax(1) == y).numpy() for x, y in batches]
    return {"accuracy": 100.0 * np.concatenate(hits)}


def slices() -> dict[str, list[str]]:
    """The digit of every test image, and its number there: the report says which digits lost."""
    labels = _data().test.labels.tolist()
    return {"id": [f"test image {i}" for i in range(len(labels))], "digit": [str(n) for n in labels]}


def base(
    *,
    seed: int = 0,
    device: str = "cpu",
    epochs: int = EPOCHS,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """The smallest network of the ladder that reaches 98 % on the held-out images, trained; GateError if none does.

    `checkpoint` is a path whose name gets the width: `base.safetensors` becomes `base-32.safetensors`.
    """
    reached = {}
    for width in LADDER:
        path = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.stem}-{width}{checkpoint.suffix}")
        trained = _train(
            model(width, seed), epochs=epochs, seed=seed, device=device, progress=progress, checkpoint=path
        )
        reached[width] = float(evaluate(predictor(trained), choose_batches())["accuracy"].mean())
        if reached[width] >= TARGET:
            return trained
    shown = ", ".join(f"width {w}: {a:.2f} %" for w, a in reached.items())
    msg = (
        f"a network of the ladder must reach {TARGET} % on the held-out images. Got {shown}. Train for more than "
        f"{epochs} epochs."
    )
    raise GateError(msg)


def scratch(
    model: nn.Module,
    *,
    epochs: int = EPOCHS,
    extra_epochs: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A given network, of whatever widths, trained as `base` is and `extra_epochs` longer."""
    return _train(
        model, epochs=epochs + extra_epochs, seed=seed, device=device, progress=progress, checkpoint=checkpoint
    )


def twin(
    parameters: int,
    *,
    epochs: int = EPOCHS,
    extra_epochs: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A dense network of about `parameters` parameters, trained as `base` and `extra_epochs` longer: what pruning "
    "must beat."""
    sizes = [(w, w2) for w in range(4, LADDER[-1] + 1) for w2 in range(2 * w - 4, 2 * w + 5)]
    width, width2 = min(sizes, key=lambda s: (abs(_num_parameters(*s) - parameters), abs(s[1] - 2 * s[0]), s))
    if not 0.9 < _num_parameters(width, width2) / parameters < 1.1:
        msg = (
            f"a dense network of equal size must be within 10 % of {parameters:,} parameters. Got "
            f"{_num_parameters(width, width2):,} at width {width}."
        )
        raise UsageError(msg)
    thin = _made(width, width2, seed)
    return _train(
        thin, epochs=epochs + extra_epochs, seed=seed, device=device, progress=progress, checkpoint=checkpoint
    )


# ------------------------------------------------------------------------------------------------------- data, training


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    images: Tensor
    labels: Tensor

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(torch.split(self.images, BATCH), torch.split(self.labels, BATCH), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Digits:
    train: _Split
    choose: _Split
    test: _Split


@dataclass(frozen=True, slots=True)
class _Augmented:
    """One epoch: the order is drawn when it is iterated; its length is known before."""

    split: _Split

    def __len__(self) -> int:
        return math.ceil(len(self.split.labels) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.split(torch.randperm(len(self.split.labels)), BATCH):
            yield _augment(self.split.images[index]), self.split.labels[index]


def _augment(x: Tensor) -> Tensor:
    """Each image turned by up to 0.2 rad, scaled by up to 15 %, shifted by up to one pixel; bilinear, zeros outside."""
    angle, scale, dx, dy = (2 * torch.rand(4, len(x)) - 1) * torch.tensor([0.2, 0.15, 0.25, 0.25])[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@cache
def _data() -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        msg = (
            "scikit-learn must be installed: the digits are in it. Got no module sklearn. pip install 'paredown[demo]'."
        )
        raise MissingError(msg) from error
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    roles: tuple[list[int], list[int], list[int]] = ([], [], [])
    cuts = [NUM_TEST_PER_CLASS, NUM_TEST_PER_CLASS + NUM_CHOOSE_PER_CLASS]
    for digit in range(10):
        for role, part in zip(roles, np.split(rng.permutation(np.flatnonzero(labels == digit)), cuts), strict=True):
            role.extend(int(i) for i in part)
    images = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    test, choose, train = (_Split(images=images[sorted(role)], labels=targets[sorted(role)]) for role in roles)
    return _Digits(train=train, choose=choose, test=test)


def _made(width: int, width2: int | None, seed: int) -> DigitsNet:
    with kept_randomness():
        torch.manual_seed(seed)
        return DigitsNet(width, width2)


def _num_parameters(width: int, width2: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in DigitsNet(width, width2).parameters())


def _train(
    network: nn.Module,
    *,
    epochs: int,
    seed: int,
    device: str,
    progress: Callable[[Progress], None] | None,
    checkpoint: Path | None,
) -> nn.Module:
    return fit(
        network, train_batches, step, epochs=epochs, optimizer="adamw", lr=LR, weight_decay=WEIGHT_DECAY,
        seed=1000 * seed, device=device, progress=progress, checkpoint=checkpoint,
    ).module  # fmt: skip
