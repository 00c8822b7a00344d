"""What else is known of a network: curves, sensitivities and runs of the same task that lie in or beside a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from paredown import records as journal
from paredown.errors import ParedownError
from paredown.records import Record
from paredown.report.reading import View, entry, figure, mapping, stage_name, text, view

if TYPE_CHECKING:
    from paredown.report.curve_view import CurveView  # computes: the page of a lone run needs no numpy

Kind = Literal["run", "curve", "sensitivity"]
TITLES: dict[Kind, str] = {"run": "Run", "curve": "Curve", "sensitivity": "Sensitivity"}
FOLDERS, PAGES = 200, 8
"""Looked into at most, and shown at most."""
BROKEN = (ParedownError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)
"""What records that something else wrote, or half, may raise where they are read."""
_LONGEST = 1 << 20
"""Bytes of a first line: that of a curve names all its recipes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A folder of the same task, with another kind of records."""

    kind: Kind
    name: str
    folder: Path
    link: str
    """Relative address of its page; "" where it has none."""
    records: tuple[Record, ...]
    differs: tuple[str, ...]
    """What is not the same, or not on record; empty where network, data, metric and target are the same."""
    said: str
    """What its page says."""
    brief: str
    """The same in a line or two."""

    @property
    def title(self) -> str:
        """What its page is called."""
        return TITLES[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class _About:
    """What a folder's records are of; "" and empty where they do not say."""

    kind: Kind
    task: str
    target: str
    metric: str
    test_data: str
    networks: frozenset[str]
    """Digests of dense networks: of captured graphs with weights, and of exported files."""


def found_beside(folder: Path, records: Sequence[Record]) -> tuple[Beside, ...]:
    """Folders in this one and beside it that hold other kinds of records of the same task; those of the same network first.

    Whatever is wrong with a neighbour, it is left out: the page of this folder does not depend on it.
    """
    if not records:
        return ()
    own = _about(records)
    found = []
    for place in _neighbours(folder, own):
        try:
            there = tuple(journal.read(place / "records.jsonl"))
            other = _about(there)
            said, brief = _said(other.kind, there, records if own.kind == "run" else ())
            found.append(
                Beside(
                    kind=other.kind, name=place.name, folder=place, records=there, differs=_differences(own, other),
                    link=_link(folder.resolve(), place), said=said, brief=brief,
                )
            )  # fmt: skip
        except BROKEN:
            continue
    return tuple(sorted(found, key=lambda b: (bool(b.differs), b.kind)))  # else in the order of _neighbours


def _link(folder: Path, place: Path) -> str:
    there = place / "report.html"
    return quote(Path(os.path.relpath(there, folder)).as_posix()) if there.is_file() else ""


def _neighbours(folder: Path, own: _About) -> Iterator[Path]:
    """Folders of another kind and the same task: those in this one, then those named after it, then the others."""
    folder = folder.resolve()
    inside = sorted(p.parent for p in folder.glob("*/records.jsonl"))
    around = sorted(p.parent for p in folder.parent.glob("*/records.jsonl") if p.parent != folder)
    around.sort(key=lambda p: not (p.name.startswith(folder.name) or folder.name.startswith(p.name)))
    for place in (*inside, *around)[:FOLDERS]:
        kind, task = _first(place / "records.jsonl")
        if kind is not None and kind != own.kind and task == own.task:
            yield place


def _first(path: Path) -> tuple[Kind | None, str]:
    """(kind, task) by the first line alone."""
    try:
        with path.open("rb") as file:
            cell = mapping(mapping(json.loads(file.readline(_LONGEST))).get("cell"))
    except (OSError, ValueError, RecursionError):
        return None, ""
    return _kind(text(cell.get("stage"))), text(cell.get("task"))


def _kind(stage: str) -> Kind | None:
    return {"curve": "curve", "sensitivity": "sensitivity", "examine": "run", "dense": "run"}.get(stage)  # type: ignore[return-value]


def _about(records: Sequence[Record]) -> _About:
    first = records[0]
    cell, kind = mapping(first.cell), _kind(text(mapping(first.cell).get("stage"))) or "run"
    data: object = None
    if kind == "run":
        run = view([*records])
        metric = mapping(entry(run.verdict, "metric"))
        data = entry(run.verdict, "test_data")
        networks = {"network": [entry(run.examine, "network")], "file": [entry(run.stage("dense"), "digest")]}
    elif kind == "curve":
        bases = [r for r in records[1:] if mapping(r.cell).get("kind") == "base"]
        metric = mapping(entry(first, "metric"))
        data = entry(bases[0] if bases else None, "test_data")
        networks = {key: [entry(b, name) for b in bases] for key, name in (("network", "network"), ("file", "digest"))}
    else:
        metric = mapping(entry(first, "metric"))
        data = entry(first, "test_data")
        networks = {"network": [mapping(entry(first, "units")).get("network")]}
    return _About(
        kind=kind, task=text(cell.get("task")), target=text(cell.get("target")), metric=text(metric.get("name")), test_data=text(data),
        networks=frozenset(f"{key} {text(v)}" for key, values in networks.items() for v in values if v),
    )  # fmt: skip


