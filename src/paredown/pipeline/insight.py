"""Insight: what a run knows beyond its table: for whom the result changed, bits and noise per layer, disturbed inputs, the roofline.

One record, stage "insight", between the files and the verdict. Test data are looked at after everything is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.errors import ParedownError, RejectedError
from paredown.examine import examine
from paredown.export import Artifact, predictor
from paredown.measure import paired, summarize
from paredown.measure.disturbed import STRENGTHS, disturbances, disturbed, is_pictures
from paredown.measure.peak import machine_peaks
from paredown.measure.quality import kept_values
from paredown.pipeline.run import Run
from paredown.program import Program
from paredown.quantize import Quantized
from paredown.quantize.culprits import some
from paredown.quantize.half import in_halves
from paredown.quantize.noise import activation_noise, folded_weights, sqnr
from paredown.quantize.schemes import HALF, is_narrow
from paredown.records import Record

Values = NDArray[np.float64]
STAGE = "insight"
MOVED = ("equalize", "smooth")
"""Repairs after which a weight is another one: what its codes lose cannot be read off the weights."""
MOST_VALUES, QUARTERS, LEAST_IN_SLICE = 12, 4, 5
MOST_CHANGED, DRAWN = 10, 300


def insight(run: Run, subject: str, program: Program, measure: Callable[[str], Artifact]) -> Record:
    """All of it, for the file that is recommended (where that is the dense one: for the quantized one). `measure` gives a stage's file."""
    run.say(f"{subject}: look closer")
    dense, now = kept_values(run.folder.path, "dense"), kept_values(run.folder.path, subject)
    columns = run.dense.get("slices", {})
    quantized = run.dense.get("quantized")
    details: dict[str, Any] = {
        "subject": subject,
        "bits": layer_bits(run, quantized) if quantized is not None else None,
        "changed": None
        if dense is None or now is None or len(dense) != len(now)
        else changed(dense, now, columns, run.task.metric.goal, run.task.metric.unit),
        "bias": _bias(run, subject, columns, measure) if "target" in columns else None,
        "noise": _under_noise(run, subject, measure) if run.recipe.measure.noise else None,
        "roofline": traffic(program),
        "slices_given": run.task.slices is not None,
        "noise_asked": run.recipe.measure.noise,
    }
    return run.record(STAGE, "A closer look", measured=machine_peaks(run.recipe.measure.threads), details=details)


# ------------------------------------------------------------------------------------------------------ for whom, by how much


def checked_slices(run: Run, count: int | None) -> dict[str, list[Any]]:
    """The columns of the task's `slices()`, one value per test sample in the order of evaluate; {} without one.

    Raises RejectedError for anything that is no mapping of such columns.
    """
    if run.task.slices is None:
        return {}
    given: Any = run.task.slices()
    if not isinstance(given, Mapping):
        msg = f"slices must return {{column: one value per test sample}}. Got {type(given).__name__}."
        raise RejectedError(msg)
    found = {str(name): [_plain(v) for v in column] for name, column in given.items()}
    for name, column in found.items():
        if count is None or len(column) != count:
            wanted = (
                "evaluate to return one value per sample" if count is None else f"{count} values, as evaluate returns"
            )
            msg = f"slices must have {wanted}. Got {len(column)} in the column {name!r}."
            raise RejectedError(msg)
    return found


