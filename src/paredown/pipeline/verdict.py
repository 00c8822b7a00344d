"""The verdict of a run: bounds against what was measured, the file that stands in, what nobody looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paredown.errors import GateError, InfeasibleError
from paredown.records import Record

if TYPE_CHECKING:  # stages runs the verdict
    from paredown.pipeline.run import Run


def bounds(run: Run, int8: Record, dense: Record) -> list[dict[str, Any]]:
    """Every bound of the recipe's budget, with what was measured."""
    given = run.recipe.budget.model_dump(exclude_none=True)
    sign = 1.0 if run.task.metric.goal == "max" else -1.0
    values = {
        "metric_loss": (
            sign * ((dense.measured["metric"].value or 0.0) - (int8.measured["metric"].value or 0.0)),
            run.task.metric.unit,
        ),
        "size_bytes": (int8.measured["bytes"].value, "B"),
        "latency_ms": (int8.measured["latency_ms"].value, "ms"),
        "peak_ram_bytes": (int8.measured["peak_memory_bytes"].value, "B"),
    }
    out = []
    for what, bound in given.items():
        if what not in values:
            continue
        value, unit = values[what]
        limit = bound * (dense.measured["bytes"].value or 0) if what == "size_bytes" and bound < 1 else bound
        met = value is not None and value <= limit + 1e-9
        out.append(
            {
                "what": what,
                "bound": limit,
                "value": value,
                "unit": unit,
                "margin": limit - (value or 0),
                "met": met,
                "badge": "measured",
                "timing": what in ("latency_ms", "peak_ram_bytes"),
            }
        )
    return out


def fallback(run: Run, by_stage: Mapping[str, Record]) -> str:
    """The smallest float file that keeps the metric bound, the dense one if none does."""
    bound = run.recipe.budget.metric_loss
    sign = 1.0 if run.task.metric.goal == "max" else -1.0
    dense = by_stage["dense"].measured["metric"].value or 0.0
    for name in sorted((n for n in by_stage if n.startswith("level-")), reverse=True):
        loss = sign * (dense - (by_stage[name].measured["metric"].value or 0.0))
        if bound is None or loss <= bound:
            return name
    return "dense"


def not_tested(by_stage: Mapping[str, Record]) -> list[str]:
    """What the reader may expect and nobody looked at."""
    out = ["latency on the phone: these timings are of this machine", "runtimes other than ONNX Runtime"]
    if "twin-int8" not in by_stage:
        out.append("an equal-size dense network trained from scratch")
    if "metric_change" not in by_stage["int8"].measured:
        out.append("the paired interval of the metric: evaluate returns no value per sample")
    return out


def gates(records: tuple[Record, ...], verdict: Mapping[str, Any]) -> None:
    """Raise GateError (metric) or InfeasibleError where a bound does not hold."""
    missed = [b for b in verdict["bounds"] if not b["met"]]
    for bound in missed:
        msg = f"{bound['what']} must be at most {bound['bound']:.6g} {bound['unit']}. Got {bound['value']:.6g} on the INT8 file. The report names the best file that keeps it."
        if bound["what"] == "metric_loss":
            raise GateError(msg)
        raise InfeasibleError(msg)
