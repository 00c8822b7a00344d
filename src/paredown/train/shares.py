"""Shares: whether a metric that is declared in % can be one: 81 of 100 told as 0.81, or as 8,100, is refused or noted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paredown.errors import RejectedError

if TYPE_CHECKING:
    from paredown.train.task import Metric

_BOUNDED = frozenset(
    "accuracy acc top1 top5 top1accuracy top5accuracy balancedaccuracy f1 f1score macrof1 microf1 precision recall auc auroc "
    "rocauc iou miou map dice exactmatch".split()
)
"""Names of metrics that are never above 100 %."""
_MOST = 100.0 * (1 + 1e-6)


def refuse_no_share(metric: Metric, values: NDArray[np.float64]) -> None:
    """Raises RejectedError where an accuracy, or another share by its name, is in % and holds numbers that no share in % has.

    Beyond 0 to 100, or 0 and 1 for every sample (right or wrong, where 0 and 100 are meant). `values` are [samples] or a number.
    """
    if metric.unit.strip() != "%" or not bounded(metric.name):
        return
    low, high = float(values.min()), float(values.max())
    rule = f"the metric {metric.name!r}, declared in %, must be"
    if high > _MOST or low < -1e-6:
        msg = f"{rule} between 0 and 100. Got {high if high > _MOST else low:.6g} from evaluate. Return 100 × the share, once, or declare the unit that it has."
        raise RejectedError(msg)
    if values.ndim and values.size > 1 and high == 1.0 and bool(np.isin(values, (0.0, 1.0)).all()):
        msg = f"{rule} 100 for a sample that is right. Got 0 and 1 from evaluate. Return 100 × them, or a limit of one point would be one of 100."
        raise RejectedError(msg)


def share_note(metric: Metric, value: float | None) -> str:
    """What to tell of the dense network's value where it is 0, or looks as if it had another unit than %; "" where it does not.

    >>> from paredown.train import Metric
    >>> share_note(Metric(name="accuracy", unit="%", goal="max"), 0.97).partition(":")[0]
    'accuracy of the dense network is 0.97 %'
    >>> share_note(Metric(name="accuracy", unit="%", goal="max"), 97.0)
    ''
    """
    if metric.goal == "max" and value == 0 and bounded(metric.name):
        return f"{metric.name} of the dense network is 0: it has nothing to lose, so that any limit on a loss holds whatever is removed"
    if metric.unit.strip() != "%" or metric.goal != "max" or value is None:
        return ""
    of = f"{metric.name} of the dense network is {value:.4g} %"
    if value > _MOST:
        return f"{of}, more than 100: if it is a share, evaluate multiplies it too often"
    if 0 < value <= 1:
        return f"{of}: if that is a share of 1, evaluate must return 100 × it, or limits in points mean a hundred times what they say"
    return ""


def bounded(name: str) -> bool:
    """Whether a metric of this name is a share: never above 100 %.

    >>> bounded("Top-1 accuracy"), bounded("accuracy relative to the dense network")
    (True, False)
    """
    return re.sub(r"[^a-z0-9]", "", name.lower()) in _BOUNDED
