"""The table of a sweep as Markdown: totals first, then a row per model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from paredown.coverage.sweep import Row

STATUSES = ("proven", "nothing to do", "not captured", "unproven", "timeout", "killed", "error")
_OUTPUT = "model output"
PARITY = 1e-4
"""Largest difference of an exported file from PyTorch, relative to the output's scale (see export.check)."""
_HEAD = (
    "model", "input", "parameters", "spaces", "free", "pinned", "why pinned", "removed", "proof error", "realiser",
    "ONNX parity", "s", "status",
)  # fmt: skip


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each status, lost more than a third of their parameters, and agree as an exported file.

    >>> counts([{"status": "proven", "removed": 0.5}])["more than a third removed"]
    1
    """
    found = Counter(str(r["status"]) for r in rows)
    captured = sum(r["status"] not in ("not captured", "killed") and "parameters" in r for r in rows)
    third = sum(float(r.get("removed") or 0) > 1 / 3 for r in rows)
    exported = [r["parity"] for r in rows if "parity" in r]
    return {
        "models": len(rows),
        **{s: found[s] for s in STATUSES if found[s]},
        "captured": captured,
        "more than a third removed": third,
        **({"export tried": len(exported), "export parity": sum(map(_agrees, exported))} if exported else {}),
    }


def disagreeing(rows: Sequence[Row]) -> list[str]:
    """Models whose exported file ran and answered otherwise than the pruned model."""
    ran = [r for r in rows if "max_error" in r.get("parity", {})]
    return [str(r["model"]) for r in ran if not _agrees(r["parity"])]


def _agrees(parity: Mapping[str, Any]) -> bool:
    return "max_error" in parity and parity["scale"] > 0 and parity["max_error"] <= PARITY * parity["scale"]


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
        "coupled, cut and proven in a process of its own. *free* and *pinned* are shares of the channels, *removed* is the share of",
        "parameters that left. Proof error and ONNX parity are relative to the output's scale; *s* is seconds of wall time. Outputs",
        "pin their channels in every model: *why pinned* names the other reasons.",
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
        f"{100 * row['pinned_share']:.0f} %" if "pinned_share" in row else "not tested",
        _why(row),
        f"{100 * row['removed']:.1f} %" if "removed" in row else "not tested",
        error,
        str(row.get("realiser", "not tested")),
        _told(row.get("parity")),
        f"{row.get('seconds', 0):.0f}",
        status,
    )
    return f"| {' | '.join(cells)} |"


def _why(row: Row) -> str:
    """The two commonest reasons beside the output, with their units."""
    if "reasons" not in row:
        return "not tested"
    reasons = sorted(((n, r) for r, n in row["reasons"].items() if r != _OUTPUT), reverse=True)
    return "; ".join(f"{_plain(r)} ({n:,})" for n, r in reasons[:2]) or "output only"


def _told(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "not tested"
    if "message" in parity:
        return _plain(parity["message"])[:110]
    return (
        f"{parity['max_error'] / parity['scale']:.0e}" if parity["scale"] else f"{parity['max_error']:.0e} (output 0)"
    )


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why channels are pinned, output aside: in how many models, and how many units."""
    models: Counter[str] = Counter()
    units: Counter[str] = Counter()
    for row in rows:
        found: dict[str, int] = row.get("reasons", {})
        models.update(found.keys())
        units.update(found)
    common = [(r, n) for r, n in models.most_common(16) if r != _OUTPUT]
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
