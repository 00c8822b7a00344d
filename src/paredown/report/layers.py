"""Layers before and after, and what was removed, as tables with bars and as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

from paredown.records import Record
from paredown.report.figures import bar, pair
from paredown.report.reading import View, entry, items, number, rows, stage_name, stage_title, text
from paredown.report.wording import large, whole

LARGE, SMALL = 75_000, 12_000
"""Characters of a CSV file in the page of a run: with all its charts it stays under a megabyte."""
LAYERS = 240
"""Rows of the layer table; smaller layers of larger networks are summed in one row, and all are in the CSV."""
SPACES = 300
PINS = 120


def layer_table(run: View) -> dict[str, Any] | None:
    """Parameters and MACs of every layer, before and after, in the order of the network."""
    before = _layers(run.stage("dense")) or _layers(run.examine)
    if not before:
        return None
    stage = _after(run, set(before))
    after = _layers(stage) if stage is not None else {}
    names = list(before)
    shown = set(sorted(names, key=lambda n: -sum(_counts(before[n])))[:LAYERS])
    lines = [
        _line(n, text(before[n].get("kind"), 40), _counts(before[n]), _counts(after.get(n)) if after else None)
        for n in names
        if n in shown
    ]
    rest = [n for n in names if n not in shown]
    if rest:
        lines.append(
            _line(
                f"{len(rest)} smaller layers together", "", _total(before, rest), _total(after, rest) if after else None
            )
        )
    tops = [max([line[key][0] for line in lines], default=0) for key in ("parameters", "macs")]
    for line in lines:
        line["charts"] = [
            pair(line[key][0], line[key][1], top) for key, top in zip(("parameters", "macs"), tops, strict=True)
        ]
    total = _line("Sum of the layers", "", _total(before, names), _total(after, list(after)) if after else None)
    return {
        "lines": lines,
        "total": total,
        "before": "dense FP32",
        "after": stage_title(stage) if stage is not None else "",
        "added": len(set(after) - set(before)),
        "csv": csv_link(
            ("layer", "kind", "parameters_before", "parameters_after", "macs_before", "macs_after"),
            (
                [
                    n,
                    text(before[n].get("kind"), 40),
                    *_flat(_counts(before[n]), _counts(after.get(n)) if after else None),
                ]
                for n in names
            ),
            LARGE,
        ),
    }


def _after(run: View, names: set[str]) -> Record | None:
    """The stage to show as "after": the recommended one, else the last level, else the one in codes, if its layers have these names."""
    levels = [r for r in run.stages if stage_name(r).startswith("level-")]
    wanted = [run.stage(run.recommended) if run.recommended != "dense" else None, *levels[-1:], run.quantized]
    overlaps = [(len(names & set(_layers(r))), -i, r) for i, r in enumerate(wanted) if r is not None]
    best = max(overlaps, key=lambda o: o[:2], default=None)
    return best[2] if best is not None and best[0] else None


def _layers(record: Record | None) -> dict[str, Mapping[str, Any]]:
    """Layers by name, in order; a name that is there twice is told apart by its number."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows(entry(record, "layers")):
        name = text(row.get("name")) or "unnamed"
        count = 2
        while name in found:
            name, count = f"{text(row.get('name')) or 'unnamed'} ({count})", count + 1
        found[name] = row
    return found


def _counts(row: Mapping[str, Any] | None) -> tuple[float, float]:
    if row is None:
        return 0, 0
    return number(row.get("parameters")) or 0, number(row.get("macs")) or 0


def _total(layers: Mapping[str, Mapping[str, Any]], names: list[str]) -> tuple[float, float]:
    counts = [_counts(layers.get(n)) for n in names]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)


def _line(name: str, kind: str, before: tuple[float, float], after: tuple[float, float] | None) -> dict[str, Any]:
    pairs = [(b, after[i] if after is not None else None) for i, b in enumerate(before)]
    return {"name": name, "kind": kind, "parameters": pairs[0], "macs": pairs[1], "said": [_said(*p) for p in pairs]}


def _said(before: float, after: float | None) -> tuple[str, str]:
    return whole(before) if before < 1e7 else large(before), "" if after is None else whole(
        after
    ) if after < 1e7 else large(after)


