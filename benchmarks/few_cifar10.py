"""The CIFAR-10 task with few of its images, for runs that ask whether a page works and not what it says.

python benchmarks/few_cifar10.py DATA FEW      writes the folder that `--set data=FEW` names: 3,000 training, 500 test images
paredown curve examples/cifar10/curve.yaml --set task=benchmarks/few_cifar10.py --set data=FEW …
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from paredown.recipes import cifar10
from paredown.recipes.cifar10 import (
    METRIC,
    calibration_batches,
    evaluate,
    inputs,
    model,
    scratch,
    step,
    test_batches,
    train_batches,
)

__all__ = [
    "METRIC",
    "calibration_batches",
    "choose_batches",
    "evaluate",
    "inputs",
    "model",
    "scratch",
    "step",
    "test_batches",
    "train_batches",
]

WEIGHTS = "resnet20_cifar10.safetensors"
PER_CLASS = {"train": 300, "test": 50}
"""200 of the 300 are held out, as in the task itself."""


def choose_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """500 of the held-out training images with labels."""
    return list(islice(cifar10.choose_batches(data), 2))


def few(data: Path, out: Path) -> None:
    """The first images of every class, as they are stored, and the weights."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / WEIGHTS, out / WEIGHTS)
    kept = {}
    with np.load(data / "cifar10.npz", allow_pickle=False) as file:
        for split, count in PER_CLASS.items():
            raw, offsets, labels = (file[f"{split}_{name}"] for name in ("webp", "offsets", "labels"))
            chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
            images = [raw[offsets[i] : offsets[i + 1]] for i in chosen]
            kept[f"{split}_webp"] = np.concatenate(images)
            kept[f"{split}_offsets"] = np.cumsum([0, *map(len, images)]).astype(offsets.dtype)
            kept[f"{split}_labels"] = labels[chosen]
    np.savez(out / "cifar10.npz", **kept)


if __name__ == "__main__":
    few(Path(sys.argv[1]), Path(sys.argv[2]))