def _differences(own: _About, other: _About) -> tuple[str, ...]:
    out = []
    if not own.networks & other.networks:
        comparable = {n.partition(" ")[0] for n in own.networks} & {n.partition(" ")[0] for n in other.networks}
        out.append("another dense network" if comparable else "whether its dense network is this one is not on record")
    if not own.test_data or not other.test_data:
        out.append("whether its test data are these is not on record")
    elif own.test_data != other.test_data:
        out.append(f"other test data ({other.test_data[:12]}, here {own.test_data[:12]})")
    if other.target != own.target:
        out.append(f"made for {other.target or 'an unknown target'}, here {own.target or 'an unknown target'}")
    if own.metric and other.metric and own.metric != other.metric:
        out.append(f"the metric is {other.metric}, here {own.metric}")
    return tuple(out)


def _said(kind: Kind, records: Sequence[Record], run: Sequence[Record] = ()) -> tuple[str, str]:
    """A page's answer, whole and in a line or two; that of a curve says what it knows of the way that `run` prunes, too."""
    if kind == "curve":
        from paredown.controls import dense_parts  # computes: the page of a lone run needs no numpy
        from paredown.curve import NOUNS
        from paredown.report.curve_view import curve_view

        seen = curve_view(records)
        parts = dense_parts(seen.spot, seen.comparisons, goal=seen.metric["goal"])
        place = (
            "no sweet spot"
            if seen.spot.removed is None
            else f"the sweet spot is {seen.spot.name} with {seen.spot.removed:.1f} % of {NOUNS[seen.axis]} removed"
        )
        brief = f"{place}. {parts[0][0] if parts else ''}"
        own = _of_the_way(seen, view([*run])) if run else ""
        return text(f"{seen.spot.sentence} {seen.verdict}", 1600), text(f"{brief} {own}".strip(), 900)
    if kind == "sensitivity":
        from paredown.report.sensitivity_document import sensitivity_document

        document = sensitivity_document(records)
        firsts = [str(document[k]["sentence"]).partition(" The order")[0] for k in ("units", "bits") if document[k]]
        return text(document["verdict"], 1200), text(" ".join(firsts), 900)
    from paredown.report.verdict import verdict_strip

    told = verdict_strip(view([*records]))
    said = text(f"{told['headline']}. Recommended: {told['file'] or told['recommended'] or 'no file yet'}.", 300)
    return said, said


def _of_the_way(seen: CurveView, run: View) -> str:
    """What a curve says against dense controls of the way in which a run prunes, where its sweet spot is of another; "" elsewhere."""
    levels = [r for r in run.stages if stage_name(r).startswith("level-")]
    before = figure(run.stage("dense"), "parameters").value
    left = figure(levels[-1], "parameters").value if levels else None
    if not levels or not before or left is None or left == before:  # masks: their amounts are none of counts
        return ""
    reached = mapping(entry(levels[-1], "reached"))
    schedule = {1: text(reached.get("schedule")) or "one-shot", 2: "multi-level"}.get(len(levels), "iterative")
    name, removed = f"{text(reached.get('criterion'))} {schedule}", 100 * (1 - left / before)
    told = [c for c in seen.comparisons if c.line == name and c.control != "random"]
    spot = seen.spot.point
    if not told or (spot is not None and name == f"{spot.method} {spot.schedule}"):
        return ""
    at = {p.amount: p.removed.get("parameters", 0.0) for line in seen.lines if line.name == name for p in line.points}
    nearest = min({c.amount for c in told}, key=lambda a: abs(at.get(a, 0.0) - removed))
    first = min((c for c in told if c.amount == nearest), key=lambda c: not c.comparable)
    return f"This run prunes by {name}. Of that, at {nearest:g}: {first.sentence}"


def shown(found: Sequence[Beside], embedded: Sequence[Beside] = (), why_not: str = "") -> dict[str, object]:
    """What beside.html names. `why_not`: why one of the same network is not in this file."""
    lines = []
    for one in found[:PAGES]:
        inside = any(one is e for e in embedded)
        where = "in this file as well, above" if inside else why_not if not one.differs else ""
        lines.append({
            "title": one.title, "name": one.name, "link": one.link, "said": one.brief if inside else one.said, "differs": one.differs, "where": where,
        })  # fmt: skip
    return {"beside": lines, "more_beside": max(0, len(found) - PAGES)}


def runs_to_write(folder: Path) -> list[Path]:
    """Finished runs of the same network beside a curve or a sensitivity: `paredown report` puts it into their pages."""
    records = journal.read(folder / "records.jsonl")
    return [b.folder for b in found_beside(folder, records) if b.kind == "run" and not b.differs]
