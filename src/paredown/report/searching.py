"""The search for a budget in words: asked, foreseen, measured; what was tried, the front of it, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def search_lines(run: View) -> dict[str, Any] | None:
    """Lines about the search, for the page; None where nothing was searched."""
    told = mapping(entry(run.verdict, "search"))
    if not told:
        return None
    tried = rows(told.get("rounds")) or rows(told.get("trials"))
    chosen = number(told.get("chosen"))
    best = tried[int(chosen)] if chosen is not None and 0 <= chosen < len(tried) else {}
    return {
        "amounts": [_amount(n, v, best) for n, v in mapping(told.get("asked")).items()],
        "already_met": told.get("already_met") is True,
        "rounds": [_round(r) for r in tried[:40]],
        "front": [_trial(tried[int(i)]) for i in _numbers(told.get("front")) if 0 <= i < len(tried)],
        "shares": _shares(mapping(told.get("shares"))),
    }


def _amount(name: str, asked: Any, best: Mapping[str, Any]) -> str:
    parts = [f"asked at most {_said(name, asked)}"]
    for key, badge in (("foreseen", "estimated"), ("measured", "measured before the training")):
        value = number(mapping(best.get(key)).get(name))
        if value is not None:
            parts.append(f"{key if key == 'foreseen' else 'found'} {_said(name, value)} ({badge})")
    if best.get("size_bytes") is not None and name == "size_bytes":
        parts.append(f"foreseen {_said(name, best['size_bytes'])} (estimated)")
    return f"{text(name).replace('_', ' ')}: {', '.join(parts)}"


def _round(found: Mapping[str, Any]) -> str:
    if "way" in found:
        return _trial(found)
    why = text(found.get("why"), 200)
    values = [f"{text(n).replace('_', ' ')} {_said(n, v)}" for n, v in mapping(found.get("measured")).items()]
    state = "holds" if found.get("holds") is True else "missed"
    return f"file {text(found.get('number'))}: {why or '; '.join(values)}: {'no file' if why else state}"


def _trial(found: Mapping[str, Any]) -> str:
    if number(found.get("error")) is None:
        return f"{text(found.get('way'))} {text(found.get('share'))}: not possible: {text(found.get('why'), 200)}"
    recipe = mapping(found.get("recipe"))
    how = "; ".join(f"{text(k)} = {text(v, 200)}" for k, v in recipe.items()) or "the recipe without levels"
    size, error = number(found.get("size_bytes")), number(found.get("error"))
    return f"{_said('size_bytes', size)}, error of the output {quantity(error or 0.0, '')} (estimated): {how}"


def _shares(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = sorted(((number(v) or 0.0, text(n)) for n, v in given.items()), key=lambda pair: (-pair[0], pair[1]))
    rest = sum(v for v, _ in known[_MOST:])
    out = [(name, f"{100 * v:.1f} %") for v, name in known[:_MOST]]
    return [*out, *([(f"{len(known) - _MOST} others", f"{100 * rest:.1f} %")] if rest else [])]


def _numbers(value: Any) -> list[float]:
    return [n for v in items(value) if (n := number(v)) is not None]


def _said(name: str, value: Any) -> str:
    known = number(value)
    return "not given" if known is None else quantity(known, _UNITS.get(name, ""))
