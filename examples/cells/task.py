"""How many red cells a picture of a blood smear shows: a small real regression, beside the newborn's synthetic one.

`data` is a folder with bccd.npz: 364 pictures of 160×120 as JPEG with the number of red cells (github.com/Shenggan/BCCD_Dataset,
MIT), in the source's own lists: 205 to train on, 87 to choose and calibrate on ("val"), 72 for the test. The source names neither slides nor
patients, so whether two lists share one is not known; equal pictures in two lists are refused. Its counts are of boxes that people
drew, and they missed many: pictures full of cells are said to hold 0. So no network comes near an error of 0, and a few hundred
pictures are soon learnt by heart. Pictures are halved to 80×60.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import RejectedError
from paredown.train import Progress, fit

METRIC = {"name": "mae", "unit": "cells", "goal": "min"}
NORMALISATION = "x = (pixels / 255 - 0.7) / 0.2, RGB, float32 [N, 3, 60, 80], 160×120 halved; cells = 12 + 4 × output"

ROLES = {"train": "train", "choose": "val", "test": "test"}
"""What a picture is for → its list in the archive."""
CENTRE, SPREAD = 12.0, 4.0
"""The network answers in spreads from the centre, cells."""
BATCH, EPOCHS, LR, WEIGHT_DECAY = 8, 30, 1e-3, 1e-2
EVALUATION_BATCH = 64
WIDTH = 16
BANDS = {8: "fewer than 8", 11: "8 to 10", 14: "11 to 13", math.inf: "14 and more"}
"""Counts below the number have this name; the test pictures are about evenly spread over the last three."""


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is a strided 1×1 convolution where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inner, H, W] -> [N, outer, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Counter(nn.Module):
    """Three stages (width, 2 and 4 times width); every place says how much of a cell it sees, and the count is their mean."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.place = nn.Conv2d(4 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] -> [N, 1], in spreads from the centre."""
        density = self.place(self.stages(F.relu(self.norm(self.stem(x)))))
        return torch.flatten(F.adaptive_avg_pool2d(density, 1), 1)


# ------------------------------------------------------------------------------------------------------ the task module


def model(seed: int = 0, width: int = WIDTH) -> Counter:
    """An untrained network."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    made = Counter(width)
    torch.set_rng_state(state)
    return made


def inputs() -> Tensor:
    """The shape and dtype of an input."""
    return torch.zeros(2, 3, 60, 80)


def train_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """(pictures, targets) in random order; mirrored across and down, light and colour varied."""
    return _Augmented(split("train", data))


def choose_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """Pictures held out of training, with targets."""
    return _batches(split("choose", data))


def calibration_batches(data: Path) -> Iterable[Tensor]:
    """The same pictures, alone."""
    return (x for x, _ in choose_batches(data))


def test_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """Pictures that nothing is chosen on."""
    return _batches(split("test", data))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Absolute error, squared below a tenth of a spread."""
    pictures, targets = batch
    if pictures.device.type == "cpu":  # its convolutions are faster with a pixel's channels side by side
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    return F.smooth_l1_loss(model(pictures), targets, beta=0.1)


def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    """Absolute error of every picture, cells; the count is not rounded."""
    errors = [(predict(x) - y).abs().reshape(-1).double().numpy() * SPREAD for x, y in batches]
    return {"mae": np.concatenate(errors)}


def slices(data: Path) -> dict[str, list[float] | list[str]]:
    """By what the report groups the errors on the test pictures; the target in spreads from the centre, as the network answers."""
    targets = split("test", data).targets.flatten()
    cells = (CENTRE + SPREAD * targets.double()).tolist()
    return {
        "id": [f"{ROLES['test']} {number}" for number in range(len(cells))],
        "target": targets.tolist(),
        "count band": [next(name for top, name in BANDS.items() if count < top) for count in cells],
    }


def base(
    *,
    seed: int = 0,
    device: str = "cpu",
    epochs: int = EPOCHS,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    data: Path,
) -> nn.Module:
    """The dense network, trained; its weights and the order of the pictures differ by seed."""
    return scratch(
        model(seed), epochs=epochs, seed=seed, device=device, progress=progress, checkpoint=checkpoint, data=data
    )


def scratch(
    model: nn.Module,
    *,
    epochs: int = EPOCHS,
    extra_epochs: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    data: Path,
) -> nn.Module:
    """A given network, of whatever widths, trained as the base is and `extra_epochs` longer."""
    return fit(
        model, lambda: train_batches(data), step, epochs=epochs + extra_epochs, optimizer="adamw", lr=LR,
        weight_decay=WEIGHT_DECAY, seed=1000 * seed, device=device, progress=progress, checkpoint=checkpoint,
    ).module  # fmt: skip


