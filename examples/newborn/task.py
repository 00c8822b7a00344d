"""The case study: the weight of a newborn, in grams, from a picture beside a board of known size, for a cheap phone.

Without `data` the pictures are the synthetic twin of scene.py. With `data: DIR` they are your own: DIR/labels.csv has the columns
`file` (a picture under DIR) and `weight` (g), and may have `subject` and `split` (train, choose or test; without it 70, 10 and 20 %
of the subjects, by a hash of their names). A subject in two splits is refused, and so is a picture in two or with two weights, known by
equal pixels at 64×64. UTF-8, commas, names of columns in lower case; pictures that Pillow reads, of 8 or 16 bits (no HEIC).
By any other column, as `clinic` or `age`, the report groups the errors.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import runpy
import unicodedata
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
OURS = ("target", "weight band")
"""Columns of the report; none of labels.csv may be called so."""


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
    """The user's pictures by role. All lines are looked at before the first picture is."""
    table = folder / "labels.csv"
    header, lines = _table(table)
    rows = [_row(folder, cells, where) for where, cells in lines]
    _all_there(rows, folder)
    kept: dict[str, list[tuple[np.ndarray, Row]]] = {role: [] for role in COUNTS}
    pictures: dict[str, Row] = {}
    subjects: dict[str, Row] = {}
    damaged: list[str] = []
    repeated: list[str] = []
    for row in rows:
        picture = _read(row.path, row.where)
        if picture is None:
            damaged.append(f"{row.cells['file']} (line {row.where.rpartition(':')[2]})")
            continue
        if subject := unicodedata.normalize("NFC", row.cells.get("subject", "")):
            _in_one_role(f"the subject {subject!r}", row, subjects.setdefault(subject, row))
        first = pictures.setdefault(hashlib.sha256(picture.tobytes()).hexdigest(), row)
        same = "" if first.path == row.path else f" (equal to {first.cells['file']!r})"
        _in_one_role(f"the picture {row.cells['file']!r}{same}", row, first)
        _of_one_weight(f"the picture {row.cells['file']!r}{same}", row, first)
        if first is not row:  # a second time it would narrow intervals that it tells nothing for
            repeated.append(f"{row.cells['file']} (line {row.where.rpartition(':')[2]})")
            continue
        kept[row.role].append((picture, row))
    _tell_damaged(damaged, len(rows), table)
    if repeated:
        warnings.warn(
            f"{len(repeated)} of {len(rows)} rows repeat a picture and were left out: {_first_of(repeated)}",
            stacklevel=2,
        )
    if empty := [role for role, some in kept.items() if not some]:
        who = len({row.cells.get("subject") or row.cells["file"] for row in rows})
        msg = f"every split must have pictures. Got none for {', '.join(empty)} of {len(rows)} rows with {who} subject{'s' * (who > 1)} at {table}. Fill the column split, or bring more subjects."
        raise RejectedError(msg)
    others = [name for name in header if name and name not in READ]
    return {
        role: _split_of(
            np.stack([picture for picture, _ in some]),
            np.array([row.grams for _, row in some]),
            {
                **{n: _values([row.cells[n] for _, row in some]) for n in others},
                "id": [row.cells["file"] for _, row in some],
            },
        )
        for role, some in kept.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of labels.csv, checked as far as it can be without its picture."""

    where: str
    path: Path | None
    """None where there is no such file."""
    role: str
    grams: float
    cells: Mapping[str, str]


def _table(table: Path) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """The names of the columns, and every line that is not empty, with where it stands."""
    if not table.is_file():
        msg = f"data must be a folder with labels.csv. Got no file at {table}. Set data to the folder of the pictures, and name the columns of the table file and weight."
        raise RejectedError(msg)
    try:
        text = table.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text), strict=True)  # an open quote must not swallow the lines below it
        header, *lines = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))] or [(1, [])]
        if "\0" in text:
            raise csv.Error("a byte 0")
    except (OSError, UnicodeError, csv.Error) as error:
        msg = f"labels.csv must be readable, in UTF-8. Got {error} at {table}. Save it as CSV in UTF-8, with the columns file and weight (in grams)."
        raise RejectedError(msg) from error
    names = header[1]
    _named(names, table)
    if not lines:
        msg = f"labels.csv must have rows below the names of its columns. Got none at {table}."
        raise RejectedError(msg)
    rows = []
    for number, cells in lines:
        where = f"{table}:{number}"
        if len(cells) != len(names):
            msg = f"a row must have a cell for each of {len(names)} columns. Got {len(cells)} at {where}. Put what has a comma in it into quotes; write 2900.5 and not 2900,5."
            raise RejectedError(msg)
        rows.append((where, {name: cell.strip() for name, cell in zip(names, cells, strict=True)}))
    return names, rows


def _named(names: Sequence[str], table: Path) -> None:
    """Refuse columns whose names are not what they have to be, or only nearly."""
    if not names:
        msg = f"labels.csv must have rows, and the columns file and weight (in grams). Got nothing at {table}."
        raise RejectedError(msg)
    if not {"file", "weight"} <= set(names):
        other = next((sign for sign in ";\t" if sign in names[0]), "")
        do = "Separate them by commas, and write 2900.5 and not 2900,5" if other else "Name them so in the first line"
        msg = f"labels.csv must have the columns file and weight (in grams). Got {', '.join(names)} at {table}. {do}."
        raise RejectedError(msg)
    for name in names:  # a Subject that is not read would let one newborn into two splits
        meant = name.strip().lower()
        if meant in READ and name != meant:
            msg = f"the column {name!r} must be written {meant}. Got {', '.join(names)} at {table}."
            raise RejectedError(msg)
        if meant in OURS:
            msg = f"no column may be called {name!r}: the report has one of that name of its own. Got {', '.join(names)} at {table}. Name it otherwise."
            raise RejectedError(msg)
        if name.strip() and names.count(name) > 1:
            msg = f"the column {name!r} must be there once. Got {', '.join(names)} at {table}."
            raise RejectedError(msg)


def _row(folder: Path, cells: dict[str, str], where: str) -> Row:
    return Row(
        where=where, path=_path(folder, cells["file"], where), role=_role(cells, where),
        grams=_grams(cells["weight"], where), cells=cells,
    )  # fmt: skip


def _path(folder: Path, name: str, where: str) -> Path | None:
    """The file of that name, however its accents are written: macOS takes letters apart, spreadsheets do not."""
    if not name:
        msg = f"file must name a picture under {folder}. Got {name!r} at {where}."
        raise RejectedError(msg)
    forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    found = next((form for form in forms if _is_file(folder / form)), name)
    path = (folder / found).resolve()
    if not path.is_relative_to(folder.resolve()):
        msg = f"file must lie under {folder}. Got {name!r} at {where}. Copy the pictures there, and write their paths relative to it."
        raise RejectedError(msg)
    return path if _is_file(path) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _all_there(rows: Sequence[Row], folder: Path) -> None:
    absent = [row for row in rows if row.path is None]
    if absent:
        first = absent[0]
        msg = f"file must be a picture. Got no file for {len(absent)} of {len(rows)} rows, the first {first.cells['file']!r} at {first.where}. Write paths relative to {folder}, with / between folders, and with the capitals and the ending of the file."
        raise RejectedError(msg)


def _values(texts: Sequence[str]) -> Sequence[float | str]:
    """A column as numbers where all of them are, since the report groups many different ones by quarters; else as text."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    if all(map(math.isfinite, numbers)):
        return [int(n) if n.is_integer() else n for n in numbers]
    return [text or "not given" for text in texts]


def _in_one_role(what: str, row: Row, first: Row) -> None:
    """Training pictures are augmented, so no later check would find them among those of the test."""
    if first.role != row.role:
        msg = f"{what} must have one role. Got {first.role} at {first.where} and {row.role} at {row.where}. Give both rows one split, or one subject without any."
        raise RejectedError(msg)


def _of_one_weight(what: str, row: Row, first: Row) -> None:
    if first.grams != row.grams:
        msg = f"{what} must have one weight. Got {first.grams:g} g at {first.where} and {row.grams:g} g at {row.where}. Take out the wrong row."
        raise RejectedError(msg)


def _role(cells: Mapping[str, str], where: str) -> str:
    given = cells.get("split", "").lower()
    if given in COUNTS:
        return given
    if given:
        msg = f"split must be train, choose or test. Got {given!r} at {where}. choose is what others call validation."
        raise RejectedError(msg)
    subject = unicodedata.normalize("NFC", cells.get("subject") or cells["file"]).encode()  # as _path takes accents
    share = int.from_bytes(hashlib.sha256(subject).digest()[:4], "big") / 2**32
    return "test" if share < 0.2 else "choose" if share < 0.3 else "train"


def _grams(text: str, where: str) -> float:
    try:
        grams = float(text)
    except ValueError:
        grams = math.nan
    if not 200 <= grams <= 8000:
        do = "Correct the row, or take it out"
        if 0.2 <= grams <= 20:
            do = "Multiply kilograms by 1000, pounds by 453.6"
        elif math.isnan(grams) and any(map(str.isdigit, text)):
            do = "Write it like 2900.5, without a comma and without a unit"
        msg = f"weight must be a newborn's in grams, 200 to 8000. Got {text!r} at {where}. {do}."
        raise RejectedError(msg)
    return grams


def _tell_damaged(damaged: Sequence[str], num_rows: int, table: Path) -> None:
    """Pictures that are there and cannot be read: named, and left out, up to DAMAGED of them; more are refused."""
    if not damaged:
        return
    shown = _first_of(damaged)
    if len(damaged) > DAMAGED * num_rows:
        msg = f"file must be a picture; {DAMAGED:.0%} of them may be damaged. Got {len(damaged)} of {num_rows} that cannot be read at {table}: {shown}. Save HEIC and raw pictures as JPEG or PNG; take the rows of damaged ones out."
        raise RejectedError(msg)
    warnings.warn(f"{len(damaged)} of {num_rows} pictures cannot be read and were left out: {shown}", stacklevel=2)


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _read(path: Path | None, where: str) -> np.ndarray | None:
    """The picture at SIZE; None where it is damaged."""
    from PIL import Image, ImageOps

    assert path is not None  # _all_there has looked
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)  # a phone held upright says so beside the pixels
            is_pgm = upright.mode == "I" and 255 < np.asarray(upright).max() < 2**16  # as Pillow reads 16 bits of one
            if is_pgm or upright.mode.startswith("I;16"):  # Pillow would cut off all above 255
                upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
            if upright.mode in ("I", "F"):
                got = "floating point" if upright.mode == "F" else "32 bits"
                msg = f"pixels must have 8 or 16 bits. Got {got} at {where}. Save the picture as JPEG or PNG."
                raise RejectedError(msg)
            if upright.has_transparency_data and upright.convert("RGBA").getextrema()[3][0] < 255:
                msg = f"pictures must be opaque. Got a transparent one at {where}: what is under it nobody sees. Save it with a background."
                raise RejectedError(msg)
            return np.asarray(upright.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    except RejectedError:  # a ValueError too
        raise
    except (PermissionError, Image.DecompressionBombError) as error:
        msg = f"file must be a picture. Got {type(error).__name__}: {error} at {where}."
        raise RejectedError(msg) from error
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files, by their kind
        return None
