"""Pictures of masks: kept and pruned cells of a weight matrix, as in the talk. From bits alone, without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from paredown.errors import MissingError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

KEPT, PRUNED, LINE = "#1f4e79", "#f3efe6", "#b0a794"
MOST_LINES = 48
"""More lines between cells than this hide the cells."""


class MaskLike(Protocol):
    """What a picture needs of paredown.plan.Mask."""

    @property
    def kept(self) -> NDArray[np.bool_]:
        """True where an element stays."""

    @property
    def granularity(self) -> str:
        """ "element", "2:4", "4x1", "row", …"""


class PlanLike(Protocol):
    """What a picture needs of paredown.Plan."""

    @property
    def keep(self) -> Mapping[str, Mapping[int, tuple[int, ...]]]:
        """Parameter → axis → kept indices."""

    @property
    def drop_modules(self) -> tuple[str, ...]:
        """Paths of modules that are left out."""

    @property
    def masks(self) -> Mapping[str, Any]:
        """Parameter → mask of what `keep` leaves."""

    @property
    def made_by(self) -> Mapping[str, Any]:
        """How the plan came about."""


class PrunedLike(Protocol):
    """What a picture needs of paredown.Pruned."""

    @property
    def plan(self) -> PlanLike:
        """What stays."""

    @property
    def program(self) -> Any:
        """The dense program, with its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What stays of one weight of the dense model."""

    kept: NDArray[np.bool_]
    granularity: str


def mask_picture(
    masks: MaskLike | Mapping[str, MaskLike] | PrunedLike, *, most: int = 128, columns: int = 3, inches: float = 3.2
) -> Figure:
    """A matplotlib figure of one mask, of several by title, or of a pruned model: dark cells stay, light ones are pruned.

    Of a pruned model every weight that lost something is drawn in its dense shape: channels, heads and modules that
    left physically, and the masks of what stayed.

    A weight is drawn as its matrix [out, in × kernel] (for N:M with the inputs last, so that a group of M stands
    together). Up to `most` rows and columns every weight is a cell of the picture; a larger matrix is drawn in blocks
    of weights whose shade is the share that stays, and the title says so. Save with `figure.savefig("mask.svg")` or
    .png.

    Raises UsageError (no mask, or one without weights) and MissingError (matplotlib is not installed).

    >>> import numpy as np
    >>> from paredown.plan import Mask
    >>> figure = mask_picture(Mask.of(np.eye(8, dtype=bool), "element"))
    >>> figure.axes[0].get_title()
    'element: 12.5 % kept'
    """
    named = _named(masks)
    if not named or most < 1 or any(m.kept.size == 0 for m in named.values()):
        msg = f"a picture must have a mask with weights, and most ≥ 1. Got {len(named)} masks and most={most}."
        raise UsageError(msg)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "pictures must have matplotlib. Got none. Install it: pip install matplotlib."
        raise MissingError(msg) from error
    columns = min(columns, len(named))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(inches * columns, inches * rows), layout="constrained")
    for number, (title, mask) in enumerate(named.items()):
        _draw(figure.add_subplot(rows, columns, number + 1), title, mask, most)
    return figure


def dense_cells(plan: PlanLike, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Cells]:
    """What a plan leaves of every weight [out, in, …] that it touches, in dense indices: removals and masks together.

    >>> from paredown.plan import Plan
    >>> dense_cells(Plan(keep={"fc.weight": {0: (0,)}}), {"fc.weight": (2, 2)})["fc.weight"].kept.tolist()
    [[True, True], [False, False]]
    """
    import numpy as np

    unit = "head" if plan.made_by.get("granularity") == "head" else "channel"
    out = {}
    for name, shape in shapes.items():
        axes, mask = plan.keep.get(name, {}), plan.masks.get(name)
        dropped = any(name.startswith(f"{path}.") for path in plan.drop_modules)
        if len(shape) < 2 or not (axes or dropped or mask is not None):
            continue
        kept = np.zeros(shape, dtype=np.bool_)
        if not dropped:
            place = np.ix_(*[np.asarray(axes.get(a, range(n)), dtype=np.int64) for a, n in enumerate(shape)])
            kept[place] = True if mask is None else mask.kept
        what = [*([unit] if axes else ()), *([mask.granularity] if mask is not None else ())]
        out[name] = Cells(kept=kept, granularity="layer" if dropped else ", ".join(what))
    return out


def _named(given: Any) -> dict[str, Any]:
    """Masks by title; tied weights of a pruned model once."""
    if isinstance(given, Mapping):
        return dict(given)
    if not hasattr(given, "program"):
        return {"": given}
    first: dict[int, str] = {}
    for name, tensor in given.program.state.items():
        first.setdefault(id(tensor), name)
    touched = {*given.plan.keep, *given.plan.masks}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in given.program.state.items()
        if first[id(tensor)] == name or (name in touched and first[id(tensor)] not in touched)
    }
    return dict(dense_cells(given.plan, shapes))


def shades(kept: NDArray[np.bool_], granularity: str, most: int) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """The picture's cells as shares that stay, 0 to 1, and how many rows and columns of weights one cell covers.

    >>> import numpy as np
    >>> shades(np.array([[True, False], [False, False]]), "element", most=1)[0].tolist()
    [[0.25]]
    """
    import numpy as np

    matrix = _matrix(kept, granularity).astype(np.float64)
    step = (-(-matrix.shape[0] // most), -(-matrix.shape[1] // most))
    starts = [np.arange(0, n, s) for n, s in zip(matrix.shape, step, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
    counts = [np.diff(np.append(s, n)) for s, n in zip(starts, matrix.shape, strict=True)]
    return sums / np.outer(*counts), step


def _matrix(kept: NDArray[np.bool_], granularity: str) -> NDArray[np.bool_]:
    if kept.ndim < 2:
        return kept.reshape(1, -1)
    if ":" in granularity and kept.ndim > 2:
        kept = kept.transpose(0, *range(2, kept.ndim), 1)
    return kept.reshape(kept.shape[0], -1)


def _draw(axes: Any, title: str, mask: MaskLike, most: int) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    kept = mask.kept
    picture, step = shades(kept, mask.granularity, most)
    colours = LinearSegmentedColormap.from_list("kept", [PRUNED, KEPT])
    axes.imshow(picture, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    (height, width), (rows, columns) = _cell(mask.granularity, kept), picture.shape
    if step == (1, 1) and rows / height <= MOST_LINES and columns / width <= MOST_LINES:
        for y in range(height, rows, height):
            axes.axhline(y - 0.5, color=LINE, linewidth=0.5)
        for x in range(width, columns, width):
            axes.axvline(x - 0.5, color=LINE, linewidth=0.5)
    share = f"{mask.granularity}: {100 * kept.mean():.3g} % kept"
    blocks = "" if step == (1, 1) else f"\none cell = {step[0]} × {step[1]} weights"
    axes.set_title((f"{title}\n" if title else "") + share + blocks, fontsize=9)
    axes.set_ylabel(f"{kept.shape[0]} outputs" if kept.ndim > 1 else "", fontsize=8)
    axes.set_xlabel(f"{kept.size // max(kept.shape[0], 1) if kept.ndim > 1 else kept.size} inputs", fontsize=8)


def _cell(granularity: str, kept: NDArray[np.bool_]) -> tuple[int, int]:
    """Rows and columns between two lines."""
    pair = re.fullmatch(r"(\d+)([:x])(\d+)", granularity)
    if pair is not None:
        return (int(pair[1]), int(pair[3])) if pair[2] == "x" else (1, int(pair[3]))
    inner = kept.size // max(kept.shape[0], 1) if kept.ndim > 1 else kept.size
    kernel = math.prod(kept.shape[2:]) if kept.ndim > 2 else 1
    return {"row": (1, inner), "column": (kept.shape[0], 1), "kernel": (1, kernel)}.get(granularity, (1, 1))
