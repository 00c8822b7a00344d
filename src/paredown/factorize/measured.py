"""Measured losses: what the user's own loss says when one layer alone is truncated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paredown.errors import RejectedError, UsageError
from paredown.factorize.decompose import Factoring, Seen, factors_of
from paredown.factorize.options import Candidate
from paredown.factorize.select import Floats
from paredown.program import Program
from paredown.prune.factors import product
from paredown.prune.nouns import Pruned
from paredown.statistics.batches import Given, as_number, once, taken


def measured_losses(
    source: Program | Pruned,
    candidates: Sequence[Candidate],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    batches: Given | None,
    ratios: Sequence[float],
    *,
    seen: Mapping[str, Seen],
    how: Factoring,
) -> tuple[list[Candidate], list[Floats]]:
    """Candidates cut to one rank for each ratio, and the rise of the mean loss at each; never below 0.

    The rank for a ratio is the one that loses least of its spectrum within ratio × dense parameters. One forward pass
    over all batches for each layer and ratio. Raises UsageError (no loss, no batches, ratios), RejectedError (a loss
    that is not finite on the dense model).
    """
    if loss is None or batches is None:
        msg = "choice 'measured' must be given loss=lambda model, batch: … and loss_batches=…. Got None."
        raise UsageError(msg)
    if not ratios or not all(isinstance(r, float) and 0 < r < 1 for r in ratios):
        msg = f"ratios must be fractions in (0, 1), what remains of a layer. Got {ratios!r}."
        raise UsageError(msg)
    held = list(taken(once(batches, "loss_batches"), None, "loss_batches"))
    if not held:
        msg = "loss_batches must hold at least one batch. Got none."
        raise RejectedError(msg)
    model = copy.deepcopy(source.module).eval()
    dense = _mean(loss, model, held)
    if not np.isfinite(dense):
        msg = f"the loss of the dense model must be finite. Got {dense} on loss_batches."
        raise RejectedError(msg)
    chosen = [_at_ratios(c, ratios) for c in candidates]
    rises = []
    for c in chosen:
        weight = model.get_parameter(c.layer.parameter)
        before = weight.detach().clone()
        found = []
        for rank in c.ranks:
            factors = factors_of(c.layer, before, rank, seen=seen.get(c.layer.parameter), how=how)
            with torch.no_grad():
                weight.copy_(c.layer.stored(product(factors, rank.method, c.layer.groups), before))
            value = _mean(loss, model, held)
            found.append(max(value - dense, 0.0) if np.isfinite(value) else np.inf)
        with torch.no_grad():
            weight.copy_(before)
        # A higher rank that happens to lose more is noise of the batches: ranks are compared by the best so far.
        rises.append(np.maximum.accumulate(np.array(found)[::-1])[::-1])
    return chosen, rises


def _at_ratios(c: Candidate, ratios: Sequence[float]) -> Candidate:
    """One rank for each ratio that any rank is within, by parameters ascending."""
    picks = set()
    for ratio in ratios:
        within = np.flatnonzero(c.parameters <= ratio * c.dense_parameters)
        if len(within):
            picks.add(int(within[np.argmin(c.losses[within])]))
    index = np.array(sorted(picks, key=lambda i: int(c.parameters[i])) or [int(np.argmin(c.parameters))])
    return replace(
        c,
        ranks=tuple(c.ranks[i] for i in index),
        parameters=c.parameters[index],
        macs=c.macs[index],
        losses=c.losses[index],
    )


def _mean(loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batches: Sequence[Any]) -> float:
    values = []
    for number, batch in enumerate(batches):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            values.append(as_number(loss(model, batch), number))
    return float(np.mean(values))