def changed(dense: Values, now: Values, columns: Mapping[str, Sequence[Any]], goal: str, unit: str) -> dict[str, Any]:
    """What became of the samples, both metrics in `unit`, sample by sample.

    {"n", "hits", "turns" {gained, lost, both, neither} (right-or-wrong metrics), "worst" {dense, now, of_dense} (means of the worst
    tenth, else), "slices" [{column, value, n, dense, now, change, low, high}], "few" [{column, value, n}] (too few for one), "most" [{id, dense, now}], "scatter" [[dense, now]]}.

    >>> found = changed(np.array([0.0, 100.0, 100.0]), np.array([0.0, 0.0, 100.0]), {"id": ["a", "b", "c"]}, "max", "%")
    >>> found["turns"]["lost"], found["most"][0]["id"]
    (1, 'b')
    """
    top = float(max(dense.max(), now.max()))
    hits = top > 0 and bool(np.isin(dense, (0.0, top)).all() and np.isin(now, (0.0, top)).all())
    worse = (dense - now) if goal == "max" else (now - dense)
    ids = columns.get("id") or list(range(len(dense)))
    order = np.argsort(-worse, kind="stable")
    most = [int(i) for i in order[:MOST_CHANGED] if worse[i] > 0]
    best = [int(i) for i in order[::-1][:MOST_CHANGED] if worse[i] < 0]
    found: dict[str, Any] = {
        "n": len(dense),
        "hits": hits,
        "turns": _turns((dense > 0) == (goal == "max"), (now > 0) == (goal == "max")) if hits else None,
        "worst": None if hits else _worst(dense, now, goal),
        "slices": [
            s
            for name, column in columns.items()
            if name not in ("id", "target")
            for s in _sliced(name, column, dense, now, unit, worse)
        ],
        "few": [
            {"column": name[:80], "value": value[:80], "n": int(mask.sum())}
            for name, column in columns.items()
            if name not in ("id", "target")
            for value, mask in _groups(column)
            if int(mask.sum()) < LEAST_IN_SLICE
        ],
        "most": [{"id": str(ids[i])[:80], "dense": _short(dense[i]), "now": _short(now[i])} for i in most],
        "best": [{"id": str(ids[i])[:80], "dense": _short(dense[i]), "now": _short(now[i])} for i in best],
        "named": "id" in columns,
    }
    if not hits:
        found["scatter"] = [[_short(dense[i]), _short(now[i])] for i in _spread(len(dense))]
    return found


def _turns(was: NDArray[np.bool_], now: NDArray[np.bool_]) -> dict[str, int]:
    pairs = {"gained": ~was & now, "lost": was & ~now, "both": was & now, "neither": ~was & ~now}
    return {name: int(mask.sum()) for name, mask in pairs.items()}


def _worst(dense: Values, now: Values, goal: str) -> dict[str, float]:
    """Means over each file's own worst tenth of the samples, and of the new file over the dense one's."""
    count = max(1, math.ceil(len(dense) / 10))
    sign = 1.0 if goal == "max" else -1.0
    of_dense = np.argsort(sign * dense, kind="stable")[:count]
    of_now = np.argsort(sign * now, kind="stable")[:count]
    means = {"dense": dense[of_dense], "now": now[of_now], "of_dense": now[of_dense]}
    return {"n": count, **{name: _short(float(v.mean())) for name, v in means.items()}}


def _sliced(
    name: str, column: Sequence[Any], dense: Values, now: Values, unit: str, worse: Values
) -> list[dict[str, Any]]:
    """Groups of the samples by one column: its values, or quarters where it has many numbers; few samples are no group."""
    out = []
    for value, mask in _groups(column):
        if int(mask.sum()) < LEAST_IN_SLICE:
            continue
        change = paired(dense[mask], now[mask], unit)
        out.append(
            {
                "column": name[:80], "value": value[:80], "n": int(mask.sum()), "dense": _short(float(dense[mask].mean())),
                "now": _short(float(now[mask].mean())), "change": change.value, "low": change.low, "high": change.high,
                "worse": float(worse[mask].mean()),
            }
        )  # fmt: skip
    return sorted(out, key=lambda s: -s["worse"])


