"""Candidates: a plan carried out on a network, quantized and exported, so that its file can be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.couple import Coupling
from paredown.export import Artifact, export
from paredown.factorize import factorize
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import prune
from paredown.quantize import quantize

Make = Callable[[Plan | None, Path], Artifact]
"""The file of a plan (None: of the network as it is)."""


def maker(
    program: Program, *, target: str, scheme: str, calibrate: Any, float_layers: Sequence[str] = (), seed: int = 0
) -> Make:
    """How a plan becomes a file: pruned (or factorized) with proof, quantized by the scheme, exported.

    The weights are not trained and their codes are calibrated on `calibrate` by the plainest observer: bytes, latency and
    memory depend on shapes and types alone.
    """

    def make(plan: Plan | None, path: Path) -> Artifact:
        carried_out: Any = prune if plan is None or not plan.ranks else factorize
        thing: Any = program if plan is None else carried_out(program, plan, seed=seed)
        if scheme != "fp32":
            thing = quantize(
                thing,
                target=target,
                scheme=scheme,
                calibrate=calibrate,
                observer="minmax",
                num_samples=32,
                float_layers=float_layers,
            )
        return export(thing, path, target=target)

    return make


def kept_units(coupling: Coupling, plan: Plan | None) -> dict[str, Any]:
    """Units of each space that a plan keeps, as arrays without axes.

    >>> kept_units(Coupling(spaces=(), pinned=(), unknown_ops={}), None)
    {}
    """
    counts: dict[str, Any] = {}
    for space in coupling.spaces:
        first = space.footprints[0]
        kept: Mapping[int, tuple[int, ...]] = plan.keep.get(first.parameter, {}) if plan is not None else {}
        stays = first.axis not in kept
        counts[space.name] = np.array(
            len(space) if stays else int(np.isin(first.indices[:, 0], np.array(kept[first.axis])).sum())
        )
    return counts
