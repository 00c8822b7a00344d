"""The search for a budget in words: asked, foreseen, measured; what was tried, the front of it, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from paredown.report.layers import csv_link
from paredown.report.reading import View, entry, items, mapping, number, rows, text
from paredown.report.wording import quantity

_UNITS = {
    "size_bytes": "B",
    "latency": "× dense",
    "latency_ms": "ms",
    "peak_ram_bytes": "B",
    "macs": "MAC",
    "parameters": "",
}
_MOST = 8
FRONT = 100
"""Points with their recipes that a page lists: a hundred take a quarter of a megabyte. The CSV file goes on."""


def search_lines(run: View) -> dict[str, Any] | None:
    """Lines about the search, for the page; None where nothing was searched."""
    told = mapping(entry(run.verdict, "search"))
    if not told:
        return None
    tried = rows(told.get("rounds")) or rows(told.get("trials"))
    chosen = number(told.get("chosen"))
    best = tried[int(chosen)] if chosen is not None and 0 <= chosen < len(tried) else {}
    points = rows(told.get("front_points"))
    front = [_front_point(p, run) for p in points[:FRONT]] or [
        _trial(tried[int(i)]) for i in _numbers(told.get("front")) if 0 <= i < len(tried)
    ]
    return {
        "amounts": [_amount(n, v, best) for n, v in mapping(told.get("asked")).items()],
        "already_met": told.get("already_met") is True,
        "rounds": [_round(r) for r in tried[:40]],
        "front": front,
        "more_front": max(0, len(points) - FRONT),
        "front_csv": _front_csv(points),
        "shares": _shares(mapping(told.get("shares"))),
    }


def _front_csv(points: Sequence[Mapping[str, Any]]) -> str | None:
    """A link to all points of a front over several limits; None where there are none."""
    if not points:
        return None
    amounts = [*mapping(points[0].get("amounts"))]
    keys = [
        k
        for k in dict.fromkeys(k for p in points for k in mapping(p.get("recipe")))
        if k not in ("bits", "prune.levels")
    ]
    lines = [
        [
            text(p.get("way")), number(p.get("times")), number(p.get("error")),
            *(number(mapping(p.get("amounts")).get(n)) for n in amounts), number(p.get("held_out")),
            text(mapping(p.get("recipe")).get("bits"), 200), json.dumps([dict(mapping(v)) for v in items(p.get("levels"))]),
            *(_cell(mapping(p.get("recipe")).get(k)) for k in keys),
        ]
        for p in points
    ]  # fmt: skip
    return csv_link(
        [
            "way",
            "times the limits",
            "error of the output, estimated",
            *amounts,
            "metric, held-out, simulated",
            "bits",
            "prune.levels",
            *keys,
        ],
        lines,
    )


def _cell(value: Any) -> float | int | str | None:
    """A number, or text such as "12ms"."""
    found = number(value)
    return text(value) if found is None and isinstance(value, str) else found


def _amount(name: str, asked: Any, best: Mapping[str, Any]) -> str:
    parts = [f"asked at most {_said(name, asked)}"]
    for key, badge in (("foreseen", "estimated"), ("measured", "measured before the training")):
        value = number(mapping(best.get(key)).get(name))
        if value is not None:
            parts.append(f"{key if key == 'foreseen' else 'found'} {_said(name, value)} ({badge})")
    of_trial = number(mapping(best.get("amounts")).get(name))
    if best.get("size_bytes") is not None and name == "size_bytes":
        parts.append(f"foreseen {_said(name, best['size_bytes'])} (estimated)")
    elif of_trial is not None:
        how = "counted" if name in ("parameters", "macs") else "measured before the training"
        parts.append(f"found {_said(name, of_trial)} ({how})")
    return f"{text(name).replace('_', ' ')}: {', '.join(parts)}"


def _round(found: Mapping[str, Any]) -> str:
    if "way" in found:
        return _trial(found)
    why = text(found.get("why"), 200)
    values = [f"{text(n).replace('_', ' ')} {_said(n, v)}" for n, v in mapping(found.get("measured")).items()]
    state = "holds" if found.get("holds") is True else "missed"
    error = number(found.get("error"))
    by = f" by {text(found.get('by'))}" if error is not None else ""
    moved = f"; the output moves by {quantity(error, '')} (before the training)" if error is not None else ""
    return f"file {text(found.get('number'))}{by}: {why or '; '.join(values)}: {'no file' if why else state}{moved}"


def _trial(found: Mapping[str, Any]) -> str:
    if number(found.get("error")) is None:
        return f"{text(found.get('way'))} {text(found.get('share'))}: not possible: {text(found.get('why'), 200)}"
    recipe = mapping(found.get("recipe"))
    how = "; ".join(f"{text(k)} = {text(v, 200)}" for k, v in recipe.items()) or "the recipe without levels"
    error = number(found.get("error"))
    return f"{_amounts(found)}, error of the output {quantity(error or 0.0, '')} (estimated): {how}{_forecast(found)}"


def _front_point(found: Mapping[str, Any], run: View) -> str:
    """A point, and the keys of a recipe that make it."""
    recipe = mapping(found.get("recipe"))
    keys = " ".join(f"--set {_key(k, v)}" for k, v in recipe.items() if k != "bits")
    bits = f", {text(recipe['bits'], 200)}" if "bits" in recipe else ""
    error = quantity(number(found.get("error")) or 0.0, "")
    return f"{_amounts(found)}{_scored(found, run)}, error of the output {error} (estimated): {text(found.get('way'))}{bits}: {keys}"


def _scored(found: Mapping[str, Any], run: View) -> str:
    """What the metric was on held-out data, of a simulation: nobody exported a point."""
    value, epochs = number(found.get("held_out")), number(found.get("epochs")) or 0
    if value is None:
        return ""
    after = f"after {epochs:g} epochs of training" if epochs else "fitted, not trained"
    return f", {run.metric['label']} {quantity(value, run.metric['unit'])} on held-out data (simulated, {after})"


def _key(name: Any, value: Any) -> str:
    """A key of a recipe and its value, as a shell takes them."""
    if not isinstance(value, list | tuple):
        return f"{text(name)}={text(value)}"
    levels = [dict(mapping(v)) for v in value]
    return f"'{text(name)}={json.dumps(levels)}'"


def _amounts(found: Mapping[str, Any]) -> str:
    """What a trial comes to: bytes are estimated where bits were chosen, else measured of a file, as times are, before the training."""
    known = mapping(found.get("amounts")) or {"size_bytes": found.get("size_bytes")}
    bits = found.get("bits") or "bits" in mapping(found.get("recipe")) or "amounts" not in found
    badges = {
        "size_bytes": " (estimated)" if bits else " (measured)",
        "latency": " (measured)",
        "latency_ms": " (measured)",
        "peak_ram_bytes": " (measured)",
    }
    parts = [
        f"{_said(n, v)}{badges.get(n, '')}" if n != "parameters" else f"{_said(n, v)} parameters"
        for n, v in known.items()
    ]
    return ", ".join(parts)


def _forecast(found: Mapping[str, Any]) -> str:
    """How far the sum of what each thing alone costs was from what all cost together."""
    told = mapping(found.get("forecast"))
    total, measured = number(told.get("sum")), number(told.get("measured"))
    if total is None or measured is None:
        return ""
    times = f", {quantity(measured / total, '')} times that" if total > 0 else ""
    return f"; summed sensitivities foresaw {quantity(total, '')}{times} was measured"


def _shares(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = sorted(((number(v) or 0.0, text(n)) for n, v in given.items()), key=lambda pair: (-pair[0], pair[1]))
    rest = sum(v for v, _ in known[_MOST:])
    out = [(name, f"{100 * v:.1f} %") for v, name in known[:_MOST]]
    return [*out, *([(f"{len(known) - _MOST} others", f"{100 * rest:.1f} %")] if rest else [])]


def _numbers(value: Any) -> list[float]:
    return [n for v in items(value) if (n := number(v)) is not None]


def _said(name: str, value: Any) -> str:
    known = number(value)
    if known is not None and name in ("parameters", "macs"):  # counted
        return f"{known:,.0f} {_UNITS[name]}".rstrip()
    return "not given" if known is None else quantity(known, _UNITS.get(name, ""))
