"""The case study: the weight of a newborn, in grams, from a picture beside a board of known size, for a cheap phone.

Without `data` the pictures are the synthetic twin of scene.py. With `data: DIR` they are your own: DIR/labels.csv has the columns
`file` (a picture under DIR) and `weight` (g), and may have `subject` and `split` (train, choose or test; without it 70, 10 and 20 %
of the subjects, by a hash of their names). A subject in two splits is refused, and so is a picture, known by equal pixels at 64×64.
By any other column, as `clinic` or `age`, the report groups the errors.
"""

from __future__ import annotations

import csv
import hashlib
import math
import runpy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.errors import RejectedError
from paredown.records import whole_file
from paredown.train import Progress, fit

METRIC = {"name": "mae", "unit": "g", "goal": "min"}
NORMALISATION = "x = (pixels / 255 - 0.5) / 0.25, RGB, float32 [N, 3, 64, 64]; grams = 3000 + 500 × output"

SIZE = 64
COUNTS = {"test": 600, "choose": 300, "train": 2400}
SEED = 2025
CENTRE, SPREAD = 3000.0, 500.0
"""The network answers in spreads from the centre, g: so its numbers are of order 1, which training and 8 bits both want."""
BATCH, EPOCHS, LR, WEIGHT_DECAY = 64, 24, 2e-3, 1e-2
WIDTH = 16
DAMAGED = 0.01
"""Share of one's own pictures that may be damaged; they are named and left out."""
BANDS = {2500: "below 2500 g", 3000: "2500 to 3000 g", 3500: "3000 to 3500 g", 4000: "3500 to 4000 g", math.inf: "4000 g and more"}  # fmt: skip
"""Weights below the number have this name. Below 2500 g is called a low birth weight, from 4000 g on a high one."""
READ = ("file", "weight", "subject", "split")
"""Columns of labels.csv that have a meaning here."""


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


class Regressor(nn.Module):
    """A residual backbone of four stages (width, 2, 4 and 8 times width) and a head of two linear layers."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))
        self.head = nn.Sequential(nn.Linear(8 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] -> [N, 1], in spreads from the centre."""
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------ the task module


def model(seed: int = 0, width: int = WIDTH) -> Regressor:
    """An untrained network."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    made = Regressor(width)
    torch.set_rng_state(state)
    return made


def inputs() -> Tensor:
    """The shape and dtype of an input."""
    return torch.zeros(2, 3, SIZE, SIZE)


def train_batches(data: Path | None = None) -> Iterable[tuple[Tensor, Tensor]]:
    """(pictures, targets) in random order; every second picture mirrored, light and place varied."""
    return _Augmented(split("train", data))


def choose_batches(data: Path | None = None) -> Iterable[tuple[Tensor, Tensor]]:
    """Pictures held out of training, with targets."""
    return _batches(split("choose", data))


def calibration_batches(data: Path | None = None) -> Iterable[Tensor]:
    """The same pictures, alone."""
    return (x for x, _ in choose_batches(data))


def test_batches(data: Path | None = None) -> Iterable[tuple[Tensor, Tensor]]:
    """Pictures that nothing is chosen on."""
    return _batches(split("test", data))


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Absolute error, squared below a tenth of a spread."""
    pictures, targets = batch
    if pictures.device.type == "cpu":  # its convolutions are faster with a pixel's channels side by side
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    return F.smooth_l1_loss(model(pictures), targets, beta=0.1)


def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    """Absolute error of every picture, g."""
    errors = [(predict(x) - y).abs().reshape(-1).double().numpy() * SPREAD for x, y in batches]
    return {"mae": np.concatenate(errors)}


def slices(data: Path | None = None) -> dict[str, Sequence[Any]]:
    """By what the report groups the errors on the test pictures; the target in spreads from the centre, as the network answers."""
    some = split("test", data)
    grams = (CENTRE + SPREAD * some.targets.flatten().double()).tolist()
    return {
        **some.columns,
        "target": some.targets.flatten().tolist(),
        "weight band": [next(name for top, name in BANDS.items() if g < top) for g in grams],
    }