def _flat(before: tuple[float, float], after: tuple[float, float] | None) -> list[Any]:
    return [before[0], after[0] if after else "", before[1], after[1] if after else ""]


def removed_table(run: View) -> dict[str, Any] | None:
    """How many units of every space are left after each level."""
    levels = [r for r in run.stages if rows(entry(r, "removed"))]
    if not levels:
        return None
    spaces: dict[str, dict[str, Any]] = {}
    for at, record in enumerate(levels):
        for row in rows(entry(record, "removed")):
            name = text(row.get("space")) or "unnamed"
            known = spaces.setdefault(
                name,
                {
                    "name": name,
                    "kind": text(row.get("kind"), 40),
                    "parameters": [],
                    "counts": [None] * (len(levels) + 1),
                },
            )
            known["parameters"] = known["parameters"] or [text(p) for p in items(row.get("parameters"))[:8]]
            before, after = number(row.get("before")), number(row.get("after"))
            if known["counts"][at] is None:
                known["counts"][at] = before
            known["counts"][at + 1] = after
    lines = [_space(s) for s in spaces.values()]
    top = max((line["most"] for line in lines), default=0)
    for line in lines:
        line["chart"] = pair(line["most"], line["last"], top)
    head = ["space", "kind", "dense", *(stage_name(r) for r in levels)]
    return {
        "heads": ["Dense", *(stage_title(r) for r in levels)],
        "lines": lines[:SPACES],
        "more": max(0, len(lines) - SPACES),
        "touched": sum(line["last"] < line["most"] for line in lines),
        "count": len(lines),
        "csv": csv_link(head, ([s["name"], s["kind"], *s["counts"]] for s in spaces.values()), LARGE),
    }


def _space(space: Mapping[str, Any]) -> dict[str, Any]:
    counts = space["counts"]
    first = next((c for c in counts if c is not None), 0)
    last = next((c for c in reversed(counts) if c is not None), 0)
    return {
        **space,
        "said": [whole(c) if c is not None else "–" for c in counts],
        "most": first,
        "last": last,
        "share": f"{100 * (1 - last / first):.0f} % removed" if first and last < first else "unchanged",
    }


def reached_lines(run: View) -> list[dict[str, Any]]:
    """Per level: what was asked, what was reached, what stood in the way."""
    out = []
    for record in run.stages:
        reached = entry(record, "reached")
        if reached is None:
            continue
        given = reached if isinstance(reached, Mapping) else {"reached": reached}
        facts = [(text(k).replace("_", " "), _fact(v)) for k, v in given.items() if v not in (None, "", [], {})]
        out.append({"title": stage_title(record), "facts": facts[:12], "realiser": text(entry(record, "realiser"))})
    return out


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return text("; ".join(f"{k} {_fact(v)}" for k, v in value.items() if v is not None), 400)
    if isinstance(value, list | tuple):
        return text(", ".join(_fact(v) for v in value), 400)
    known = number(value)
    return text(value, 400) if known is None else whole(known)


def pinned_table(run: View) -> dict[str, Any] | None:
    """What may not be removed and why, the largest groups first."""
    pins = rows(entry(run.examine, "pinned"))
    if not pins:
        return None
    counted = [(number(p.get("units")) or 0, text(p.get("reason"), 300), text(p.get("where"))) for p in pins]
    counted.sort(key=lambda p: -p[0])
    top = max(counted[0][0], 1)
    lines = [
        {"units": whole(u), "reason": why, "where": where, "chart": bar(u, top)} for u, why, where in counted[:PINS]
    ]
    return {
        "lines": lines,
        "more": len(counted) - len(lines),
        "units": whole(sum(p[0] for p in counted)),
        "csv": csv_link(("channels", "reason", "where"), counted, SMALL),
    }


def csv_link(head: Iterable[str], lines: Iterable[Iterable[Any]], most: int = 150_000) -> str:
    """A data: address of a CSV file. A text that a spreadsheet would run as a formula gets a leading apostrophe.

    After `most` characters the file ends with a line that says so: the records have more.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(list(head))
    for line in lines:
        writer.writerow([_inert(v) for v in line])
        if out.tell() > most:
            writer.writerow(["cut here, records.jsonl has more"])
            break
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(out.getvalue().encode("utf-8")).decode()


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
