"""The case study from its sweep: the talk's four rows with all columns, and its two questions as tables and plots.

    python examples/newborn/rows.py runs/newborn-curve --out page.html

reads what is there, also of a sweep that still runs (the page names what is missing), and writes page.html, the page that the
book of the talk has too, and page.csv: every trial that has a result. Nothing is written into the folder of the sweep.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from talk import draw
from talk.page import Cell, Column, Heading, Part, Spread, Table, Text, over_seeds

from paredown.controls import compared, dense_verdict
from paredown.curve import CONTROLS, Line, interval, lines, sweet_spot
from paredown.examine import Cost, examine_onnx
from paredown.export import predictor
from paredown.measure import artifact_at, machine_text
from paredown.recipe_fields import STREAMS
from paredown.records import Record, write_text
from paredown.strict_yaml import read_yaml

RECIPE = Path(__file__).with_name("curve.yaml")
COMMAND = "paredown curve examples/newborn/curve.yaml --out runs/newborn-curve"
LONGER = "python examples/newborn/longer.py runs/newborn-curve"
ROWS = (("base", "", None), ("pruned", "one-shot", 0.75), ("pruned", "multi-level", 0.5), ("pruned", "one-shot", 0.5))
"""(kind, schedule, amount that remains) of the talk's four rows, in its order."""
LONGER_OPTIONS = ("epochs", "optimizer", "lr", "weight_decay", "schedule")
"""Of the recipe's recovery, what longer.py trains by."""
Place = tuple[str, str, float | None]


# ------------------------------------------------------------------------------------------------------------ the sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is there of a sweep."""

    records: tuple[Record, ...]
    folders: Mapping[str, Path]
    """Digest of a trial to its folder."""
    missing: tuple[tuple[Place, int], ...]
    """(place, seed) without a result."""
    num_trials: int
    limit: float | None
    """What the error may grow by at the sweet spot, g."""
    levels: Mapping[Place, tuple[float, ...]]
    """What every level of a place leaves of what it got, as the recipe says."""
    data: Path | None
    """Folder of one's own pictures; None for the twin."""

    def at(self, place: Place) -> list[Record]:
        """The trials of a place, in the order of their seeds."""
        found = [r for r in self.records if _place(r) == place]
        return sorted(found, key=lambda r: int(r.cell["seed"]))

    def file(self, record: Record) -> Path:
        """The exported file of a trial."""
        return self.folders[record.cell["digest"]] / str(record.details["file"])


def read_sweep(folder: Path | None) -> Sweep | None:
    """The trials of a sweep that have a result, and those of longer.py in FOLDER-longer beside it; None where there is none.

    A result is written whole, so a running sweep can be read. Of two at one place (the recipe was changed) the later one counts.
    What longer.py trained from another dense network, or by other options than the sweep has now, is left out.
    """
    if folder is None or not (folder / "recipe.yaml").is_file():
        return None
    recipe = read_yaml(folder / "recipe.yaml")
    first = next((s for s in recipe["curve"]["schedules"] if s != "from-scratch"), "")
    files = [*folder.glob("trials/*/result.json"), *longer_folder(folder).glob("*/result.json")]
    found: dict[tuple[Place, int], tuple[Record, Path]] = {}
    for file in sorted(files, key=lambda f: f.stat().st_mtime_ns):
        record = Record.from_json(file.read_text(encoding="utf-8"))
        if record.cell["kind"] in CONTROLS and record.cell["schedule"] != first:
            continue  # beside what was chosen, of another way: it stands on the page of the sweep
        found[_place(record), int(record.cell["seed"])] = (record, file.parent)
    if not any(place[0] == "base" for place, _ in found):
        return None
    wanted = [(place, int(seed)) for seed in recipe["curve"]["seeds"] for place in _places(recipe["curve"])]
    kept = {at: told for at, told in found.items() if at in wanted}
    for (place, seed), told in found.items():
        base = kept.get((("base", "", None), seed))
        if place[0] == "longer" and base and told[0].cell["digest"] == longer_digest(base[0], recipe["recover"]):
            kept[place, seed] = told
    return Sweep(
        records=tuple(r for r, _ in kept.values()), folders={r.cell["digest"]: f for r, f in kept.values()},
        missing=tuple(at for at in wanted if at not in kept), num_trials=len(wanted),
        limit=recipe["curve"]["limit"],
        levels={place: _levels(folder) for (place, _), (_, folder) in kept.items()},
        data=Path(recipe["data"]) if recipe.get("data") else None,
    )  # fmt: skip