def _groups(column: Sequence[Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    # NaN is no value that equals itself: all of them are one group
    named = [str(v) if isinstance(v, float) and not math.isfinite(v) else v for v in column]
    distinct = list(dict.fromkeys(named))
    if len(distinct) == 1:
        return []  # that is the whole
    if len(distinct) <= MOST_VALUES:
        return [(str(v), np.array([c == v for c in named])) for v in sorted(distinct, key=str)]
    if not all(isinstance(v, int | float) for v in column):
        return []
    values = np.array(column, dtype=np.float64)
    finite = np.isfinite(values)
    edges = np.quantile(values[finite], np.linspace(0, 1, QUARTERS + 1))
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, QUARTERS - 1)
    quarters = [(f"{edges[q]:.4g} to {edges[q + 1]:.4g}", finite & (place == q)) for q in range(QUARTERS)]
    return [*quarters, *([] if finite.all() else [("no finite number", ~finite)])]


def _bias(
    run: Run, subject: str, columns: Mapping[str, list[Any]], measure: Callable[[str], Artifact]
) -> dict[str, Any]:
    """Predictions against the column "target", for outputs of one number per sample: mean error of each file and a scatter."""
    target = np.array([float(v) for v in columns["target"]])
    found: dict[str, Any] = {}
    for name in dict.fromkeys(("dense", subject)):
        values = _predictions(run, measure(name))
        if values is None or len(values) != len(target):
            return {"why": "the network does not answer with one number per sample"}
        error = summarize(values - target)
        found[name] = {"value": error.value, "low": error.low, "high": error.high, "n": error.n,
                       "predicted": _ends(values), "truth": _ends(target), "apart": _apart(values, target),
                       "scatter": [[_short(target[i]), _short(values[i])] for i in _spread(len(target))]}  # fmt: skip
    return {"files": found}


def _ends(values: Values) -> list[float]:
    return [_short(float(values.min())), _short(float(values.max()))]


_OTHER_UNIT = 5.0
"""Predictions this many times larger or smaller than the truth, in ranges that nowhere meet, are in another unit."""


def _apart(values: Values, target: Values) -> bool:
    """Whether predictions are of another size than the truth, as grams beside kilograms."""
    if values.min() <= target.max() and target.min() <= values.max():
        return False
    ours, theirs = (float(np.median(np.abs(v))) for v in (values, target))
    return min(ours, theirs) > 0 and max(ours, theirs) >= _OTHER_UNIT * min(ours, theirs)


def _predictions(run: Run, artifact: Artifact) -> Values | None:
    """What the file answers in the task's evaluation, one number per sample; None where it answers otherwise."""
    predict, heard = predictor(artifact), []

    def listened(*args: Any, **kwargs: Any) -> Any:
        answer = predict(*args, **kwargs)
        heard.append([t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor)])
        return answer

    run.task.evaluate(listened)
    if any(len(call) != 1 or call[0].dim() == 0 or call[0].numel() != len(call[0]) for call in heard):
        return None
    return np.concatenate([call[0].reshape(-1).double().numpy() for call in heard])


def _spread(count: int) -> list[int]:
    """At most DRAWN positions, spread evenly."""
    return sorted({round(i * (count - 1) / max(1, min(count, DRAWN) - 1)) for i in range(min(count, DRAWN))})


# ----------------------------------------------------------------------------------------------------- bits and their noise


def layer_bits(run: Run, quantized: Quantized) -> dict[str, Any]:
    """Bits of every weight in codes, and its SQNR in dB against the folded float weight; where activations are codes, that of what enters the layer.

    What enters is measured on at most 64 calibration samples in the float network. Where ranges were moved between layers
    (equalize, smooth) the weights are others and there is no such figure.
    """
    moved = next((r for r in run.recipe.quantize.repair if r in MOVED), "")
    entering: dict[str, float | None] = {}
    entered = {
        n: w.bits if is_narrow(quantized.scheme) else 8 for n, w in quantized.weights.items()
    }  # w4a4: 4, at both ends 8
    if run.recipe.quantize.kernels == "int8":
        try:
            heard = activation_noise(
                quantized.program,
                [{"args": args, "kwargs": kwargs} for args, kwargs in some(run.task.calibration_batches)],
                bits=tuple(sorted({8, *entered.values()})),
                observer=run.recipe.quantize.observer,
            )
            entering = {one.name: one.sqnr_db["tensor"][entered.get(one.name, 8)] for one in heard}
        except ParedownError as error:
            run.say(f"noise of activations: not tested ({error})"[:200])
    rows = []
    for name, kind, weight, _ in folded_weights(quantized.program):
        packed = quantized.weights.get(name)
        fits = packed is not None and not moved and packed.codes.shape == weight.shape
        half = quantized.scheme == HALF and in_halves(quantized, name)
        back = weight.half().float() if half else packed.unpack() if fits and packed is not None else None
        rows.append(
            {
                "name": name, "kind": kind, "parameters": int(weight.numel()), "bits": 16 if half else None if packed is None else packed.bits,
                "weight_db": None if back is None else _finite(sqnr(weight, back)),
                "input_db": _finite(entering.get(name)),
            }
        )  # fmt: skip
    return {"layers": rows, "moved": moved}


