"""The verdict of a run: bounds against what was measured, the file that stands in, what nobody looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paredown.budget import parse_latency
from paredown.errors import GateError, InfeasibleError
from paredown.export.session import has_exact_products
from paredown.pipeline.run import random_note
from paredown.pipeline.snippet import input_of, snippet
from paredown.plan import Plan
from paredown.quantize import SCHEMES
from paredown.records import Record

if TYPE_CHECKING:  # stages runs the verdict
    from paredown.pipeline.run import Run
    from paredown.program import Program
    from paredown.train import Roles


_OF_DENSE = ("size_bytes", "latency", "parameters", "macs")
"""What may be asked for as a share of the dense file."""


def bounds(run: Run, by_stage: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Every bound of the recipe's budget, with what was measured of the file in codes, or counted in the last float one."""
    int8, dense = by_stage[run.recipe.quantize.scheme], by_stage["dense"]
    last = [r for n, r in by_stage.items() if n.startswith("level-")] or [dense]
    asked = run.recipe.budget.model_dump(exclude_none=True)
    given = _limits(asked, dense, int8)
    sign = 1.0 if run.task.metric.goal == "max" else -1.0
    values = {
        "metric_loss": (
            sign * ((dense.measured["metric"].value or 0.0) - (int8.measured["metric"].value or 0.0)),
            run.task.metric.unit,
        ),
        "size_bytes": (int8.measured["bytes"].value, "B"),
        "latency": (int8.measured["latency_ms"].value, "ms"),
        "latency_ms": (int8.measured["latency_ms"].value, "ms"),
        "parameters": (last[-1].measured["parameters"].value, ""),
        "macs": (last[-1].measured["macs"].value, "MAC"),
        "peak_ram_bytes": (int8.measured["peak_memory_bytes"].value, "B"),
    }
    change = int8.measured.get("metric_change")
    end = None if change is None else change.low if sign > 0 else change.high
    worst = None if end is None else -sign * end  # the upper end of the loss: a bound is held to the mean
    out = []
    for what, bound in given.items():
        if what not in values:
            continue
        value, unit = values[what]
        limit = bound
        met = value is not None and value <= limit + 1e-9
        out.append(
            {
                "what": what,
                "bound": limit,
                "value": value,
                "unit": unit,
                **({"share": asked[what]} if what in _OF_DENSE and isinstance(asked[what], float) else {}),
                "margin": limit - (value or 0),
                **({"high": worst} if what == "metric_loss" and worst is not None else {}),
                "met": met,
                "badge": "measured",
                "timing": what in ("latency", "latency_ms", "peak_ram_bytes"),
            }
        )
    return out


def _limits(given: Mapping[str, Any], dense: Record, int8: Record) -> dict[str, float]:
    """Bounds as absolute numbers: fractions are of the dense file; a latency's, as it was timed in the same turns."""
    whole = {n: dense.measured[k].value or 0 for n, k in (("size_bytes", "bytes"), ("parameters",) * 2, ("macs",) * 2)}
    out = {}
    for what, bound in given.items():
        if what == "latency":
            beside = int8.measured["baseline_latency_ms"].value or 0.0
            out[what] = parse_latency(bound) if isinstance(bound, str) else bound * beside
        else:
            out[what] = bound * whole[what] if what in whole and isinstance(bound, float) else bound
    return out


def refuse_another_base(run: Run, values: Any) -> None:
    """Raise GateError where the dense file does not score what the recipe says that the model scores."""
    known, allowed = run.recipe.measure.known_metric, run.recipe.measure.known_within
    if known is None:
        return
    metric, found = run.task.metric, float(values.mean())
    allowed = allowed if allowed is not None else abs(known) / 100
    if abs(found - known) > allowed:
        msg = (
            f"the dense model must score the {metric.name} that the recipe knows of it, {known:g} ± {allowed:g} {metric.unit}. Got "
            f"{found:.6g} {metric.unit} on its exported file. Look at the weights, the normalisation and the test data before "
            "anything is removed, or change measure.known_metric."
        )
        raise GateError(msg)


def fallback(run: Run, by_stage: Mapping[str, Record], *, met: bool) -> str:
    """The smallest float file that keeps the metric bound and what the budget counts; without one the file in codes where it keeps
    all bounds, else the dense one."""
    scheme = run.recipe.quantize.scheme
    bound, asked = run.recipe.budget.metric_loss, run.recipe.budget.model_dump(exclude_none=True)
    limits = _limits(asked, by_stage["dense"], by_stage[scheme])
    sign = 1.0 if run.task.metric.goal == "max" else -1.0
    dense = by_stage["dense"].measured["metric"].value or 0.0
    levels = [n for n in by_stage if n.startswith("level-")]
    for name in sorted(levels, key=lambda n: int(n.removeprefix("level-")), reverse=True):
        loss = sign * (dense - (by_stage[name].measured["metric"].value or 0.0))
        if (bound is None or loss <= bound) and _counts_hold(by_stage[name], limits):
            return name
    return scheme if met and not _counts_hold(by_stage["dense"], limits) else "dense"