def longer_folder(sweep: Path) -> Path:
    """Where longer.py keeps the dense networks that were trained as long as the pruned ones."""
    return sweep.with_name(f"{sweep.name}-longer")


def longer_digest(base: Record, recover: Mapping[str, Any]) -> str:
    """What the trial of longer.py depends on: its dense network, and how it is trained on."""
    told = json.dumps(
        [base.cell["digest"], STREAMS, {option: recover[option] for option in LONGER_OPTIONS}], sort_keys=True
    )
    return f"longer-{hashlib.sha256(told.encode()).hexdigest()}"


def _place(record: Record) -> Place:
    cell = record.cell
    return cell["kind"], cell["schedule"] if cell["kind"] == "pruned" else "", cell["amount"]


def _places(curve: Mapping[str, Any]) -> list[Place]:
    amounts, controls = curve["amounts"], curve["controls"]
    pruned = [("pruned", s, a) for a in amounts for s in curve["schedules"]]
    return [
        ("base", "", None),
        *pruned,
        *((kind, "", a) for a in controls["amounts"] or amounts if a != "sweet-spot" for kind in controls["kinds"]),
    ]


def _levels(folder: Path) -> tuple[float, ...]:
    file = folder / "recipe.yaml"
    found = read_yaml(file)["prune"]["levels"] if file.is_file() else []
    return tuple(level["channels"] for level in found if level.get("channels") is not None)


def named(sweep: Sweep, place: Place) -> str:
    """A row by what leaves, level by level: "29 %, then 29 % of the rest: 50 % in all"."""
    kind, _, amount = place
    if kind == "longer":
        return "none, trained as long as the others"
    if amount is None:
        return "none"
    gone = [f"{100 * (1 - left):.0f} %" for left in sweep.levels.get(place, ())]
    if len(gone) > 1:
        return f"{', then '.join(gone)} of the rest: {100 * (1 - amount):.0f} % in all"
    said = {
        "pruned": " at once" if gone else f", {place[1]}",
        "scratch": ", from scratch",
        "thin": ", thinner",
        "random": ", random",
    }[kind]
    return f"{100 * (1 - amount):.0f} %{said}"


# --------------------------------------------------------------------------------------------------------- the four rows


def twin_parts(sweep: Sweep, told: Sequence[tuple[str, float, float, float]], resnet: Sequence[Cost]) -> list[Part]:
    """The part of the page that is measured: four rows, why half the size, why the error may improve.

    `told` are the talk's rows (filters, MB, "GFLOPs", MAE), `resnet` the costs of ResNet-50 at the same four places.
    """
    return [
        *_incomplete(sweep),
        four_rows(sweep),
        Heading(text="Why is the size about half when a quarter of the filters goes?"),
        *_half(sweep, told, resnet),
        Heading(text="Why may the error improve?"),
        *_improves(sweep),
    ]


def _lines(sweep: Sweep) -> tuple[Line, ...]:
    """The lines of the curve; a point where a seed is missing is marked, so that nothing is chosen by it."""
    seeds = {
        r.cell["seed"] for r in sweep.at(ROWS[0])
    }  # without its dense network a seed has nothing to be held against
    records = [r for r in sweep.records if r.cell["kind"] != "longer" and r.cell["seed"] in seeds]
    there = {(_place(r), r.cell["seed"]) for r in records}
    cells = {_place(r): r.cell for r in records}
    every = {seed for _, seed in there} | {seed for _, seed in sweep.missing}
    lost = [
        {**cell, "seed": seed, "status": "no result"}
        for place, cell in cells.items()
        for seed in sorted(every)
        if (place, seed) not in there
    ]
    return lines(records, goal="min", failed=lost)


