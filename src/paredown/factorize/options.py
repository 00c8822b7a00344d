"""What every layer can become: ranks with their parameters, MACs and losses."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as pairs
from typing import Any

import numpy as np

from paredown.couple.trace import concrete
from paredown.errors import UsageError
from paredown.examine.cost import Cost
from paredown.factorize.decompose import Factoring, Seen, core_energies, energies
from paredown.factorize.select import Floats, Ints
from paredown.plan import Rank
from paredown.program import Program
from paredown.prune.factors import Layer, conv_of, links, most_ranks, walked
from paredown.score.patterns import as_patterns

MOST_STEPS = 32
"""Ranks tried along each axis of Tucker-2: there are two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layer with all it can become. Arrays have one entry for each of `ranks`."""

    layer: Layer
    ranks: tuple[Rank, ...]
    parameters: Ints
    macs: Ints
    losses: Floats
    """Squared error of the weight, or of its outputs, that the method leaves; `energy` is all there is to lose."""
    energy: float
    dense_parameters: int
    dense_macs: int

    def relative(self) -> Floats:
        """Losses as a fraction of the energy."""
        return self.losses / self.energy if self.energy > 0 else self.losses


def candidate(
    layer: Layer,
    program: Program,
    cost: Cost,
    method: str,
    *,
    align: int,
    floor: float,
    seen: Seen | None,
    how: Factoring,
) -> Candidate:
    """Every aligned rank of a layer with what it costs and loses; ranks that save nothing are in it too."""
    stored = program.state[layer.parameter]
    most = most_ranks(layer.shape, layer.conv, method)
    ladders = [ladder(m, align, floor) for m in most]
    if method == "tucker2":
        ladders = [a[:: -(-len(a) // MOST_STEPS)] for a in ladders]
        held = core_energies(layer, stored).numpy()
        energy = float(held[-1, -1])
        chosen = list(pairs(*ladders))
        kept = np.array([held[a - 1, b - 1] for a, b in chosen])
    else:
        sigma = energies(layer, stored, method, seen=seen, how=how).numpy()
        energy = float(sigma.sum())
        chosen = [(r,) for r in ladders[0]]
        tails = np.append(sigma[::-1].cumsum()[::-1], 0.0)
        kept = energy - np.array([tails[r] for (r,) in chosen])
    ranks = tuple(Rank(method=method, ranks=tuple(c)) for c in chosen)
    positions, dense_macs = _positions(layer, cost, ranks[0])
    numels = np.array([[math.prod(link.shape) for link in links(layer.shape, layer.conv, r)] for r in ranks], np.int64)
    return Candidate(
        layer=layer,
        ranks=ranks,
        parameters=numels.sum(1),
        macs=numels @ positions,
        losses=np.clip(energy - kept, 0.0, None),
        energy=energy,
        dense_parameters=stored.numel(),
        dense_macs=dense_macs,
    )


def ladder(most: int, align: int, floor: float) -> list[int]:
    """Ranks that may be chosen, ascending: multiples of a step, at least floor × most.

    The step is `align`, halved while it is more than half of the layer's full rank.

    >>> ladder(20, 8, 0.1), ladder(10, 8, 0.5)
    ([8, 16], [8])
    """
    step = align
    while step > 1 and step > most // 2:
        step = step // 2 if step % 2 == 0 else 1
    first = -(-max(1, math.ceil(floor * most - 1e-9)) // step) * step
    return list(range(first, most + 1, step)) or [most]


def method_for(layer: Layer, method: str) -> str:
    """The method itself where it fits; svd for layers without a kernel of the wanted axes."""
    kernel = layer.shape[2:]
    if (method == "spatial_svd" and (len(kernel) != 2 or min(kernel) == 1)) or (
        method == "tucker2" and layer.taps == 1
    ):
        return "svd"
    return method


def _positions(layer: Layer, cost: Cost, rank: Rank) -> tuple[Ints, int]:
    """How often each link's weight is multiplied for one sample (as long as its output is), and the dense MACs."""
    by_node = {c.node: c.macs for c in cost.by_node}
    numel = math.prod(layer.shape)
    total = np.zeros(len(links(layer.shape, layer.conv, rank)), dtype=np.int64)
    dense = 0
    for node in layer.nodes:
        macs = by_node.get(node.name, 0)
        dense += macs
        rows = macs // numel
        if layer.conv is None:
            total += rows
            continue
        source: Any = node.args[0]
        axes = len(layer.shape) - 2
        sizes = [int(concrete(s)) for s in source.meta["val"].shape[-axes:]]
        out = math.prod(int(concrete(s)) for s in node.meta["val"].shape[-axes:])
        for number, link in enumerate(links(layer.shape, conv_of(node), rank)):
            sizes = walked(sizes, link)
            total[number] += rows * math.prod(sizes) // out
    return total, dense


def selected(
    layers: Mapping[str, Layer], known: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> Iterator[Layer]:
    """Layers that the patterns (fnmatch on names of parameters, of their modules and those' parents) leave free.

    Exclude wins. Raises UsageError for a pattern that matches nothing in the model.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    every = sorted({n for name in known for n in _with_parents(name)})
    for pattern in (*include, *exclude):
        if not isinstance(pattern, str) or not any(fnmatch.fnmatchcase(n, pattern) for n in every):
            near = difflib.get_close_matches(str(pattern), every, n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
            msg = f"a pattern must match a parameter or module. Got {pattern!r}, which matches nothing.{hint}"
            raise UsageError(msg)
    for layer in layers.values():
        mine = {n for name in layer.names for n in _with_parents(name)}
        wanted = not include or _any(mine, include)
        if wanted and not _any(mine, exclude):
            yield layer


def _any(names: set[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)


def _with_parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
