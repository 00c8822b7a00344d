"""The page about numerics: what a cast costs, how a mapping works, what bits and granularity lose; from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paredown import records as journal
from paredown.errors import RejectedError
from paredown.report import figures, layers
from paredown.report import numerics_figures as drawn
from paredown.report.page import _template
from paredown.report.reading import items, mapping, number, text
from paredown.report.wording import digits

MOST_LAYERS = 200
"""More rows than this would take the page beyond a megabyte; the CSV has them."""
COLUMNS = (("weight", "tensor", 8), ("weight", "channel", 8), ("weight", "channel", 4), ("weight", "group", 4))
ENTERING = (("activation", "tensor", 8), ("activation", "tensor", 4))


def numerics_page(facts: Mapping[str, Any]) -> str:
    """One HTML page from the facts that `paredown.quantize.facts.numerics_facts` gives (or `paredown numerics --json`).

    No script, nothing fetched, under 1 MB, the same facts the same bytes. Raises RejectedError (another document) and
    MissingError (Jinja2 or matplotlib is not installed).
    """
    if facts.get("schema") != 1 or not {"casts", "mapping", "granularity", "model"} <= facts.keys():
        msg = f"the facts must be schema 1 of `paredown numerics --json`. Got the keys {', '.join(map(str, facts))[:200]}."
        raise RejectedError(msg)
    return str(_template("numerics.html").render(_content(facts)))


def write_numerics(facts: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page whole or not at all; returns its path. Raises as `numerics_page`, and ResourceError."""
    journal.write_text(Path(path), numerics_page(facts))
    return Path(path)


def _content(facts: Mapping[str, Any]) -> dict[str, Any]:
    mapped, demo = facts["mapping"], facts["granularity"]
    low, high = mapped["range"]
    return {
        "casts": [_cast(row) for row in facts["casts"]["rows"]],
        "low": digits(low),
        "high": digits(high),
        "bits": mapped["bits"],
        "affine": _mapping(mapped["affine"]),
        "symmetric": _mapping(mapped["symmetric"]),
        "stairs": [
            drawn.staircase(mapped["affine"], low, high, "affine"),
            drawn.staircase(mapped["symmetric"], low, high, "symmetric"),
        ],
        "zero_points": [_zero_points(case, low, high) for case in mapped["zero_points"]],
        "demo": [
            {
                "what": text(demo[of]["what"], 300),
                "image": drawn.bits_chart(demo[of]["sqnr_db"], f"{of} of the example"),
                "table": _bits_table(demo[of]["sqnr_db"]),
            }
            for of in ("weights", "activations")
        ],
        "group": demo["group"],
        "model": None if facts["model"] is None else _model(facts["model"]),
    }


def _cast(row: Mapping[str, Any]) -> dict[str, Any]:
    told = row["told"]
    return {
        "kind": text(row["kind"]),
        "bits": row["bits"],
        "kept": "overflows" if row["kept"] is None else f"{row['kept']:.17g}",
        "error": "–" if row["absolute_error"] is None else digits(row["absolute_error"]),
        "percent": "–" if row["relative_error"] is None else f"{digits(100 * row['relative_error'])} %",
        "told": "not told" if told is None else f"{told['kept']:.10g}, off by {digits(told['percent'])} %",
    }


def _mapping(about: Mapping[str, Any]) -> dict[str, str]:
    levels = [float(v) for v in about["levels"]]
    return {
        "scale": digits(about["scale"], 4),
        "zero_point": str(about["zero_point"]),
        "codes": f"{about['quant_min']} … {about['quant_max']}".replace("-", "−"),
        "ends": f"{digits(levels[0])} … {digits(levels[-1])}",
    }


def _zero_points(case: Mapping[str, Any], low: float, high: float) -> dict[str, Any]:
    return {
        "codes": f"{case['codes'][0]} … {case['codes'][1]}".replace("-", "−"),
        "image": drawn.two_zero_points(case["rows"], case["codes"], low, high),
        "rows": [
            {
                "rule": text(row["rule"]),
                "zero_point": f"{row['zero_point']:g}".replace("-", "−"),
                "largest": digits(row["largest_error"]),
                "rms": digits(row["root_mean_square_error"]),
                "clipped": f"{100 * row['clipped_share']:.1f} %",
            }
            for row in case["rows"]
        ],
    }


def _bits_table(sqnr_db: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kinds = list(sqnr_db)
    bits = sorted({int(b) for by_bits in sqnr_db.values() for b in by_bits}, reverse=True)
    return {"heads": kinds, "lines": [(b, [_db(sqnr_db[k].get(str(b))) for k in kinds]) for b in bits]}


def _db(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.1f}".replace("-", "−")


def _model(about: Mapping[str, Any]) -> dict[str, Any]:
    lines = items(about["layers"])
    columns = [*COLUMNS, *(ENTERING if any(one["activation"] for one in lines) else ())]
    top = max((_at(one, c) or 0.0 for one in lines for c in columns), default=1.0)
    return {
        "name": text(about["name"]) or "model",
        "observer": text(about["observer"]),
        "notes": [text(n, 500) for n in items(about.get("notes"))[:20]],
        "heads": [f"{of}, {granularity}, {bits} bits" for of, granularity, bits in columns],
        "lines": [
            {
                "name": text(one["name"]),
                "kind": f"{text(one['kind'])} {'×'.join(str(n) for n in one['shape'])}",
                "cells": [{"said": _db(_at(one, c)), "chart": figures.bar(_at(one, c) or 0.0, top)} for c in columns],
            }
            for one in lines[:MOST_LAYERS]
        ],
        "more": max(0, len(lines) - MOST_LAYERS),
        "csv": layers.csv_link(
            ("layer", "of", "granularity", "bits", "sqnr_db"),
            [
                [text(one["name"]), of, granularity, bits, db]
                for one in lines
                for of in ("weight", "activation")
                for granularity, by_bits in mapping(one[of]).items()
                for bits, db in by_bits.items()
            ][:20_000],
        ),
        "worst": [_worst(one) for one in items(about["worst"])],
    }


def _at(one: Mapping[str, Any], column: tuple[str, str, int]) -> float | None:
    of, granularity, bits = column
    return number(mapping(mapping(one[of]).get(granularity)).get(str(bits)))


def _worst(one: Mapping[str, Any]) -> dict[str, Any]:
    said = [
        f"{granularity} {bits} bits: {_db(by_bits[bits])} dB"
        for granularity, by_bits in one["sqnr_db"].items()
        for bits in ("8", "4")
        if bits in by_bits
    ]
    return {
        "name": text(one["name"]),
        "of": "weight" if one["of"] == "weight" else "what enters the layer of",
        "image": drawn.histogram_with_grid(one),
        "said": "; ".join(said),
    }