def _counts_hold(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a file keeps the bounds that no clock decides."""
    of = {"size_bytes": "bytes", "parameters": "parameters", "macs": "macs"}
    return all((record.measured[k].value or 0) <= limits[n] for n, k in of.items() if n in limits)


def not_tested(by_stage: Mapping[str, Record], target: str) -> list[str]:
    """What the reader may expect and nobody looked at."""
    runtime = "ONNX Runtime" if target.startswith("onnxruntime") else f"that of {target}"
    out = ["latency on the phone: these timings are of this machine", f"runtimes other than {runtime}"]
    if not any(name.startswith("twin-") for name in by_stage):
        out.append("an equal-size dense network trained from scratch")
    if not any("metric_change" in r.measured for r in by_stage.values()):
        out.append("the paired interval of the metric: evaluate returns no value per sample")
    return out


def details(
    run: Run,
    by_stage: Mapping[str, Record],
    found: Sequence[Mapping[str, Any]],
    recommended: str,
    otherwise: str,
    program: Program,
    roles: Roles,
) -> dict[str, Any]:
    """What the record of the verdict says; `found` are the bounds."""

    def example(stage: str) -> str:
        file = str(by_stage[stage].details["file"])
        # a file that computes in float has no products of codes
        in_float = stage != run.recipe.quantize.scheme or SCHEMES[stage].activations == "float"
        exact = in_float or has_exact_products(run.folder.path / file)
        return snippet(file, run.task.normalisation, program, exact=exact)

    return {
        "name": run.recipe.name,
        "recommended": recommended,
        "otherwise": otherwise,
        "quantized": run.recipe.quantize.scheme,
        "target_met": all(b["met"] for b in found) if found else None,
        "metric": dataclasses.asdict(run.task.metric),
        "bounds": [*found],
        **({"search": run.dense["search"]} if "search" in run.dense else {}),
        "not_tested": not_tested(by_stage, run.recipe.target),
        "normalisation": run.task.normalisation,
        "input": input_of(program),
        "snippet": example(recommended),
        "otherwise_snippet": example(otherwise),
        "warnings": [*roles.warnings, *random_note(run), *_alarms(by_stage)],
        "test_data": roles.test_digest,
    }


def _alarms(by_stage: Mapping[str, Record]) -> Iterator[str]:
    """What was odd in an evaluation or a calibration, by stage."""
    for name, record in by_stage.items():
        if name == "examine":
            continue
        alarms = record.details.get("alarms", ())
        told = (n for n in record.details.get("notes", ()) if n.startswith("calibration") and n not in alarms)
        yield from (f"{name}: {alarm}" for alarm in (*alarms, *told))


def gates(
    records: tuple[Record, ...], verdict: Mapping[str, Any], nearest: Plan | None = None, advice: str = ""
) -> None:
    """Raise GateError (metric) or InfeasibleError, with the nearest plan, where a bound does not hold."""
    missed = [b for b in verdict["bounds"] if not b["met"]]
    for bound in missed:
        limit, got = (_figure(bound[k], bound["unit"]) for k in ("bound", "value"))
        msg = f"{bound['what']} must be at most {limit}. Got {got} on the quantized file. The report names the best file that keeps it."
        if bound["what"] == "metric_loss":
            raise GateError(msg)
        raise InfeasibleError(msg, nearest=counted(nearest), advice=advice)


def _figure(value: float, unit: str) -> str:
    """Counts and bytes in full, all else in six digits.

    >>> _figure(31457280, "B"), _figure(0.51234567, "ms"), _figure(7.0, "")
    ('31,457,280 B', '0.512346 ms', '7')
    """
    text = f"{value:,.0f}" if unit in ("", "B", "MAC") and value >= 1000 else f"{value:.6g}"
    return f"{text} {unit}".rstrip()


def counted(plan: Plan | None) -> Plan | None:
    """The plan of several levels with what they reached together of the dense network, where a plan of one level says it."""
    levels = [] if plan is None else plan.made_by.get("levels", [])
    if plan is None or not levels:
        return plan
    together = {"dense": levels[0].get("dense"), "reached": levels[-1].get("reached")}
    return dataclasses.replace(plan, made_by={**plan.made_by, **together})
