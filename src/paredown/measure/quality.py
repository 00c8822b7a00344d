"""Metrics and their intervals: what `evaluate` returned, checked, with its spread; the paired difference of two networks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.bootstrap import student_t
from paredown.errors import RejectedError
from paredown.records import Measured, whole_file

Values = NDArray[np.float64]
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


def evaluated(evaluate: Callable[[Any], Any], predict: Callable[..., Any], *, finite: bool = True) -> dict[str, Values]:
    """What `evaluate(predict)` returns, checked: {name: values}, one value or one per sample, float64; finite, unless that is not asked for.

    Raises RejectedError for anything else: no mapping, no entry, None, text, NaN, infinity, an empty or 2-D array.
    """
    result = evaluate(predict)
    if not isinstance(result, Mapping) or not result:
        msg = f'evaluate must return {{"name": value}}. Got {type(result).__name__}{" without entries" if result == {} else ""}.'
        raise RejectedError(msg)
    return {str(name): _values(str(name), value, finite) for name, value in result.items()}


def _values(name: str, value: Any, finite: bool) -> Values:
    rule = f"the metric {name!r} must be a finite number, or a 1-D array with one finite number per sample"
    if value is None or isinstance(value, str | bytes | bool):
        msg = f"{rule}. Got {value!r} from evaluate."
        raise RejectedError(msg)
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"{rule}. Got {type(value).__name__} from evaluate."
        raise RejectedError(msg) from error
    lost = int((~np.isfinite(array)).sum())
    if array.ndim > 1 or array.size == 0 or (finite and lost):
        count = f"{lost:,} of {array.size:,} values NaN or infinite" if array.ndim else "NaN or infinity"
        got = count if array.size and lost else f"shape {array.shape}"
        msg = f"{rule}. Got {got} from evaluate."
        raise RejectedError(msg)
    return array


def summarize(values: Values | list[float] | float, unit: str = "", machine: str = "") -> Measured:
    """Mean of the samples with its 95 % interval; a single number stands without one.

    Two-valued samples (right or wrong) get the Wilson score interval, others mean ± t · s / √n, t Student's
    97.5 % point at n - 1 degrees of freedom.

    >>> some = summarize([1.0] * 90 + [0.0] * 10)
    >>> some.value, round(some.low, 3), round(some.high, 3)
    (0.9, 0.826, 0.945)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        return Measured(
            value=float(array), unit=unit, protocol="one number from evaluate, no interval", machine=machine
        )
    n, mean = int(array.size), float(array.mean())
    low, high, how = mean, mean, "one sample, no interval"
    top = float(np.abs(array).max())
    if n >= 2 and top > 0 and bool(np.isin(array, (0.0, top)).all()):
        low, high = _wilson(mean / top, n)
        low, high, how = low * top, high * top, "95 % Wilson score interval"
    elif n >= 2:
        half = student_t(0.975, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
        low, high, how = mean - half, mean + half, "95 % interval, mean ± t s/√n"
    spread = {"low": low, "high": high} if n >= 2 else {"low": None, "high": None}
    return Measured(value=mean, unit=unit, n=n, protocol=f"mean over samples; {how}", machine=machine, **spread)


def keep_values(run: Path, stage: str, values: Values) -> None:
    """Keep what `evaluate` returned for a stage of a run, one value per sample, so that another run can be paired with it."""
    with whole_file(_values_file(run, stage)) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def kept_values(run: Path, stage: str) -> Values | None:
    """What `keep_values` kept; None where there is nothing, or nothing that is one finite number per sample."""
    path = _values_file(run, stage)
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(found, np.ndarray) and found.dtype == np.float64 and found.ndim == 1 and len(found)
    return found if whole and bool(np.isfinite(found).all()) else None


def _values_file(run: Path, stage: str) -> Path:
    return run / "steps" / f"values-{re.sub(r'[^A-Za-z0-9-]', '_', stage)}.npy"


def paired(before: Values | list[float], after: Values | list[float], unit: str = "", machine: str = "") -> Measured:
    """Mean of after - before over the same samples, with its 95 % interval. Same order, same samples.

    Right-or-wrong samples (two values, 0 and c): the adjusted interval of Agresti and Min (2005), which adds half a sample to
    each of the four outcomes, so that two networks that agree everywhere do not get an interval of width 0.
    Otherwise d̄ ± t · s_d / √n, t Student's 97.5 % point at n - 1 degrees of freedom: slices may hold few samples.

    Raises RejectedError where the lengths differ or there are no samples.

    >>> paired([1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]).value
    -0.25
    """
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        msg = f"paired values must be two 1-D arrays of the same samples. Got shapes {a.shape} and {b.shape}."
        raise RejectedError(msg)
    n, difference = int(a.size), b - a
    mean = float(difference.mean())
    top = float(max(np.abs(a).max(), np.abs(b).max()))
    if top > 0 and bool(np.isin(a, (0.0, top)).all() and np.isin(b, (0.0, top)).all()):
        gained, lost = float((difference > 0).sum()) + 0.5, float((difference < 0).sum()) + 0.5
        total = n + 2.0
        centre = (gained - lost) / total
        half = _Z * math.sqrt(max(gained + lost - (gained - lost) ** 2 / total, 0.0)) / total
        low, high, how = top * (centre - half), top * (centre + half), "Agresti–Min interval for paired proportions"
    elif n >= 2:
        half = student_t(0.975, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
        low, high, how = mean - half, mean + half, "d̄ ± t s_d/√n"
    else:
        return Measured(
            value=mean, unit=unit, n=n, protocol="paired difference, one sample, no interval", machine=machine
        )
    protocol = f"after - before on the same {n} samples; 95 % {how}"
    return Measured(value=mean, unit=unit, low=low, high=high, n=n, protocol=protocol, machine=machine)


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    z2 = _Z * _Z / n
    centre = (p + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return (0.0 if p == 0 else centre - half), (1.0 if p == 1 else centre + half)
