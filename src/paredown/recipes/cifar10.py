"""The CIFAR-10 task: pretrained residual networks of He et al. (2016), section 4.2, on 32×32 colour images.

`data` is a folder with `cifar10.npz` (10,000 test and 13,000 training images as lossless WebP) and the weights
`resnet20_cifar10.safetensors` and `resnet56_cifar10.safetensors`. The networks were published without a validation
split: 2,000 of the training images, 200 per class, are held out to choose and calibrate on, 11,000 are trained on.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import MissingError, RejectedError
from paredown.train.loop import Progress, fit
from paredown.train.task import Predict

METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}
NORMALISATION = (
    "x = ((pixels / 255 - [.485, .456, .406]) / [.229, .224, .225]).astype(float32), RGB, shape [N, 3, 32, 32]"
)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
BATCH = 128
EVALUATION_BATCH = 250
NUM_CHOOSE_PER_CLASS = 200
NUM_CALIBRATION = 256
PADDING = 4
SCRATCH_EPOCHS = 30


class Block(nn.Module):
    """Two 3×3 convolutions; the shortcut of option A has no parameters: every second pixel, zeros for new channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks (16, 32, 64 channels), a linear layer."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, num_blocks)
        self.layer2 = _stage(16, 32, 2, num_blocks)
        self.layer3 = _stage(32, 64, 2, num_blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, 32, 32] float32 -> logits [N, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------ the task module


def model(data: Path) -> CifarResNet:
    """The pretrained ResNet-20: 269,722 parameters, 91.73 % on the test images."""
    return _pretrained(3, data / "resnet20_cifar10.safetensors")


def resnet56(data: Path) -> CifarResNet:
    """The pretrained ResNet-56: 853,018 parameters, 93.39 % on the test images."""
    return _pretrained(9, data / "resnet56_cifar10.safetensors")


def inputs() -> Tensor:
    """An example of the input, [2, 3, 32, 32]; grey noise, since shapes are all that is asked of it."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def train_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """One epoch of cropped and flipped training images with labels, drawn from torch's global generator."""
    images, labels = _train_split(data)[0]
    return _Batches(images=images, labels=labels, batch=BATCH, augmented=True)


def calibration_batches(data: Path) -> Iterable[Tensor]:
    """256 held-out training images, as they are."""
    images, labels = _train_split(data)[1]
    chosen = _Batches(images=images[:NUM_CALIBRATION], labels=labels[:NUM_CALIBRATION], batch=BATCH, augmented=False)
    return [x for x, _ in chosen]


def choose_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """The 2,000 held-out training images with labels."""
    images, labels = _train_split(data)[1]
    return _Batches(images=images, labels=labels, batch=EVALUATION_BATCH, augmented=False)


def test_batches(data: Path) -> Iterable[tuple[Tensor, Tensor]]:
    """The 10,000 test images with labels."""
    images, labels = _read(data / "cifar10.npz", "test")
    return _Batches(images=images, labels=labels, batch=EVALUATION_BATCH, augmented=False)


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    images, labels = batch
    if images.device.type == "cpu":  # three quarters of the time: see docs/decisions/cifar10.md
        images = images.contiguous(memory_format=torch.channels_last)
    return F.cross_entropy(model(images), labels)


def evaluate(predict: Predict, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    """100 for each image whose largest logit is its label, else 0."""
    hits = [(predict(x).argmax(1) == y).numpy() for x, y in batches]
    return {"accuracy": 100.0 * np.concatenate(hits)}


def scratch(
    model: nn.Module,
    *,
    data: Path,
    epochs: int = SCRATCH_EPOCHS,
    extra_epochs: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """A given network, of whatever widths, trained from its weights as He et al. did, in `epochs + extra_epochs` passes.

    SGD with momentum 0.9, learning rate 0.1 and weight decay 1e-4 (section 4.2), cosine instead of steps. The published
    networks saw 50,000 images for some 200 epochs; this is what a page affords, so controls of it stay "not comparable".
    """
    return fit(
        model, lambda: train_batches(data), step, epochs=epochs + extra_epochs, optimizer="sgd", lr=0.1, momentum=0.9,
        weight_decay=1e-4, seed=1000 * seed, device=device, progress=progress, checkpoint=checkpoint,
    ).module  # fmt: skip


# -------------------------------------------------------------------------------------------------------- data, weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batches:
    """Normalised batches of one pass; where augmented, their order and crops are drawn when it is iterated."""

    images: Tensor
    """uint8 [N, 32, 32, 3]."""
    labels: Tensor
    batch: int
    augmented: bool

    def __len__(self) -> int:
        return (len(self.labels) + self.batch - 1) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count) if self.augmented else torch.arange(count)
        for index in torch.split(order, self.batch):
            images = self.images[index]
            yield normalised(cropped_and_flipped(images) if self.augmented else images), self.labels[index]


def normalised(images_NHWC: Tensor) -> Tensor:
    """uint8 [N, 32, 32, 3] -> float32 [N, 3, 32, 32]: (x / 255 - mean) / std."""
    x = images_NHWC.permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).contiguous()


def cropped_and_flipped(images_NHWC: Tensor) -> Tensor:
    """Each image shifted by up to 4 pixels over black, every second one mirrored; uint8 [N, H, W, C] as it came."""
    count, height, width, _ = images_NHWC.shape
    padded = F.pad(images_NHWC, (0, 0, PADDING, PADDING, PADDING, PADDING))
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


@lru_cache(maxsize=2)
def _train_split(data: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, (images, labels) held out), the same for every run."""
    images, labels = _read(data / "cifar10.npz", "train")
    rng = np.random.default_rng(0)
    held_out = np.concatenate(
        [rng.permutation(np.flatnonzero(labels.numpy() == c))[:NUM_CHOOSE_PER_CLASS] for c in range(10)]
    )
    held_out = rng.permutation(held_out)  # so that the first 256, the calibration images, are of all classes
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    train, choose = torch.from_numpy(rest), torch.from_numpy(held_out)
    return (images[train], labels[train]), (images[choose], labels[choose])


@lru_cache(maxsize=4)
def _read(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of "train" or "test"; raises RejectedError, MissingError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data, offsets, labels = (file[f"{split}_{name}"] for name in ("webp", "offsets", "labels"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        msg = (
            f"cifar10.npz must be a NumPy archive with {split}_webp, {split}_offsets and {split}_labels, and no "
            "pickles. "
            f"Got {type(error).__name__}: {error} at {path}. Give the folder with `--set data=DIR`."
        )
        raise RejectedError(msg) from error
    steps = np.diff(offsets.astype(np.int64)) if offsets.ndim == 1 else np.zeros(0)
    whole = data.dtype == np.uint8 and data.ndim == 1 and labels.shape == steps.shape and labels.size > 0
    if not (whole and (steps > 0).all() and offsets[0] >= 0 and offsets[-1] <= data.size and labels.max() < 10):
        msg = (
            f"cifar10.npz must hold ascending offsets into its bytes and labels 0…9. Got something else for {split} at "
            f"{path}."
        )
        raise RejectedError(msg)
    raw = data.tobytes()
    images = np.stack([_decoded(raw[a:b], i, path) for i, (a, b) in enumerate(pairwise(offsets))])
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _decoded(raw: bytes, index: int, path: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        msg = "Pillow must be installed to read WebP images. Got no module PIL. pip install 'paredown[zoo]'."
        raise MissingError(msg) from error
    try:
        with Image.open(io.BytesIO(raw), formats=("WEBP",)) as image:
            if image.size != (32, 32):  # known from the header, before any pixel is decoded
                msg = f"{image.size[0]}×{image.size[1]} pixels"
                raise ValueError(msg)
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        msg = f"image {index} must be a WebP of 32×32 pixels. Got {error} at {path}. The file is damaged."
        raise RejectedError(msg) from error


def _stage(channels_in: int, channels_out: int, stride: int, num_blocks: int) -> nn.Sequential:
    blocks = [Block(channels_in, channels_out, stride)]
    return nn.Sequential(*blocks, *(Block(channels_out, channels_out, 1) for _ in range(num_blocks - 1)))


def _pretrained(num_blocks: int, path: Path) -> CifarResNet:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = CifarResNet(num_blocks)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        msg = (
            f"the weights must be a safetensors file. Got {type(error).__name__}: {error} at {path}. Give its folder "
            "with `--set data=DIR`."
        )
        raise RejectedError(msg) from error
    counters = {
        n: b for n, b in network.named_buffers() if n.endswith("num_batches_tracked")
    }  # not in the published file
    try:
        network.load_state_dict({**counters, **weights}, strict=True)
    except RuntimeError as error:
        msg = f"the weights must fit the network of {6 * num_blocks + 2} layers. Got {error} at {path}."
        raise RejectedError(msg) from error
    return network.eval()
