"""The table of a sweep as Markdown: totals first, then a row per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from paredown.coverage.sweep import Row

STATUSES = ("proven", "nothing to do", "not captured", "unproven", "timeout", "killed", "error")
UNPROVEN = ("unproven",)
_HEAD = ("model", "input", "parameters", "spaces", "free", "removed", "proof error", "realiser", "s", "status")


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each status, and how many lost more than a third of their parameters.

    >>> counts([{"status": "proven", "removed": 0.5}])["more than a third removed"]
    1
    """
    found = Counter(str(r["status"]) for r in rows)
    captured = sum(r["status"] not in ("not captured", "killed") and "parameters" in r for r in rows)
    third = sum(float(r.get("removed") or 0) > 1 / 3 for r in rows)
    return {
        "models": len(rows),
        **{s: found[s] for s in STATUSES if found[s]},
        "captured": captured,
        "more than a third removed": third,
    }


def markdown(rows: Sequence[Row], *, title: str = "Coverage", note: str = "") -> str:
    """The whole table, with what was asked, totals, and the commonest reasons for pinned channels."""
    channels = rows[0]["channels"] if rows else None
    total = counts(rows)
    lines = [
        f"# {title}",
        "",
        f"Random weights; {channels:g} of every space of channels remains, by l1, without alignment. Every row is *measured*: captured,"
        if channels is not None
        else "No model yet.",
        "coupled, cut and proven in a process of its own. *removed* is the share of parameters that left. The proof error is",
        "relative to the output's scale.",
        *([note] if note else []),
        "",
        "| | models | share |",
        "|---|---|---|",
        *(f"| {name} | {n} | {100 * n / max(len(rows), 1):.1f} % |" for name, n in total.items()),
        "",
    ]
    for family in dict.fromkeys(str(r["model"]).partition(":")[0] for r in rows):
        mine = [r for r in rows if str(r["model"]).startswith(f"{family}:")]
        lines += [f"## {family}", "", f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
        lines += [_line(r) for r in mine]
        lines.append("")
    return "\n".join([*lines, *_reasons(rows)])


def _line(row: Row) -> str:
    proof = row.get("proof") or {}
    error = f"{proof['max_error'] / proof['scale']:.0e} ({proof['mode']})" if proof.get("scale") else "not tested"
    status = str(row["status"]) + (f": {_plain(row['message'])[:110]}" if row.get("message") else "")
    cells = (
        str(row["model"]).partition(":")[2],
        " ".join("×".join(str(n) for n in shape[1:]) for shape in row.get("input", ())),
        f"{row['parameters']:,}" if "parameters" in row else "not tested",
        str(row.get("spaces", "not tested")),
        f"{100 * row['free_share']:.0f} %" if "free_share" in row else "not tested",
        f"{100 * row['removed']:.1f} %" if "removed" in row else "not tested",
        error,
        str(row.get("realiser", "not tested")),
        f"{row.get('seconds', 0):.0f}",
        status,
    )
    return f"| {' | '.join(cells)} |"


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why channels are pinned, output aside: in how many models, and how many units."""
    models: Counter[str] = Counter()
    units: Counter[str] = Counter()
    for row in rows:
        pinned: list[dict[str, Any]] = list(row.get("pinned", ()))
        for reason in {p["reason"] for p in pinned}:
            models[reason] += 1
        for p in pinned:
            units[p["reason"]] += int(p["units"])
    common = [(r, n) for r, n in models.most_common(15) if r != "model output"]
    if not common:
        return []
    return [
        "## Why channels are pinned",
        "",
        "| reason | models | units |",
        "|---|---|---|",
        *(f"| {_plain(reason)} | {n} | {units[reason]:,} |" for reason, n in common),
        "",
    ]


def _plain(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