def _incomplete(sweep: Sweep) -> list[Part]:
    if not sweep.missing:
        return []
    seeds: dict[Place, list[int]] = {}
    for place, seed in sweep.missing:
        seeds.setdefault(place, []).append(seed)
    told = "; ".join(
        f"{named(sweep, place)} ({place[0]}): seeds {', '.join(map(str, s))}" for place, s in seeds.items()
    )
    have = sweep.num_trials - len(sweep.missing)
    return [Text(text=f"**Not finished: {have} of {sweep.num_trials} trials have a result.** Without one: {told}.")]


def four_rows(sweep: Sweep) -> Table:
    """All columns of the talk's table, of the exported float32 files; "not tested" where there is no result."""
    rows: list[tuple[Cell, ...]] = []
    base = sweep.at(ROWS[0])
    for place in ROWS:
        found, name = sweep.at(place), named(sweep, place)
        if not found or not base:
            rows.append((name, *[None] * 9))
            continue
        size, macs = _mean(found, "bytes"), _mean(found, "macs")
        rows.append((
            name, size / 1e6, size / 2**20, size / _mean(base, "bytes"), 2 * macs / 1e9, macs / 1e9, macs / _mean(base, "macs"),
            over_seeds(_values(found, "metric")), "–" if place == ROWS[0] else _paired(found, base, "metric"), len(found),
        ))  # fmt: skip
    return Table(
        caption="The four rows on the synthetic twin: exported float32 files in ONNX Runtime, test pictures; in small print 95 % intervals over seeds, differences seed by seed",
        columns=(
            Column(title="Filters pruned"), Column(title="MB", mark="measured", form=".3f"), Column(title="MiB", mark="measured", form=".3f"),
            Column(title="Size remains", mark="measured", form=".3f"), Column(title="GFLOPs, 2 × MACs", mark="counted", form=".5f"),
            Column(title="GMACs", mark="counted", form=".5f"), Column(title="MACs remain", mark="counted", form=".3f"),
            Column(title="MAE, g", mark="measured", form=".1f"), Column(title="MAE less dense, g", mark="measured", form="+.1f"),
            Column(title="Seeds"),
        ),
        rows=rows,
    )  # fmt: skip


def _values(records: Iterable[Record], name: str) -> list[float]:
    return [float(v) for r in records if (v := r.measured[name].value) is not None]


def _mean(records: Sequence[Record], name: str) -> float:
    return interval(_values(records, name)).mean


def _paired(records: Iterable[Record], others: Iterable[Record], name: str) -> Spread | None:
    """Mean difference to the same seed's other record."""
    by_seed = {r.cell["seed"]: r.measured[name].value for r in others}
    found = [r.measured[name].value - by_seed[s] for r in records if (s := r.cell["seed"]) in by_seed]
    return over_seeds(found) if found else None