# ------------------------------------------------------------------------------------------------------- disturbed inputs


def _under_noise(run: Run, subject: str, measure: Callable[[str], Artifact]) -> dict[str, Any]:
    """The metric of the dense file and of `subject` on test data that are disturbed, as means with intervals."""
    batches = some(run.task.calibration_batches)
    if not batches or not all(is_pictures(*call) for call in batches):
        return {"why": "inputs are not pictures [N, C, H, W] in floating point"}
    spread = float(torch.cat([args[0].flatten() for args, _ in batches]).double().std())
    rows = []
    for kind, strength in (("none", 0.0), *disturbances()):
        row: dict[str, Any] = {"kind": kind, "strength": strength}
        for key, name in (("dense", "dense"), ("now", subject)):
            predict = predictor(measure(name))
            if kind != "none":
                predict = disturbed(predict, kind, strength, spread, run.recipe.seed)
            found = summarize(_metric(run, predict), run.task.metric.unit)
            row[key] = {"value": found.value, "low": found.low, "high": found.high}
        rows.append(row)
    return {"rows": rows, "spread": _short(spread), "kinds": {k: list(v) for k, v in STRENGTHS.items()}}


def _metric(run: Run, predict: Callable[..., Any]) -> Any:
    from paredown.pipeline.stages import metric_of  # stages runs this

    return metric_of(run, predict)


# --------------------------------------------------------------------------------------------------------------- roofline


def traffic(program: Program) -> list[dict[str, Any]]:
    """FLOPs and bytes of every layer that multiplies, for one sample: parameters, what it reads and what it writes, each once.

    Bytes are those of float32 tensors in memory; a cache may spare some, a fused neighbour more: *estimated*.
    """
    nodes = {n.name: n for n in program.eval_graph.graph.nodes}
    found: dict[str, dict[str, Any]] = {}
    for cost in examine(program).by_node:
        node = nodes.get(cost.node.partition(":")[0])
        if not cost.macs or node is None:
            continue
        read = sum(_bytes(i.meta.get("val")) for i in node.all_input_nodes if i.name not in _states(program))
        row = found.setdefault(cost.name, {"name": cost.name, "kind": cost.kind, "flops": 0, "bytes": 0})
        row["flops"] += 2 * cost.macs
        row["bytes"] += cost.parameter_bytes + read + _bytes(node.meta.get("val"))
    return list(found.values())


def _states(program: Program) -> set[str]:
    signature = program.eval_graph.graph_signature
    return {*signature.inputs_to_parameters, *signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}


def _bytes(value: Any) -> int:
    """Of the tensors at one sample: a size that is not known is the batch."""
    total = 0
    for tensor in pytree.tree_leaves(value):
        if isinstance(tensor, Tensor):
            total += tensor.element_size() * math.prod(s if isinstance(s, int) else 1 for s in tensor.shape)
    return total


def _plain(value: Any) -> Any:
    """A value of a column as Python has it."""
    return value.item() if hasattr(value, "item") else value


def _short(value: float) -> float:
    return float(f"{float(value):.6g}")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)
