"""Evidence: proofs, checks against the simulation, what stayed float, training, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from paredown.records import Record
from paredown.report.figures import line
from paredown.report.layers import SMALL, csv_link
from paredown.report.reading import (
    View,
    entry,
    epoch_losses,
    figure,
    items,
    mapping,
    number,
    rows,
    stage_name,
    stage_title,
    text,
)
from paredown.report.wording import difference, digits, quantity, whole

_LIMITS = {"float32": 1e-4, "float64": 1e-9}
NODES = 40


def proof_lines(run: View) -> list[dict[str, Any]]:
    """Per pruned stage: the error of the removal against its limit, and how far the output moved."""
    out: list[dict[str, Any]] = []
    seen: list[Any] = []
    for record in run.stages:
        proof = mapping(entry(record, "proof"))
        if not proof or dict(proof) in seen:
            continue
        seen.append(dict(proof))
        mode = text(proof.get("mode"), 20)
        error, scale, moved, own = (number(proof.get(k)) for k in ("max_error", "scale", "moved", "own_move"))
        limit = _LIMITS.get(mode)
        holds = None
        if error is not None and scale is not None and moved is not None and limit is not None:
            holds = error <= limit * scale and moved > 0
        out.append(
            {
                "title": stage_title(record),
                "error": _number(error),
                "limit": f"{digits(limit * scale)}" if limit is not None and scale is not None else "–",
                "scale": _number(scale),
                "moved": _number(moved),
                "own": _number(own),
                "mode": mode or "–",
                "realiser": text(entry(record, "realiser"), 20) or "–",
                "holds": "not tested" if holds is None else "holds" if holds else "does not hold",
            }
        )
    return out


def check_lines(run: View) -> list[dict[str, Any]]:
    """Per file: what the runtime computes against PyTorch, and the metric of the file against that of the simulation."""
    out = []
    for record in run.stages:
        check = mapping(entry(record, "check"))
        error, scale, cosine = (number(check.get(k)) for k in ("max_error", "scale", "cosine"))
        file, simulated = figure(record, "metric"), figure(record, "simulated_metric")
        unit = file.unit or run.metric["unit"]
        gap = file.value - simulated.value if file.value is not None and simulated.value is not None else None
        out.append(
            {
                "title": stage_title(record),
                "tested": bool(check),
                "notes": [text(n, 400) for n in items(entry(record, "check_notes"))[:8]],
                "against": "PyTorch simulation" if _is_int8(record) else "PyTorch, FP32",
                "error": _number(error),
                "relative": digits(error / scale) if error is not None and scale else "–",
                "cosine": f"{cosine:.6f}" if cosine is not None else "–",
                "simulated": quantity(simulated.value, unit)
                if simulated.value is not None
                else "–"
                if not _is_int8(record)
                else "not tested",
                "gap": difference(gap, unit) if gap is not None else "–",
            }
        )
    return out


def _is_int8(record: Record) -> bool:
    return "int8" in stage_name(record) or figure(record, "simulated_metric").value is not None


def float_lines(run: View) -> list[dict[str, Any]]:
    """Per INT8 file: how many nodes of the runtime's own graph run in int8, and which stayed float, by operator."""
    out = []
    for record in run.stages:
        if not _is_int8(record):
            continue
        ints, floats = entry(record, "int8_nodes"), entry(record, "float_nodes")
        count = number(ints) if number(ints) is not None else len(items(ints)) if ints is not None else None
        by_op: dict[str, list[str]] = {}
        reasons = mapping(entry(record, "float_reasons"))
        for node in items(floats):
            op, _, name = text(node).partition(": ")
            by_op.setdefault(op, []).append(name)
        out.append(
            {
                "title": stage_title(record),
                "tested": floats is not None,
                "int8": whole(count) if count is not None else "not tested",
                "floats": len(items(floats)),
                "layers": _layers_on_codes(record),
                "has_reasons": bool(reasons),
                "ops": [
                    {
                        "op": op,
                        "count": len(names),
                        "why": text(reasons.get(op), 300),
                        "names": [n for n in names if n][:NODES],
                        "more": max(0, len(names) - NODES),
                    }
                    for op, names in sorted(by_op.items(), key=lambda o: -len(o[1]))[:NODES]
                ],
            }
        )
    return out


def _layers_on_codes(record: Record) -> str:
    """How many convolutions and linear layers run quantized, in words; "" where the record does not say."""
    told = mapping(entry(record, "layers_on_codes"))
    some, every = number(told.get("on_codes")), number(told.get("of"))
    if some is None or not every:
        return ""
    return f"{whole(some)} of {whole(every)} convolutions and linear layers ({100 * some / every:.0f} %) run quantized."


