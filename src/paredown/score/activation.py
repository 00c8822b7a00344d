"""apoz and mean_activation: what leaves a channel on data, behind its activation.

apoz: 1 - the share of zeros (Hu et al. 2016, "Network trimming", eq. 1). mean_activation: mean |y| (Polyak & Wolf 2015).
A unit's channels are averaged; layers that write one space are members of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from paredown.errors import UsageError
from paredown.score.nouns import Source, UnitScores
from paredown.statistics.outputs import OutputStatistics, output_statistics
from paredown.statistics.uses import find_uses


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationOptions:
    """No options."""


def apoz(source: Source, options: ActivationOptions) -> dict[tuple[str, int], UnitScores]:
    """1 - APoZ of every output, in [0, 1]."""
    del options
    return _of_outputs(source, "apoz")


def mean_activation(source: Source, options: ActivationOptions) -> dict[tuple[str, int], UnitScores]:
    """Mean |y| of every output."""
    del options
    return _of_outputs(source, "mean_activation")


def _of_outputs(source: Source, what: Literal["apoz", "mean_activation"]) -> dict[tuple[str, int], UnitScores]:
    if source.batches is None:
        msg = f"{what} must be given batches. Got None. Pass batches=… of inputs, or full batches and loss=…."
        raise UsageError(msg)
    wide = [n for n, w in source.weights.items() if w.dim() >= 2]
    uses = {n: u for n, u in find_uses(source.program, wide).items() if len({one.flipped for one in u}) == 1}
    axes = {n: 1 if u[0].flipped else 0 for n, u in uses.items()}
    whole = [n for n, axis in axes.items() if source.weights[n].shape[axis] == uses[n][0].width]
    seen = output_statistics(
        source.program, whole, source.batches, loss=source.loss, num_batches=source.num_batches, module=source.module
    )
    if what == "apoz":
        _say_where_nothing_is_zero(seen)
        return {(n, axes[n]): (1.0 - s.zero_shares).numpy() for n, s in seen.items()}
    return {(n, axes[n]): s.absolute_means.numpy() for n, s in seen.items()}


def _say_where_nothing_is_zero(seen: dict[str, OutputStatistics]) -> None:
    smooth = [f"{n} ({s.activation})" for n, s in seen.items() if not bool(s.zero_shares.any())]
    if smooth:
        names = ", ".join(smooth[:5]) + (f" and {len(smooth) - 5} more" if len(smooth) > 5 else "")
        warnings.warn(f"apoz says nothing where no output is ever zero: {names}.", UserWarning, stacklevel=5)