def twin(
    parameters: int,
    *,
    epochs: int = EPOCHS,
    extra_epochs: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    data: Path,
) -> nn.Module:
    """A dense network of about that many parameters, trained as the base is and `extra_epochs` longer."""
    width = min(range(2, WIDTH + 1), key=lambda w: abs(sum(p.numel() for p in Counter(w).parameters()) - parameters))
    return scratch(
        model(seed, width), epochs=epochs, extra_epochs=extra_epochs, seed=seed, device=device, progress=progress,
        checkpoint=checkpoint, data=data,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Pictures of one role."""

    pictures: Tensor
    """float32 [N, 3, 60, 80], normalised."""
    targets: Tensor
    """float32 [N, 1], (cells - centre) / spread."""


def split(role: str, data: Path) -> Split:
    """The pictures of "train", "choose" or "test"."""
    return _lists(Path(data) / "bccd.npz")[role]


@cache
def _lists(file: Path) -> dict[str, Split]:
    """All three. Training pictures are augmented, so that no later check would find them among those of the test."""
    found = {role: _read(file, name) for role, name in ROLES.items()}
    seen: dict[str, tuple[str, int]] = {}
    for role, some in found.items():
        for number, picture in enumerate(some.pictures):
            first = seen.setdefault(hashlib.sha256(picture.numpy().tobytes()).hexdigest(), (role, number))
            if first[0] != role:
                msg = f"a picture must be in one list. Got it as {ROLES[first[0]]} {first[1]} and {ROLES[role]} {number} at {file}. Take it out of one."
                raise RejectedError(msg)
    return found


def _read(file: Path, name: str) -> Split:
    """One list of the archive, decoded; nothing of it is unpickled."""
    raw, offsets, counts = _arrays(file, name)
    fits = raw.ndim == offsets.ndim == counts.ndim == 1 and len(offsets) == len(counts) + 1 >= 2
    fits &= raw.dtype == np.uint8 and offsets.dtype.kind in "iu" and counts.dtype.kind in "iuf"
    if not fits or (offsets[1:] <= offsets[:-1]).any() or offsets[0] < 0 or offsets[-1] > raw.size:
        msg = f"bccd.npz must hold ascending offsets into its bytes and one count for each picture. Got something else for {name} at {file}. Make it anew."
        raise RejectedError(msg)
    if wrong := counts[~(np.isfinite(counts) & (counts >= 0))][:3].tolist():
        msg = f"counts must be numbers of at least 0. Got {wrong} for {name} at {file}. Make the archive anew without them."
        raise RejectedError(msg)
    pictures = [_picture(raw[a:b].tobytes(), f"{name} {i} at {file}") for i, (a, b) in enumerate(pairwise(offsets))]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    targets = torch.from_numpy((counts.astype(np.float64) - CENTRE) / SPREAD).float()[:, None]
    return Split(pictures=(F.avg_pool2d(x, 2) / 255 - 0.7) / 0.2, targets=targets)


def _arrays(file: Path, name: str) -> list[np.ndarray]:
    """Bytes, offsets and counts as they are."""
    parts = [f"{name}_{part}" for part in ("jpeg", "offsets", "count")]
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = [found[part] for part in parts]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise TypeError("what is in it is no array")
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = f"data must be a folder with bccd.npz. Got no file at {file}. Set data to that folder."
        raise RejectedError(msg) from error
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        told = "" if isinstance(error, ValueError) else f": {error}"  # NumPy's would advise to unpickle it
        msg = f"bccd.npz must be a NumPy archive with {', '.join(parts)}. Got {type(error).__name__} at {file}{told}. Make it anew."
        raise RejectedError(msg) from error
    return arrays


def _picture(raw: bytes, where: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(raw), formats=["JPEG"]) as image:
            if image.size != (160, 120):
                msg = f"pictures must be 160×120. Got {image.size[0]}×{image.size[1]} for {where}. Make the archive anew with pictures of that size."
                raise RejectedError(msg)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        told = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # it would name an object in memory
        msg = f"pictures must be readable JPEG. Got {type(error).__name__}{told} for {where}. Make the archive anew without it."
        raise RejectedError(msg) from error


def _batches(some: Split) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(some.pictures.split(EVALUATION_BATCH), some.targets.split(EVALUATION_BATCH), strict=True)


@dataclass(frozen=True, slots=True)
class _Augmented:
    some: Split

    def __len__(self) -> int:
        return math.ceil(len(self.some.targets) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.some.targets)).split(BATCH):
            x = self.some.pictures[index]
            for axis in (2, 3):
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(axis), x)
            light = 1 + 0.1 * (torch.rand(len(x), 1, 1, 1) - 0.5)
            yield x * light + 0.1 * torch.randn(len(x), 3, 1, 1), self.some.targets[index]