def training_lines(run: View) -> list[dict[str, Any]]:
    """Loss per epoch of every recovery."""
    out = []
    for record in run.records:
        found = epoch_losses(record)
        if not found:
            continue
        losses = [loss for _, loss in found]
        at, lowest = min(found, key=lambda one: one[1])
        out.append(
            {
                "title": stage_title(record),
                "epochs": len(losses),
                "first": digits(losses[0]),
                "last": digits(losses[-1]),
                "lowest": digits(lowest),
                "at": at,
                "chart": line([float(v) for v in losses[:2000]]) if len(losses) > 1 else None,
            }
        )
    return out


def training_csv(run: View) -> str:
    """Loss of every epoch, for a spreadsheet."""
    lines = []
    for record in run.records:
        lines += [[stage_name(record), epoch, loss] for epoch, loss in epoch_losses(record)]
    return csv_link(("stage", "epoch", "loss"), lines, SMALL)


def _number(value: float | None) -> str:
    return digits(value) if value is not None else "–"


def provenance(run: View) -> dict[str, Any]:
    """Versions, seed, machine, digests; a second environment is told, since a run may be continued elsewhere."""
    first: dict[str, Any] = {}
    for record in run.records:
        key = json.dumps(record.environment, sort_keys=True, default=str)
        first.setdefault(key, record)
    environments = [_environment(r) for r in list(first.values())[:4]]
    cell = mapping(run.records[0].cell) if run.records else {}
    return {
        "recipe": text(cell.get("recipe_digest")) or "unknown",
        "environments": environments,
        "several": len(first) if len(first) > 1 else 0,
        "files": [_file(r) for r in run.stages],
        "protocols": _protocols(run),
    }


def _environment(record: Record) -> list[tuple[str, str]]:
    env = mapping(record.environment)
    facts: list[tuple[str, str]] = []
    for key, value in list(env.items())[:24]:
        if isinstance(value, Mapping):
            facts.extend(
                (f"{text(k)}" if key == "versions" else f"{text(key)}: {text(k)}", _plain(v))
                for k, v in list(value.items())[:24]
            )
        else:
            facts.append((text(key), _plain(value)))
    return facts


def _plain(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return text(" ".join(str(v) for v in value)) or "none"
    known = number(value)
    return whole(known) if known is not None and abs(known) >= 1e6 else text(value)


def _file(record: Record) -> dict[str, str]:
    return {
        "title": stage_title(record),
        "file": ", ".join(text(f) for f in (items(entry(record, "files")) or items(entry(record, "file")))[:6]) or "–",
        "digest": text(entry(record, "digest")) or "–",
        "plan": text(record.plan_digest) or "–",
    }


def _protocols(run: View) -> list[tuple[str, str]]:
    """How each kind of figure was measured: the protocol of the recommended file where it has one, else of the last that does."""
    told: dict[str, str] = {}
    first = run.stage(run.recommended)
    for record in (*run.stages, *([first] if first is not None else [])):
        for key in sorted(mapping(record.measured), key=str):
            found = figure(record, key)
            if found.value is not None and found.protocol:
                told[text(key).replace("_", " ")] = f"{text(found.protocol, 400)} [{found.badge}]"
    return sorted(told.items())[:40]


def remarks(run: View) -> list[tuple[str, str]]:
    """Alarms, uncounted operators and notes of all stages, each with where it comes from."""
    out: list[tuple[str, str]] = []
    for key, label in (
        ("alarms", "alarm"),
        ("uncounted", "operator not counted in MACs"),
        ("unknown_ops", "operator without a rule, channels pinned"),
    ):
        out.extend((label, _remark(v)) for v in items(entry(run.examine, key))[:60])
    for record in run.records:
        notes = (*items(entry(record, "check_notes"))[:30], *items(entry(record, "notes"))[:30])
        out.extend((stage_title(record), text(n, 400)) for n in notes)
    return list(dict.fromkeys(out))


def _remark(value: Any) -> str:
    given = mapping(value)
    return text(", ".join(f"{k} {v}" for k, v in given.items()) if given else value, 300)


def estimates(run: View) -> list[str]:
    """Figures that were estimated, so that none passes for a measurement."""
    out = []
    for record in run.stages:
        names = [
            text(k).replace("_", " ") for k in mapping(record.measured) if figure(record, str(k)).badge == "estimated"
        ]
        if names:
            out.append(f"{', '.join(sorted(names))} of {stage_name(record)}")
    if rows(entry(run.insight, "roofline")):
        out.append("the roofline: what bounds a layer, its share of the time, and what 8 bits gain at most")
    if number(entry(run.examine, "peak_activation_bytes")) is not None:
        out.append("peak activation memory of the dense model: from the lifetimes of its tensors")
    return out