def base(
    *,
    seed: int = 0,
    device: str = "cpu",
    epochs: int = EPOCHS,
    progress: Callable[[Progress], None] | None = None,
    checkpoint: Path | None = None,
    data: Path | None = None,
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
    data: Path | None = None,
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
    data: Path | None = None,
) -> nn.Module:
    """A dense network of about that many parameters, trained as the base is and `extra_epochs` longer."""
    width = min(range(2, WIDTH + 1), key=lambda w: abs(sum(p.numel() for p in Regressor(w).parameters()) - parameters))
    return scratch(
        model(seed, width), epochs=epochs, extra_epochs=extra_epochs, seed=seed, device=device, progress=progress,
        checkpoint=checkpoint, data=data,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Pictures of one role."""

    pictures: Tensor
    """uint8 [N, 3, H, W]."""
    targets: Tensor
    """float32 [N, 1], (grams - centre) / spread."""
    columns: Mapping[str, Sequence[Any]]
    """What else is known of every picture; "id" names it."""


def split(role: str, data: Path | None = None) -> Split:
    """The pictures of "train", "choose" or "test": the user's where there is a folder, else the synthetic twin's."""
    return _synthetic()[role] if data is None else _own(Path(data))[role]


def normalised(pictures: Tensor) -> Tensor:
    """uint8 -> float32 of mean about 0."""
    return (pictures.float() / 255 - 0.5) / 0.25


def _batches(some: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for pictures, targets in zip(some.pictures.split(BATCH), some.targets.split(BATCH), strict=True):
        yield normalised(pictures), targets


@dataclass(frozen=True, slots=True)
class _Augmented:
    some: Split

    def __len__(self) -> int:
        return math.ceil(len(self.some.targets) / BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.some.targets)).split(BATCH):
            x = normalised(self.some.pictures[index])
            flip = torch.rand(len(x), 1, 1, 1) < 0.5
            x = torch.where(flip, x.flip(3), x) * (1 + 0.2 * (torch.rand(len(x), 1, 1, 1) - 0.5))
            yield torch.roll(x, tuple(torch.randint(-3, 4, (2,)).tolist()), (2, 3)), self.some.targets[index]


def _split_of(pictures: np.ndarray, weights: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> Split:
    targets = torch.from_numpy((np.asarray(weights, np.float64) - CENTRE) / SPREAD).float()[:, None]
    return Split(pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), targets=targets, columns=columns)


@cache
def _synthetic() -> dict[str, Split]:
    """Drawn once and kept beside this file, since drawing takes a quarter of a minute."""
    source = Path(__file__).with_name("scene.py")
    digest = hashlib.sha256(source.read_bytes() + repr((COUNTS, SIZE, SEED)).encode()).hexdigest()[:12]
    kept = Path(__file__).parent / "made" / f"scenes-{digest}.npz"
    if not kept.exists():
        pictures, weights, _, across, light = runpy.run_path(str(source))["scenes"](sum(COUNTS.values()), SIZE, SEED)
        with whole_file(kept) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, pictures=pictures, weights=weights, across=across, light=light)
    with np.load(kept, allow_pickle=False) as found:
        arrays = [found[name] for name in ("pictures", "weights", "across", "light")]
    arrays.append(np.array([f"scene {i}" for i in range(sum(COUNTS.values()))]))
    cuts = np.cumsum(list(COUNTS.values()))[:-1]
    made = {}
    for role, (pictures, weights, *columns) in zip(
        COUNTS, zip(*(np.split(a, cuts) for a in arrays), strict=True), strict=True
    ):
        names = ("camera distance, cm across", "light", "id")
        made[role] = _split_of(pictures, weights, {n: c.tolist() for n, c in zip(names, columns, strict=True)})
    return made


@cache
def _own(folder: Path) -> dict[str, Split]:
    table = folder / "labels.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeError, csv.Error) as error:
        msg = (
            f"labels.csv must be readable, in UTF-8. Got {error} at {table}. It needs the columns file and weight (g)."
        )
        raise RejectedError(msg) from error
    if not rows or not {"file", "weight"} <= set(header):
        got = ", ".join(header) if rows else "no rows"
        msg = f"labels.csv must have the columns file and weight (g). Got {got} at {table}."
        raise RejectedError(msg)
    roles: dict[str, tuple[list[np.ndarray], list[float], list[dict[str, str | None]]]]
    roles = {r: ([], [], []) for r in COUNTS}
    seen: dict[str, tuple[str, str]] = {}
    damaged: list[str] = []
    for number, row in enumerate(rows, start=2):
        where, subject = f"{table}:{number}", (row.get("subject") or "").strip()
        role, weight, picture = _role(row, where), _grams(row["weight"], where), _read(folder, row["file"], where)
        if picture is None:
            damaged.append(f"{row['file']} (line {number})")
            continue
        if subject:
            _in_one_role(f"the subject {subject!r}", role, where, seen)
        _in_one_role(f"the picture {hashlib.sha256(picture.tobytes()).hexdigest()[:16]}", role, where, seen)
        roles[role][0].append(picture)
        roles[role][1].append(weight)
        roles[role][2].append(row)
    _tell_damaged(damaged, len(rows), table)
    empty = [r for r, (p, *_) in roles.items() if not p]
    if empty:
        msg = f"every split must have pictures. Got none for {', '.join(empty)} of {len(rows)} rows at {table}."
        raise RejectedError(msg)
    others = [name for name in header if name and name not in READ]
    return {
        r: _split_of(
            np.stack(p),
            np.array(w),
            {**{n: _values([row[n] for row in own]) for n in others}, "id": [row["file"] for row in own]},
        )
        for r, (p, w, own) in roles.items()
    }


def _values(texts: Sequence[str | None]) -> Sequence[float | str]:
    """A column as numbers where all of them are, since the report groups many different ones by quarters; else as text."""
    try:
        numbers = [float(text or "") for text in texts]
    except ValueError:
        numbers = [math.nan]
    if all(map(math.isfinite, numbers)):
        return [int(n) if n.is_integer() else n for n in numbers]
    return [(text or "").strip() or "not given" for text in texts]


def _in_one_role(what: str, role: str, where: str, seen: dict[str, tuple[str, str]]) -> None:
    """Training pictures are augmented, so no later check would find them among those of the test."""
    first, there = seen.setdefault(what, (role, where))
    if first != role:
        msg = f"{what} must have one role. Got {first} at {there} and {role} at {where}. Give both rows one split, or one subject without any."
        raise RejectedError(msg)


def _role(row: dict[str, str | None], where: str) -> str:
    given = (row.get("split") or "").strip().lower()
    if given in COUNTS:
        return given
    if given:
        msg = f"split must be train, choose or test. Got {given!r} at {where}."
        raise RejectedError(msg)
    subject = ((row.get("subject") or "").strip() or row["file"] or "").encode()
    share = int.from_bytes(hashlib.sha256(subject).digest()[:4], "big") / 2**32
    return "test" if share < 0.2 else "choose" if share < 0.3 else "train"


def _grams(text: str | None, where: str) -> float:
    try:
        grams = float(text or "")
    except ValueError:
        grams = math.nan
    if not 200 <= grams <= 8000:
        hint = " It looks like kilograms: multiply by 1000." if 0.2 <= grams <= 8 else ""
        msg = f"weight must be a newborn's in grams, 200 to 8000. Got {text!r} at {where}.{hint}"
        raise RejectedError(msg)
    return grams


def _tell_damaged(damaged: Sequence[str], num_rows: int, table: Path) -> None:
    """Pictures that are there and cannot be read: named, and left out, up to DAMAGED of them; more are refused."""
    if not damaged:
        return
    shown = ", ".join(damaged[:20]) + (f" and {len(damaged) - 20} more" if len(damaged) > 20 else "")
    if len(damaged) > DAMAGED * num_rows:
        msg = f"file must be a picture; {DAMAGED:.0%} of them may be damaged. Got {len(damaged)} of {num_rows} that cannot be read at {table}: {shown}."
        raise RejectedError(msg)
    warnings.warn(f"{len(damaged)} of {num_rows} pictures cannot be read and were left out: {shown}", stacklevel=2)


def _read(folder: Path, name: str | None, where: str) -> np.ndarray | None:
    """The picture at SIZE; None where it is damaged."""
    from PIL import Image, ImageOps

    if not name:
        msg = f"file must name a picture under {folder}. Got {name!r} at {where}."
        raise RejectedError(msg)
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        msg = f"file must lie under {folder}. Got {name!r} at {where}."
        raise RejectedError(msg)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)  # a phone held upright says so beside the pixels
            return np.asarray(upright.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except (FileNotFoundError, IsADirectoryError, PermissionError, Image.DecompressionBombError) as error:
        msg = f"file must be a picture. Got {type(error).__name__}: {error} at {where}."
        raise RejectedError(msg) from error
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files, by their kind
        return None