# --------------------------------------------------------------------------------------------------- why half the size


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Shapes of all parameters, and the MACs that read each weight."""

    shapes: Mapping[str, tuple[int, ...]]
    macs: Mapping[str, int]

    @classmethod
    def of_file(cls, path: Path) -> Layers:
        """From an exported .onnx file."""
        import onnx

        graph = onnx.load(str(path)).graph
        macs = {name: count for name, _, count in examine_onnx(path).by_node}
        return cls(
            shapes={i.name: tuple(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT},
            macs={n.input[1]: macs[n.name] for n in graph.node if n.name in macs},
        )

    @classmethod
    def of_cost(cls, cost: Cost) -> Layers:
        """From what was counted in a graph."""
        return cls(shapes=cost.parameter_shapes, macs={n.weights[0]: n.macs for n in cost.by_node if n.weights})


SIDES = {2: "inputs and outputs leave", 1: "one side only leaves", 0: "nothing leaves"}


def by_sides(dense: Layers, small: Layers) -> dict[int, tuple[int, int, int, int]]:
    """By how many axes of a parameter lost something: (parameters, of them left, MACs, of them left).

    With the share s left of all filters, what has lost on two sides keeps s², on one side s. Raises ValueError where the
    two networks do not have the same parameters.
    """
    if dense.shapes.keys() != small.shapes.keys():
        msg = f"both networks must have the same parameters. Got {sorted(dense.shapes.keys() ^ small.shapes.keys())[:4]} in one of them."
        raise ValueError(msg)
    found = dict.fromkeys(SIDES, (0, 0, 0, 0))
    for name, shape in dense.shapes.items():
        left = small.shapes[name]
        sides = sum(a != b for a, b in zip(shape, left, strict=True))
        told = (_product(shape), _product(left), dense.macs.get(name, 0), small.macs.get(name, 0))
        found[sides] = tuple(a + b for a, b in zip(found[sides], told, strict=True))  # type: ignore[assignment]
    return found


def _product(shape: Iterable[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _half(sweep: Sweep, told: Sequence[tuple[str, float, float, float]], resnet: Sequence[Cost]) -> list[Part]:
    """(1 − p)², what keeps one of its sides, and the file around the weights."""
    trials = [next(iter(sweep.at(place)), None) for place in (ROWS[0], ROWS[1], ROWS[3])]
    ours = [None if t is None else Layers.of_file(sweep.file(t)) for t in trials]
    theirs = [Layers.of_cost(resnet[i]) for i in (0, 1, 3)]
    files = [None if t is None else float(t.measured["bytes"].value or 0) for t in trials]
    rows = [
        *_sides_rows("the twin’s network", ours),
        ("the twin’s file, bytes (measured)", 1.0, *_shares(files), "–", "–", "–"),
    ]
    rows += _sides_rows("ResNet-50 at 256×256", theirs)
    table = Table(
        caption="What of the parameters and MACs keeps a side: its share of the dense network, and what remains of it where 25 % and 50 % of the filters went at once",
        columns=(
            Column(title="Of the network"), *(
                Column(title=f"{what}{when}", mark="counted", form=".4f")
                for what in ("Parameters", "MACs")
                for when in (": share", " left at 25 %", " left at 50 %")
            ),
        ),
        rows=rows,
    )  # fmt: skip
    return [table, *_remains_figures(sweep, told, resnet), Text(text=_half_sentence(ours, theirs))]


def _shares(values: Sequence[float | None]) -> list[float | None]:
    whole, *rest = values
    return [None if v is None or whole is None else v / whole for v in rest]


def _sides_rows(name: str, layers: Sequence[Layers | None]) -> list[tuple[Cell, ...]]:
    dense, *smaller = layers
    found = [None if dense is None or s is None else by_sides(dense, s) for s in smaller]
    known = next((f for f in found if f is not None), None)
    if known is None:
        return [(f"{name}: no result yet", *[None] * 6)]
    sums = [None if f is None else {9: tuple(map(sum, zip(*f.values(), strict=True))), **f} for f in found]
    rows: list[tuple[Cell, ...]] = []
    for sides, title in {**SIDES, 9: "all of it"}.items():
        parts = [None if s is None else s[sides] for s in sums]
        first = next(p for p in parts if p is not None)
        cells: list[Cell] = []
        for at in (0, 2):
            whole = next(s for s in sums if s is not None)[9][at]
            left = ["–" if p is not None and not p[at] else None if p is None else p[at + 1] / p[at] for p in parts]
            cells += [first[at] / whole, *left]
        rows.append((f"{name}: {title}", *cells))
    return rows


def _half_sentence(ours: Sequence[Layers | None], theirs: Sequence[Layers]) -> str:
    told = []
    for name, (dense, small, *_) in (("the twin’s network", ours), ("ResNet-50", theirs)):
        if dense is None or small is None:
            continue
        sides = by_sides(dense, small)
        one = [
            n
            for n, s in dense.shapes.items()
            if n in dense.macs and sum(a != b for a, b in zip(s, small.shapes[n], strict=True)) == 1
        ]
        total = [sum(part[i] for part in sides.values()) for i in range(4)]
        told.append(
            f"{name}: {100 * sides[2][0] / total[0]:.1f} % of the parameters and {100 * sides[2][2] / total[2]:.1f} % of the MACs lose on both sides and keep "
            f"{sides[2][1] / sides[2][0]:.4f}; {', '.join(f'`{n}` ({100 * dense.macs[n] / total[2]:.2f} % of the MACs)' for n in one)} keep a side; "
            f"in all {total[1] / total[0]:.4f} of the parameters and {total[3] / total[2]:.4f} of the MACs remain"
        )
    return (
        "A layer loses inputs as well as outputs. With 25 % of the filters gone, " + ". ".join(told) + "."
        if told
        else ""
    )


def _remains_figures(
    sweep: Sweep, told: Sequence[tuple[str, float, float, float]], resnet: Sequence[Cost]
) -> list[Part]:
    """What remains over what was pruned, and the same as a multiple of (1 − p)², where the lines come apart."""
    gone, at = (0.0, 25.0, 50.0), (0, 1, 3)
    trials = [sweep.at(ROWS[i]) for i in at]
    figures: dict[str, list[float | None]] = {
        "ResNet-50: parameters": [resnet[i].parameters for i in at],
        "ResNet-50: MACs": [resnet[i].macs for i in at],
        "the twin: bytes of the file": [_mean(t, "bytes") if t else None for t in trials],
        "the twin: MACs": [_mean(t, "macs") if t else None for t in trials],
        "the talk: MB": [told[i][1] for i in at],
        "the talk: multiply-adds": [told[i][2] for i in at],
    }
    remains = {
        name: [(p, 100 * v / values[0]) for p, v in zip(gone, values, strict=True) if v is not None and values[0]]
        for name, values in figures.items()
    }
    square = [(float(p), 100 * (1 - p / 100) ** 2) for p in range(0, 51, 5)]
    times = {name: [(p, left / (100 * (1 - p / 100) ** 2)) for p, left in dots] for name, dots in remains.items()}
    talks = [name for name in figures if name.startswith("the talk")]
    return [
        draw.lines(
            {"(1 − p)²": square, **remains}, x="filters pruned, %", y="remains, %", controls=talks, mark="counted",
            caption="What remains of size and multiply-adds; the bytes of the twin’s files are measured, dashed lines are the talk’s",
        ),
        draw.lines(
            {"(1 − p)²": [(p, 1.0) for p, _ in square], **times}, x="filters pruned, %", y="remains ÷ (1 − p)²", controls=talks, mark="counted",
            caption="The same as a multiple of (1 − p)²: above 1 is what keeps a side, or does not shrink at all",
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ why the error improves


def _improves(sweep: Sweep) -> list[Part]:
    """Every seed over what was removed, the error on training pictures beside it, and the dense network trained as long."""
    figures = [_seeds_figure(sweep, schedule) for schedule in dict.fromkeys(s for _, s, _ in ROWS if s)]
    drawn = [line for line in _lines(sweep) if not all(p.same_as for p in line.points if p.kind != "base")]
    means = {
        line.name: [
            (p.removed["sparsity"], over_seeds([*p.test.values()])) for p in line.points if "sparsity" in p.removed
        ]
        for line in drawn
    }
    together = draw.lines(
        means, x="weights removed, %", y="MAE, test pictures, g", controls=[line.name for line in drawn if line.kind != "pruned"],
        caption="Means with 95 % intervals over seeds, with the controls (dashed); lower is better",
    )  # fmt: skip
    verdict = Text(text=_verdict(sweep))
    pictures = [f for f in (*figures, together if drawn else None) if f is not None]
    return [*pictures, *_regularised(sweep), verdict, *_dense_question(sweep)]


def _dense_question(sweep: Sweep) -> list[Part]:
    """What the page of the curve says of smaller dense networks."""
    found = _lines(sweep)
    spot = sweet_spot(found, "sparsity", limit=sweep.limit, unit="g")
    said = dense_verdict(spot, compared(found, goal="min", unit="g"), goal="min")
    return [Text(text=f"**Would a smaller dense network have done as well?** {said}")]


def _seeds_figure(sweep: Sweep, schedule: str) -> Part | None:
    """A line for each seed, dashed, and their mean."""
    places = [
        ROWS[0],
        *sorted(
            {_place(r) for r in sweep.records if _place(r)[:2] == ("pruned", schedule)}, key=lambda p: -(p[2] or 0)
        ),
    ]
    dense = {r.cell["seed"]: r for r in sweep.at(ROWS[0])}
    seeds: dict[str, list[tuple[float, Spread | float]]] = {}
    mean: list[tuple[float, Spread | float]] = []
    for place in places:
        found = [r for r in sweep.at(place) if r.cell["seed"] in dense]
        gone = [100 * (1 - _value(r, "parameters") / _value(dense[r.cell["seed"]], "parameters")) for r in found]
        for record, x in zip(found, gone, strict=True):
            seeds.setdefault(f"seed {record.cell['seed']}", []).append((x, _value(record, "metric")))
        if found:
            mean.append((sum(gone) / len(gone), over_seeds(_values(found, "metric"))))
    if len(mean) < 2:
        return None
    return draw.lines(
        {"mean of the seeds": mean, **dict(sorted(seeds.items())[:7])}, x="weights removed, %", y="MAE, test pictures, g", controls=[*seeds],
        caption=f"{schedule}: every seed (dashed), and their mean with its 95 % interval",
    )  # fmt: skip


def _value(record: Record, name: str) -> float:
    return float(record.measured[name].value or 0)


def _regularised(sweep: Sweep) -> list[Part]:
    """The error on the pictures a network was trained on, beside that on new ones: what regularisation would narrow."""
    rows: list[tuple[Cell, ...]] = []
    dense, longer = sweep.at(ROWS[0]), sweep.at(("longer", "", None))
    for place in (ROWS[0], ("longer", "", None), *ROWS[1:]):
        found = sweep.at(place)
        if not found:
            rows.append((named(sweep, place), *[None] * 5))
            continue
        seen = [s for r in found if (s := training_error(sweep.file(r), _value(r, "metric"), sweep.data)) is not None]
        new = _values(found, "metric")
        whole = len(seen) == len(new)
        rows.append((
            named(sweep, place), over_seeds(seen) if whole else None, over_seeds(new),
            over_seeds([b - a for a, b in zip(seen, new, strict=True)]) if whole else None,
            "–" if place == ROWS[0] else _paired(found, dense, "metric"),
            "–" if place[0] == "longer" else _paired(found, longer, "metric"),
        ))  # fmt: skip
    return [
        Table(
            caption="The error on the training pictures as they are, without augmentation, and on test pictures, through the same exported files, g; a network that learns its pictures by heart has a large gap",
            columns=(
                Column(title="Filters pruned"), Column(title="MAE, training pictures", mark="measured", form=".1f"), Column(title="MAE, test pictures", mark="measured", form=".1f"),
                Column(title="Gap", mark="measured", form=".1f"), Column(title="Less dense, seed by seed", mark="measured", form="+.1f"),
                Column(title="Less dense trained as long", mark="measured", form="+.1f"),
            ),
            rows=rows,
        )
    ]  # fmt: skip


@cache
def training_error(file: Path, test_error: float, data: Path | None) -> float | None:
    """Mean absolute error of a file on the training pictures, g; None where its error on test pictures is not the record's.

    Then the pictures are not those it was trained on: the task has changed since.
    """
    task = _task()
    predict = predictor(artifact_at(file))
    again = float(task.evaluate(predict, task.test_batches(data))["mae"].mean())
    if abs(again - test_error) > 1e-3:
        return None
    return float(task.evaluate(predict, task._batches(task.split("train", data)))["mae"].mean())


@cache
def _task() -> ModuleType:
    from newborn import task

    return task  # type: ignore[no-any-return]


def _verdict(sweep: Sweep) -> str:
    """What the differences show, and what nobody looked at."""
    dense, longer = sweep.at(ROWS[0]), sweep.at(("longer", "", None))
    told = []
    for place in ROWS[1:]:
        gain = _paired(sweep.at(place), dense, "metric")
        if gain is not None:
            told.append(f"{named(sweep, place)}: {_said(gain)}")
    after = [(place, _paired(sweep.at(place), longer, "metric")) for place in ROWS[1:]]
    steps = _steps(dense)
    more = max((n for place in ROWS[1:] if (n := _steps(sweep.at(place)))), default=0)
    fair = f" A pruned network was trained for {more:,} steps after the {steps:,} of its dense one." if more else ""
    if any(s for _, s in after):
        fair += (
            " Against the dense network with as many more: "
            + "; ".join(f"{named(sweep, p)}: {_said(s)}" for p, s in after if s)
            + "."
        )
    else:
        fair += f" The dense network with as many more steps: not tested (`{LONGER}`)."
    first = (
        "Against the dense network of the same seed, " + "; ".join(told) + "."
        if told
        else "No pruned network has a result yet."
    )
    return f"{first}{fair} Other sizes of the training set: not tested."


def _steps(records: Sequence[Record]) -> int:
    """Of training, of the first record's network alone."""
    return sum(int(epochs) * int(steps) for epochs, steps in records[0].details["training"].values()) if records else 0


def _said(gain: Spread) -> str:
    if gain.low is None or gain.high is None:
        return f"{_grams(gain.value)} g, one seed: no interval"
    word = "the error improves" if gain.high < 0 else "the error grows" if gain.low > 0 else "no difference shows"
    return f"{_grams(gain.value)} g ({_grams(gain.low)} to {_grams(gain.high)}), {word}"


def _grams(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # no −0.0


# ------------------------------------------------------------------------------------------------------------- the files


def table_of_trials(sweep: Sweep) -> str:
    """Every trial that has a result, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        (
            "row",
            "kind",
            "schedule",
            "remains",
            "seed",
            "bytes",
            "parameters",
            "macs",
            "flops",
            "mae_held_out_g",
            "mae_test_g",
        )
    )
    for record in sorted(sweep.records, key=lambda r: (str(_place(r)), int(r.cell["seed"]))):
        place = _place(record)
        figures = [record.measured[n].value for n in ("bytes", "parameters", "macs")]
        writer.writerow((
            named(sweep, place), *place, record.cell["seed"], *figures, 2 * int(_value(record, "macs")),
            record.measured["held_out"].value, record.measured["metric"].value,
        ))  # fmt: skip
    return out.getvalue()


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Write the page and its CSV."""
    from talk import book, case_study
    from talk.page import Setting, plain

    parser = argparse.ArgumentParser(
        prog="rows.py",
        description="The talk's four rows and its two questions, from the sweep of the newborn case study.",
    )
    parser.add_argument("sweep", type=Path, help=f"folder of `{COMMAND}`, finished or not")
    parser.add_argument("--out", type=Path, required=True, help="the page, .html; its CSV goes beside it")
    given = parser.parse_args(arguments)
    sweep = read_sweep(given.sweep)
    if sweep is None:
        say(f"{given.sweep} must be the folder of a sweep with at least one result. Run `{COMMAND}` first.")
        return 3
    start = time.perf_counter()
    setting = Setting(quick=False, folder=given.out.parent, shared=given.out.parent, newborn=given.sweep)
    page = json.loads(json.dumps(plain(case_study.build(setting)), allow_nan=False))
    told = {
        "name": "case_study", "status": "done", "page": page, "quick": False, "machine": machine_text(),
        "seconds": time.perf_counter() - start, "processor_seconds": time.process_time(), "source": Path(__file__).read_text(encoding="utf-8"),
    }  # fmt: skip
    write_text(given.out, book.bind({"case_study": told}))
    write_text(given.out.with_suffix(".csv"), table_of_trials(sweep))
    have = sweep.num_trials - len(sweep.missing)
    say(
        f"{given.out}: {have} of {sweep.num_trials} trials, {given.out.stat().st_size / 1e6:.2f} MB; {given.out.with_suffix('.csv')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
